from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, unsupported

CHUNK = 128  # keys
NONE = {"slopes_batch": 0, "page": 0, "table_stride": 0, "rotary": 0, "interleaved": 0}  # where they don't apply


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
    q, k, v = _rows(q), _rows(k), _rows(v)
    B, longest, Sk = q.shape[0], q.shape[-3], k.shape[-3]
    extra: dict[str, Any] = {}
    tensors: dict[str, Tensor | None] = {"mask": mask, "bias": bias}
    for name, t in tensors.items():
        if t is not None:
            extra[f"{name}_strides"] = t.expand(B, q.shape[2], longest, Sk).stride()
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        edges = cu_seqlens_q.tolist()
        B, longest = len(edges) - 1, max((b - a for a, b in pairwise(edges)), default=0)
        tensors |= {"cu_q": cu_seqlens_q.contiguous(), "cu_k": cu_seqlens_k.contiguous()}
    return _launch(q, k, v, B, longest, Sk, return_lse, tensors, extra, **terms)


def attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    k: Tensor | None,
    v: Tensor | None,
    block_table: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    return_lse: bool,
    **terms: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    q, room = _rows(q), k_cache.shape[1]  # what is allocated is for all that the cache holds: lengths may grow in place
    extra: dict[str, Any] = {}
    tensors: dict[str, Tensor | None] = {"lengths": lengths.contiguous()}
    if k is not None and v is not None:
        tensors |= {"k_cache": k_cache, "v_cache": v_cache, "k_new": (k := _rows(k)), "v_new": (v := _rows(v))}
        extra |= {"k_new_strides": _strides(k), "v_new_strides": _strides(v)}
    if cos is not None and sin is not None:
        tensors |= {"cos": _floats(cos), "sin": _floats(sin)}
        extra |= {"rotary": 2 * cos.shape[1], "interleaved": interleaved}
    if block_table is not None:
        tensors["block_table"] = block_table = block_table.contiguous()
        extra |= {"page": room, "table_stride": block_table.shape[1]}
        room *= block_table.shape[1]
    if cache_batch_idx is not None:
        tensors["batch_index"] = cache_batch_idx.contiguous()
    if cache_leftpad is not None:
        tensors["leftpad"] = cache_leftpad.contiguous()
    return _launch(q, k_cache, v_cache, q.shape[0], q.shape[1], room, return_lse, tensors, extra, **terms)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    B: int,
    longest: int,
    Sk: int,
    return_lse: bool,
    tensors: dict[str, Tensor | None],
    extra: dict[str, Any],
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Runs the kernel on B sequences of at most `longest` queries and at most Sk keys, with what else applies: tensors and
    numbers by their names in kernels.h."""
    Sq, H, D = q.shape[-3:]
    Hk, out, lse = k.shape[-2], torch.empty(q.shape, dtype=q.dtype), None
    if return_lse:
        tensors["lse"] = lse = torch.empty((H, Sq) if q.dim() == 3 else (B, H, Sq), dtype=torch.float32)
    if alibi_slopes is not None:
        tensors["slopes"] = _floats(alibi_slopes)
        extra["slopes_batch"] = H if alibi_slopes.dim() == 2 else 0
    if sinks is not None:
        tensors["sinks"] = _floats(sinks)
    threads = 1 if B * H * longest * Sk * D < 1 << 17 else torch.get_num_threads()
    chunks, partial, tensors["workspace"] = _split(B, Hk, H // Hk * longest, D, Sk, threads)
    bias = tensors.get("bias")
    fields = NONE | extra
    for name, t in tensors.items():
        if t is not None:
            fields[name] = t.data_ptr()
    _cpu.attention(
        threads,
        out=out.data_ptr(),
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
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
        chunks=chunks,
        partial=partial,
        scale=1 / math.sqrt(D) if scale is None else scale,
        softcap=softcap,
        dtype=DTYPES[q.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        causal=causal,
        left=window[0],
        right=window[1],
        **fields,
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


def _floats(t: Tensor) -> Tensor:
    return t.contiguous().float()


def _strides(x: Tensor) -> tuple[int, ...]:
    """Batch, position and head stride of (B, S, H, D) or (T, H, D)."""
    strides = x.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])
