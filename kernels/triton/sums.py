"""Sums over rows in two stages: programs write the sums of their chunks of rows, then these are added in order."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import cdiv, launch, tiles


@triton.jit(do_not_specialize=["chunks"])
def _column_sums_kernel(partial, out, chunks, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """out[n, c] = sum over r of partial[n, r, c]."""
    n = tl.program_id(1)
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = partial + n.to(tl.int64) * chunks * C
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, chunks, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row < chunks)[:, None] & (col < C)[None, :]
        total += tl.load(base + row.to(tl.int64)[:, None] * C + col[None, :], mask=inside, other=0.0)
    tl.store(out + n.to(tl.int64) * C + col, tl.sum(total, 0).to(out.dtype.element_ty), mask=col < C)


def column_sums(partial: Tensor, out: Tensor) -> None:
    """out (N, C) = the sums of partial (N, chunks, C) fp32 over its chunks."""
    N, chunks, C = partial.shape
    tile = tiles.column_sums()
    launch(_column_sums_kernel, (cdiv(C, tile.blocks["BLOCK_C"]), N), partial, out, chunks, C, tile=tile)
