"""Philox4x32-10 within kernels, and dropout by it: gptfast/ops/philox.py says what they mean."""

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl
from gptfast.kernels.triton import signed


@triton.jit
def philox(seed_low, seed_high, index, stream):
    """The four words (uint32) at each index (int64); seed and stream are int32 whose bits count."""
    zero = tl.zeros(index.shape, tl.uint32)
    c0 = (index & 0xFFFFFFFF).to(tl.uint32)
    c1 = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c2 = zero + stream.to(tl.uint32, bitcast=True)
    c3 = zero
    k0 = zero + seed_low.to(tl.uint32, bitcast=True)
    k1 = zero + seed_high.to(tl.uint32, bitcast=True)
    A: tl.constexpr = 0xD2511F53
    B: tl.constexpr = 0xCD9E8D57
    m0 = tl.full(index.shape, A, tl.uint32)
    m1 = tl.full(index.shape, B, tl.uint32)
    for _ in tl.static_range(10):
        d0 = tl.umulhi(m1, c2) ^ c1 ^ k0
        d2 = tl.umulhi(m0, c0) ^ c3 ^ k1
        c1 = m1 * c2
        c3 = m0 * c0
        c0, c2 = d0, d2
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def kept(
    start,
    col,
    seed_low,
    seed_high,
    stream,
    drop_below,
    IS_BY_FOURS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Which elements (BLOCK_R, BLOCK_C) dropout keeps: those at start (BLOCK_R, 1) + col (1, BLOCK_C) of a tensor,
    where a block's columns are consecutive. IS_BY_FOURS: each block begins at a multiple of four, so that one draw of
    four words serves four elements; otherwise each element draws for itself."""
    limit = drop_below.to(tl.uint32, bitcast=True)
    if IS_BY_FOURS:
        first = start + tl.min(col, 1)[:, None]
        index = first // 4 + tl.arange(0, BLOCK_C // 4)[None, :]
        w0, w1, w2, w3 = philox(seed_low, seed_high, index, stream)
        return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_R, BLOCK_C)) >= limit
    else:
        at = start + col
        w0, w1, w2, w3 = philox(seed_low, seed_high, at // 4, stream)
        word = at % 4
        return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3)) >= limit


def dropout_arguments(p: float, seed: int, stream: int) -> dict[str, Any]:
    """What a kernel with dropout is given; the integers must not be specialised.

    Raises RuntimeError while a CUDA graph is captured, which would drop the same elements whenever it is replayed.
    """
    if p and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("dropout can't be captured as a CUDA graph: each replay would drop the same elements")
    return {
        "seed_low": signed(seed),
        "seed_high": signed(seed >> 32),
        "stream_id": signed(stream),
        "drop_below": signed(int(p * 2**32)),
        "keep_scale": 1 / (1 - p),
    }


UNSPECIALISED = ["seed_low", "seed_high", "stream_id", "drop_below", "keep_scale"]
