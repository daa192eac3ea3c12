from __future__ import annotations

import math
from typing import Any

import torch
from gptfast.kernels.cpu import DTYPES, pointer, unsupported
from torch import Tensor

from gptfast import _cpu

CHUNK = 128  # keys
NONE3, NONE4 = (0, 0, 0), (0, 0, 0, 0)


def supports_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, **terms: Any) -> str | None:
    if dropout_p:
        return "it has no dropout yet"
    return _unsupported(q, k, v, terms)


def supports_attention_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **terms: Any) -> str | None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(-1) != 1:
            return f"the last dimension of {name} must be contiguous, not of stride {cache.stride(-1)}"
    return _unsupported(q, k_cache, v_cache, terms)


def _unsupported(q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Any]) -> str | None:
    if q.shape[-1] > 256:
        return f"it takes heads of up to 256 dimensions, not {q.shape[-1]}"
    return unsupported(q, k, v) or unsupported(*(terms.get(n) for n in ("k", "v", "cos", "sin", "bias", "sinks")))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool,
    **terms: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    k, v = _rows(k), _rows(v)
    longest, Sk = (q.shape[0], k.shape[0]) if q.dim() == 3 else (q.shape[1], k.shape[1])
    B, full = q.shape[0], (q.shape[0], q.shape[-2], longest, Sk)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        edges = cu_seqlens_q.tolist()
        B, longest = len(edges) - 1, max((b - a for a, b in zip(edges, edges[1:])), default=0)
    return _launch(
        *(q, k, v, B, longest, Sk, return_lse),
        mask=mask,
        bias=bias,
        mask_strides=mask.expand(full).stride() if mask is not None else NONE4,
        bias_strides=bias.expand(full).stride() if bias is not None else NONE4,
        cu_q=cu_seqlens_q,
        cu_k=cu_seqlens_k,
        **terms,
    )


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None,
    v: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    return_lse: bool,
    **terms: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    B, Sq = q.shape[:2]
    longest = max(lengths.tolist(), default=0) + (0 if k is None else Sq)
    return _launch(
        *(q, k_cache, v_cache, B, Sq, longest, return_lse),
        k_new=None if k is None else _rows(k),
        v_new=None if v is None else _rows(v),
        lengths=lengths.contiguous(),
        batch_index=_contiguous(cache_batch_idx),
        leftpad=_contiguous(cache_leftpad),
        **terms,
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    B: int,
    longest: int,
    Sk: int,
    return_lse: bool,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    mask_strides: tuple[int, ...] = NONE4,
    bias_strides: tuple[int, ...] = NONE4,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    lengths: Tensor | None = None,
    leftpad: Tensor | None = None,
    batch_index: Tensor | None = None,
    block_table: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    q = _rows(q)
    H, D, Hk = q.shape[-2], q.shape[-1], k.shape[-2]
    out = torch.empty(q.shape, dtype=q.dtype)
    Sq = q.shape[-3]
    lse = torch.empty((H, Sq) if cu_q is not None else (B, H, Sq), dtype=torch.float32) if return_lse else None
    threads = 1 if B * H * longest * Sk * D < 1 << 17 else torch.get_num_threads()
    chunks, partial, workspace = _split(B, Hk, H // Hk * longest, D, Sk, threads)
    alibi_slopes, sinks = _floats(alibi_slopes), _floats(sinks)
    cos, sin, block_table = _floats(cos), _floats(sin), _contiguous(block_table)
    _cpu.attention(
        threads,
        out=out.data_ptr(),
        lse=pointer(lse),
        workspace=pointer(workspace),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        k_cache=k.data_ptr(),
        v_cache=v.data_ptr(),
        k_new=pointer(k_new),
        v_new=pointer(v_new),
        cos=pointer(cos),
        sin=pointer(sin),
        mask=pointer(mask),
        bias=pointer(bias),
        slopes=pointer(alibi_slopes),
        sinks=pointer(sinks),
        cu_q=pointer(cu_q),
        cu_k=pointer(cu_k),
        lengths=pointer(lengths),
        leftpad=pointer(leftpad),
        batch_index=pointer(batch_index),
        block_table=pointer(block_table),
        B=B,
        Sq=Sq,
        Sk=Sk,
        H=H,
        Hk=Hk,
        D=D,
        q_longest=longest,
        q_strides=_strides(q),
        k_strides=_strides(k),
        v_strides=_strides(v),
        k_new_strides=_strides(k_new),
        v_new_strides=_strides(v_new),
        mask_strides=mask_strides,
        bias_strides=bias_strides,
        slopes_batch=H if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        page=0 if block_table is None else k.shape[1],
        table_stride=0 if block_table is None else block_table.shape[1],
        rotary=0 if cos is None else 2 * cos.shape[1],
        chunks=chunks,
        partial=partial,
        scale=1 / math.sqrt(D) if scale is None else scale,
        softcap=softcap,
        dtype=DTYPES[q.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        causal=causal,
        left=window[0],
        right=window[1],
        interleaved=interleaved,
    )
    return out if lse is None else (out, lse)


def _split(B: int, Hk: int, rows: int, D: int, Sk: int, threads: int) -> tuple[int, int, Tensor | None]:
    """Whether the keys are split among the threads: (chunks a sequence, floats a partial result, workspace or None)."""
    chunks = -(-Sk // CHUNK)
    if threads == 1 or chunks < 2 or B * Hk * -(-rows // 48) >= 16 * threads:
        return 0, 0, None
    wide = 4 if rows <= 4 else 8 if rows <= 8 else _up(rows)  # rows rounded up to the lanes of any instruction set
    partial = wide * _up(D) + 2 * _up(rows)
    return chunks, partial, torch.empty(B * Hk * chunks * partial)


def _up(n: int) -> int:
    return -(-n // 16) * 16


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, copied only where it hasn't one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous().float()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Batch, position and head stride of (B, S, H, D) or (T, H, D)."""
    return NONE3 if x is None else (0, *x.stride()[:-1])[-3:]
