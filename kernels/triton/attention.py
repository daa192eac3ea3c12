"""attention: one program for BLOCK_M queries of a head, which walks over the keys in blocks counted from the first key.
Blocks that nobody sees are skipped, only those at an edge are masked. Meaning: gptfast/ops/attention.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, empty, launch, tiles, unsupported
from gptfast.kernels.triton.attention_scores import bounds, finish, seen, soften, with_terms
from gptfast.kernels.triton.philox import UNSPECIALISED, dropout_arguments, kept
from triton.tools.tensor_descriptor import TensorDescriptor

SIZES = ["Sq", "Sk", "H", "G", "left", "right", "scale", "softcap"]


@triton.jit
def place(block, cu_q, cu_k, N, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of sequences that lie end to end: (sequence, which of its blocks, its first query and key, their numbers, pairs of
    queries and keys before it), `block` counted through all of them. Beyond the last block the sequence is N."""
    n = tl.arange(0, BLOCK_B)
    q0 = tl.load(cu_q + n, mask=n < N, other=0)
    q1 = tl.load(cu_q + n + 1, mask=n < N, other=0)
    k0 = tl.load(cu_k + n, mask=n < N, other=0)
    k1 = tl.load(cu_k + n + 1, mask=n < N, other=0)
    blocks = tl.cdiv(q1 - q0, BLOCK_M)
    ends = tl.cumsum(blocks, 0)
    b = tl.sum(tl.where((ends <= block) & (n < N), 1, 0), 0)
    mine = n == b
    before = n < b
    pairs = tl.sum(tl.where(before, (q1 - q0).to(tl.int64) * (k1 - k0), 0), 0)
    block -= tl.sum(tl.where(before, blocks, 0), 0)
    start_q = tl.sum(tl.where(mine, q0, 0), 0)
    start_k = tl.sum(tl.where(mine, k0, 0), 0)
    return (
        b,
        block,
        start_q,
        start_k,
        tl.sum(tl.where(mine, q1 - q0, 0), 0),
        tl.sum(tl.where(mine, k1 - k0, 0), 0),
        pairs,
    )


