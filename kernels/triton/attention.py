"""attention: one program for BLOCK_M queries of a head, which walks over the keys in blocks counted from the first key.
Blocks that nobody sees are skipped, only those at an edge are masked. Meaning: gptfast/ops/attention.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, empty, launch, tiles
from gptfast.kernels.triton.attention_arguments import (
    described,
    edges,
    floats,
    grid,
    is_plain,
    refuses,
    shared,
    strides,
    with_rows,
)
from gptfast.kernels.triton.attention_backward import attention_backward, supports_attention_backward
from gptfast.kernels.triton.attention_kvcache import attention_kvcache, supports_attention_kvcache
from gptfast.kernels.triton.attention_scores import (
    LN2,
    LOG2E,
    SIZES,
    bounds,
    finish,
    held,
    keys_at,
    pairs_at,
    place,
    seen_by_rows,
    soften,
    tile_at,
    with_terms,
)
from gptfast.kernels.triton.philox import UNSPECIALISED, dropout_arguments, kept

__all__ = [
    "attention",
    "attention_backward",
    "attention_kvcache",
    "supports_attention",
    "supports_attention_backward",
    "supports_attention_kvcache",
]


@triton.jit
def _walk(
    acc, m, l, tile_q, k, v, k_desc, v_desc, b, hk, first_i, first, last, shift, Sq, Sk, k_row, v_row, left, right,
    scale, softcap, to_log2, slope, mask, bias, mask_i, mask_j, bias_i, bias_j,
    element, seed_low, seed_high, stream_id, drop_below, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr, JOINS: tl.constexpr,
    IS_EDGE: tl.constexpr,
):  # fmt: skip
    """The keys' blocks from first to last, one after another."""
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    i = first_i + rows
    for start in range(first, last, BLOCK_N):
        tile_k = keys_at(k, k_desc, b, start, hk, Sk, k_row, D, BLOCK_N, BLOCK_D, IS_EDGE)
        tile_v = tile_k
        # Copies that follow one another are waited for together.
        if JOINS:
            tile_v = keys_at(v, v_desc, b, start, hk, Sk, v_row, D, BLOCK_N, BLOCK_D, IS_EDGE)
        s = tl.dot(tile_q, tl.trans(tile_k), input_precision="ieee")
        j = start + columns
        inside = seen_by_rows(i, j, shift, Sq, Sk, left, right, HAS_LEFT, HAS_RIGHT)
        if HAS_TERMS:
            bias_at = None if bias is None else pairs_at(bias, first_i, rows, bias_i, start, columns, bias_j)
            there = inside
            if not IS_EDGE:
                there = i < Sq
            s, _ = with_terms(s, i, j, shift, there, scale, softcap, slope, bias_at, USE_SOFTCAP)
        if mask is not None:
            at = pairs_at(mask, first_i, rows, mask_i, start, columns, mask_j)
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
        if not JOINS:
            tile_v = keys_at(v, v_desc, b, start, hk, Sk, v_row, D, BLOCK_N, BLOCK_D, IS_EDGE)
        acc = tl.dot(p.to(tile_v.dtype), tile_v, acc, input_precision="ieee")
    return acc, m, l


@triton.jit(do_not_specialize=[*SIZES, "N", *UNSPECIALISED])
def _attention_kernel(
    q, k, v, k_desc, v_desc, out, lse, mask, bias, slopes, sinks, cu_q, cu_k, N, Sq, Sk, H, G, left, right,
    scale, softcap, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, slopes_batch, lse_head,
    mask_b, mask_h, mask_i, mask_j, bias_b, bias_h, bias_i, bias_j,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_TERMS: tl.constexpr, USE_SOFTCAP: tl.constexpr,
    USE_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, IS_EXACT: tl.constexpr,
    HOLDS_Q: tl.constexpr, JOINS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (heads x batch, blocks), or (heads, blocks of all sequences). The last blocks of a causal call have the
    most keys and begin first."""
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
    tile_q = tile_at(q, first, Sq, q_row, D, BLOCK_M, BLOCK_D, True)
    if HOLDS_Q:
        tile_q = held(tile_q, Sq)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    m = tl.zeros((BLOCK_M,), tl.float32) - float("inf")
    if COLUMNS > 1:
        l = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    else:
        l = tl.zeros((BLOCK_M,), tl.float32)
    to_natural = scale
    if HAS_TERMS:
        to_natural = 1.0
    to_log2 = to_natural * LOG2E
    end = tl.minimum(first + BLOCK_M, Sq) - 1
    a0, a1, a2, a3 = bounds(first, end, shift, Sk, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    for part in tl.static_range(3):
        low, high = a1, a2
        if part == 0:
            low, high = a0, a1
        if part == 2:
            low, high = a2, a3
        if HAS_LEFT or part != 0:
            acc, m, l = _walk(
                acc, m, l, tile_q, k, v, k_desc, v_desc, b, h // G, first, low, high, shift, Sq, Sk, k_row, v_row, left,
                right, scale, softcap, to_log2, slope, mask, bias, mask_i, mask_j, bias_i, bias_j,
                element, seed_low, seed_high, stream_id, drop_below, keep_scale, D, BLOCK_M, BLOCK_N, BLOCK_D,
                HAS_LEFT, HAS_RIGHT, HAS_TERMS, USE_SOFTCAP, USE_DROPOUT, IS_BY_FOURS, IS_EXACT, JOINS, part != 1,
            )  # fmt: skip
    if COLUMNS > 1:
        l = tl.sum(l, 1)
    if not IS_EXACT:
        to_natural = LN2
    result, logs = finish(acc, m, l, sink, to_natural)
    row = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)[None, :]
    # out is contiguous: (B, Sq, H, D) or (T, H, D)
    whole = (batch * Sq + (start_q + first)) * H + h
    # Counted from the block's first row: the numbers of the rows would keep registers through the loops.
    there = row < Sq - first
    inside = there[:, None] & (d < D)
    tl.store(out + whole * D + (row[:, None] * (H * D) + d), result.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        # (B, H, Sq), or (H, T)
        at = lse + (batch * H + h) * lse_head + start_q + first
        tl.store(at + row, logs, mask=there)


def supports_attention(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **terms: Any) -> str | None:
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "alibi_slopes require a gradient, and this kernel makes none for them"
    for name in ("bias", "sinks"):
        if (t := terms.get(name)) is not None and t.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, and this kernel makes none for it"
    return refuses(q, k, v, terms, backward=True)


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
    terms = shared(q, k, mask, bias, alibi_slopes, causal, scale, window, softcap, cu_seqlens_q)
    reads = mask is not None or bias is not None
    tile = tiles.attention(D, q.dtype, arch(q), is_plain(terms, mask, dropout_p), reads)
    dropout = dropout_arguments(dropout_p, int(seed), stream)
    BLOCK = [1, 1, tile.blocks["BLOCK_N"], tile.blocks["BLOCK_D"]]
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