@triton.jit
def tile_at(x, row, S, stride, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, IS_EDGE: tl.constexpr):
    """Rows row to row + BLOCK_S of x (S, D), zeros beyond it; without IS_EDGE all of the rows are there."""
    r = tl.arange(0, BLOCK_S)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    at = x + tl.cast(row, tl.int64) * stride + (r * stride + d)
    if IS_EDGE:
        if D == BLOCK_D:
            return tl.load(at, mask=row + r < S, other=0.0)
        else:
            return tl.load(at, mask=(row + r < S) & (d < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(at)
        else:
            return tl.load(at, mask=d < D, other=0.0)


@triton.jit
def keys_at(x, desc, b, row, h, S, stride, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
            IS_EDGE: tl.constexpr):  # fmt: skip
    """tile_at(), through a descriptor of the whole tensor (B, S, H, D) where there is one."""
    if desc is None:
        return tile_at(x, row, S, stride, D, BLOCK_S, BLOCK_D, IS_EDGE)
    else:
        return desc.load([b, row, h, 0]).reshape(BLOCK_S, BLOCK_D)


@triton.jit
def _walk(
    acc, m, l, tile_q, k, v, k_desc, v_desc, b, hk, i, first, last, shift, Sq, Sk, k_row, v_row, left, right, scale, softcap, to_log2,
    slope, mask, bias, mask_i, mask_j, bias_i, bias_j,
    element, seed_low, seed_high, stream_id, drop_below, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr, IS_EDGE: tl.constexpr,
):  # fmt: skip
    """The keys' blocks from first to last, one after another."""
    for start in range(first, last, BLOCK_N):
        tile_k = keys_at(k, k_desc, b, start, hk, Sk, k_row, D, BLOCK_N, BLOCK_D, IS_EDGE)
        s = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
        j = start + tl.arange(0, BLOCK_N)[None, :]
        inside = seen(i, j, shift, Sq, Sk, left, right, HAS_LEFT, HAS_RIGHT)
        if HAS_TERMS:
            s, _ = with_terms(s, i, j, shift, inside, scale, softcap, slope, bias, bias_i, bias_j, USE_SOFTCAP)
        if mask is not None:
            at = mask + i.to(tl.int64) * mask_i + j.to(tl.int64) * mask_j
            inside &= tl.load(at, mask=inside, other=0) != 0
        if IS_EDGE or mask is not None:
            s = tl.where(inside, s, float("-inf"))
        # A bias may be -inf for all of a block.
        acc, m, l, p = soften(acc, m, l, s, to_log2, IS_EDGE or mask is not None or bias is not None, IS_EXACT)
        if USE_DROPOUT:
            keep = kept(
                element + i.to(tl.int64) * Sk,
                j,
                seed_low,
                seed_high,
                stream_id,
                drop_below,
                IS_BY_FOURS,
                BLOCK_M,
                BLOCK_N,
            )
            p = tl.where(keep, p * keep_scale, 0.0)
        tile_v = keys_at(v, v_desc, b, start, hk, Sk, v_row, D, BLOCK_N, BLOCK_D, IS_EDGE)
        acc = tl.dot(p.to(tile_v.dtype), tile_v, acc, input_precision="ieee")
    return acc, m, l


@triton.jit(do_not_specialize=[*SIZES, "N", *UNSPECIALISED])
def _attention_kernel(
    q, k, v, k_desc, v_desc, out, lse, mask, bias, slopes, sinks, cu_q, cu_k, N, Sq, Sk, H, G, left, right, scale, softcap,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, slopes_batch, lse_head,
    mask_b, mask_h, mask_i, mask_j, bias_b, bias_h, bias_i, bias_j,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr,
):  # fmt: skip
    """Grid: (heads x batch, blocks), or (heads, blocks of all sequences). The last blocks of a causal call have the most
    keys and begin first."""
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    h = tl.program_id(0) % H
    b = tl.program_id(0) // H
    start_q, start_k = 0, 0
    element = tl.program_id(0).to(tl.int64) * Sq * Sk
    if cu_q is not None:
        b, block, start_q, start_k, Sq, Sk, pairs = place(block, cu_q, cu_k, N, BLOCK_M, BLOCK_B)
        if b >= N:
            return
        element = pairs * H + h.to(tl.int64) * Sq * Sk
    first = block * BLOCK_M
    shift = Sk - Sq
    batch = b.to(tl.int64)
    if cu_q is not None:
        batch = batch * 0
    q += batch * q_batch + h * q_head + tl.cast(start_q, tl.int64) * q_row
    k += batch * k_batch + (h // G) * k_head + tl.cast(start_k, tl.int64) * k_row
    v += batch * v_batch + (h // G) * v_head + tl.cast(start_k, tl.int64) * v_row
    slope, sink = None, None
    if slopes is not None:
        slope = tl.load(slopes + b * slopes_batch + h)
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32)
    if mask is not None:
        mask += batch * mask_b + h * mask_h
    if bias is not None:
        bias += batch * bias_b + h * bias_h
    i = first + tl.arange(0, BLOCK_M)[:, None]
    tile_q = tile_at(q, first, Sq, q_row, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    m = l - float("inf")
    to_natural = scale
    if HAS_TERMS:
        to_natural = 1.0
    to_log2 = to_natural * 1.4426950408889634
    end = tl.minimum(first + BLOCK_M, Sq) - 1
    a0, a1, a2, a3 = bounds(first, end, shift, Sk, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    if HAS_LEFT:
        acc, m, l = _walk(
            acc, m, l, tile_q, k, v, k_desc, v_desc, b, h // G, i, a0, a1, shift, Sq, Sk, k_row, v_row, left, right, scale, softcap, to_log2,
            slope, mask, bias, mask_i, mask_j, bias_i, bias_j,
            element, seed_low, seed_high, stream_id, drop_below, keep_scale, D, BLOCK_M, BLOCK_N, BLOCK_D,
            HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, USE_DROPOUT, IS_BY_FOURS, IS_EXACT, True,
        )  # fmt: skip
    acc, m, l = _walk(
        acc, m, l, tile_q, k, v, k_desc, v_desc, b, h // G, i, a1, a2, shift, Sq, Sk, k_row, v_row, left, right, scale, softcap, to_log2,
        slope, mask, bias, mask_i, mask_j, bias_i, bias_j,
        element, seed_low, seed_high, stream_id, drop_below, keep_scale, D, BLOCK_M, BLOCK_N, BLOCK_D,
        HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, USE_DROPOUT, IS_BY_FOURS, IS_EXACT, False,
    )  # fmt: skip
    acc, m, l = _walk(
        acc, m, l, tile_q, k, v, k_desc, v_desc, b, h // G, i, a2, a3, shift, Sq, Sk, k_row, v_row, left, right, scale, softcap, to_log2,
        slope, mask, bias, mask_i, mask_j, bias_i, bias_j,
        element, seed_low, seed_high, stream_id, drop_below, keep_scale, D, BLOCK_M, BLOCK_N, BLOCK_D,
        HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, USE_DROPOUT, IS_BY_FOURS, IS_EXACT, True,
    )  # fmt: skip
    result, logs = finish(acc, m, l, sink, to_natural)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    # out is contiguous: (B, Sq, H, D) or (T, H, D)
    whole = (batch * Sq + (start_q + first)) * H + h
    tl.store(out + whole * D + (row[:, None] * (H * D) + d), result.to(out.dtype.element_ty), mask=(i < Sq) & (d < D))
    if lse is not None:
        # (B, H, Sq), or (H, T)
        at = lse + (batch * H + h) * lse_head + start_q + first
        tl.store(at + row, logs, mask=first + row < Sq)


def supports_attention(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **terms: Any) -> str | None:
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "alibi_slopes require a gradient, and this kernel makes none for them"
    for name in ("bias", "sinks"):
        if (t := terms.get(name)) is not None and t.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, and this kernel makes none for it"
    return refuses(q, k, v, terms, backward=True)


def refuses(q: Tensor, k: Tensor, v: Tensor, terms: dict[str, Any], backward: bool = False) -> str | None:
    if q.shape[-1] > 256:
        return f"it takes heads of up to 256 dimensions, not {q.shape[-1]}"
    others = (terms.get(n) for n in ("k", "v", "cos", "sin", "bias", "sinks"))
    return unsupported(q, k, v, *others, backward=backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: tuple[int, int],
    softcap: float,
    mask: Tensor | None,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: int,
    stream: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    q, k, v = with_rows(q), with_rows(k), with_rows(v)
    (Sq, H, D), Sk = q.shape[-3:], k.shape[-3]
    varlen = cu_seqlens_q is not None
    out = empty(q.shape, q.dtype, q)
    heads = (H, Sq) if varlen else (q.shape[0], H, Sq)
    lse = empty(heads, torch.float32, q) if return_lse else None
    tile = tiles.attention(D, q.dtype, arch(q))
    terms = shared(q, k, mask, bias, alibi_slopes, causal, scale, window, softcap, cu_seqlens_q)
    dropout = dropout_arguments(dropout_p, int(seed), stream)
    BLOCK = [1, tile.blocks["BLOCK_N"], 1, tile.blocks["BLOCK_D"]]
    descriptors = (described(k, BLOCK), described(v, BLOCK))
    launch(
        *(
            _attention_kernel,
            grid(q, tile.blocks["BLOCK_M"], cu_seqlens_q),
            q,
            k,
            v,
            *descriptors,
            out,
            lse,
            mask,
            bias,
        ),
        *(
            floats(alibi_slopes),
            None if sinks is None else sinks.contiguous(),
            edges(cu_seqlens_q),
            edges(cu_seqlens_k),
        ),
        *(0 if cu_seqlens_q is None else len(cu_seqlens_q) - 1, Sq, Sk, H, H // k.shape[-2]),
        **terms,
        **strides(q=q, k=k, v=v),
        **dropout,
        lse_head=Sq,
        D=D,
        USE_DROPOUT=dropout_p > 0,
        IS_BY_FOURS=Sk % 4 == 0 and not varlen,
        tile=tile,
    )
    return out if lse is None else (out, lse)


def shared(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, causal: bool,
    scale: float | None, window: tuple[int, int], softcap: float, cu: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that forward and backward have in common."""
    H, D = q.shape[-2:]
    scale = 1 / math.sqrt(D) if scale is None else scale
    right = 0 if causal and window[1] != 0 else window[1]
    named: dict[str, Any] = {}
    for name, t in (("mask", mask), ("bias", bias)):
        full = (0, 0, 0, 0) if t is None else t.expand(q.shape[0], H, q.shape[1], k.shape[1]).stride()
        named |= {f"{name}_{axis}": stride for axis, stride in zip("bhij", full)}
    return named | {
        **{"left": window[0], "right": right, "scale": float(scale), "softcap": float(softcap)},
        **{"HAS_LEFT": window[0] >= 0, "HAS_RIGHT": right >= 0, "USE_SOFTCAP": softcap > 0},
        # Scores of a scale that isn't positive are scaled before their maximum is taken.
        "HAS_TERMS": softcap > 0 or alibi_slopes is not None or bias is not None or scale <= 0,
        "slopes_batch": H if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
        "IS_EXACT": q.dtype == torch.float32,
        "BLOCK_B": 1 if cu is None else tiles.next_power_of_2(len(cu)),
    }


def grid(q: Tensor, BLOCK: int, cu: Tensor | None, H: int | None = None) -> tuple[int, int]:
    """(heads x batch, blocks). Of sequences end to end: as many blocks as there can be at most."""
    H = q.shape[-2] if H is None else H
    if cu is None:
        return q.shape[0] * H, cdiv(q.shape[1], BLOCK)
    N = len(cu) - 1
    return H, min(q.shape[0], q.shape[0] // BLOCK + N) if q.shape[0] else 0


def described(t: Tensor, block: list[int]) -> TensorDescriptor | None:
    """What Hopper and later copy blocks of (B, S, H, D) by, without addresses in registers; None where it can't be: its
    addresses and strides are multiples of 16 bytes. Sequences end to end would be read beyond their own end."""
    aligned = all(n * t.element_size() % 16 == 0 for n in (t.data_ptr() // t.element_size(), *t.stride()[:-1]))
    if t.dim() != 4 or not aligned or t.numel() == 0 or t.element_size() != 2 or int(arch(t)[3:] or 0) < 90:
        return None
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def with_rows(t: Tensor) -> Tensor:
    """t with a contiguous last dimension, copied only where it hasn't one."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous().float()


def edges(cu: Tensor | None) -> Tensor | None:
    return None if cu is None else cu.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """Batch, row and head stride of (B, S, H, D) or (T, H, D), by the names of the kernels' arguments."""
    named = {}
    for name, t in tensors.items():
        batch = t.stride(0) if t.dim() == 4 else 0
        named |= {f"{name}_batch": batch, f"{name}_row": t.stride(-3), f"{name}_head": t.stride(-2)}
    return named


def attention_backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
    from gptfast.kernels.triton import attention_backward as module

    return module.attention_backward(*arguments, **named)


def supports_attention_backward(*arguments: Any, **named: Any) -> str | None:
    from gptfast.kernels.triton import attention_backward as module

    return module.supports_attention_backward(*arguments, **named)


def attention_kvcache(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    from gptfast.kernels.triton import attention_kvcache as module

    return module.attention_kvcache(**arguments)


def supports_attention_kvcache(**arguments: Any) -> str | None:
    from gptfast.kernels.triton import attention_kvcache as module

    return module.supports_attention_kvcache(**arguments)
