"""Matrix products whose every element is summed over K in order, in blocks of one size: no row's result depends on how
many rows there are, and none on the machine."""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, empty, launch
from gptfast.kernels.triton.tiles import product_tile

PAD = tl.constexpr(64)  # 16-bit numbers of a line of 128 bytes


def padded(rows: int, cols: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """An output (rows, cols) whose rows begin PAD numbers apart, or a multiple."""
    return empty((rows, cdiv(cols, PAD.value) * PAD.value), dtype, like)[:, :cols]


def whole(t: Tensor) -> Tensor:
    """What padded() made, with its padding."""
    return t.as_strided((t.shape[0], t.stride(0)), t.stride())


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    a, b, c, bias, factor, M, N, K,
    a_row, a_col, b_row, b_col, c_row,
    HAS_BIAS: tl.constexpr, HAS_FACTOR: tl.constexpr, IS_ADDED: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) b (K, N) factor + bias, or what c holds. GROUP rows of blocks share b's columns in the L2.

    PADDED: "M", "N" or "K", whose end in a or c lies PAD numbers apart from the next: up to there they may be accessed.
    Whole lines are, for a mask that may end anywhere lets a thread load one number at a time."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    block_m = first + pid % (GROUP * blocks_n) % height
    block_n = pid % (GROUP * blocks_n) // height
    rows = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    of_a = a + rows[:, None] * a_row + k[None, :] * a_col
    of_b = b + k[:, None] * b_row + cols[None, :] * b_col
    end_m = tl.cdiv(M, PAD) * PAD if PADDED == "M" else M
    end_n = tl.cdiv(N, PAD) * PAD if PADDED == "N" else N
    end_k = tl.cdiv(K, PAD) * PAD if PADDED == "K" else K
    in_a, in_b = rows[:, None] < end_m, cols[None, :] < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    one = tl.where(M > 0, 1.0, 0.0)
    for begin in range(0, K, BLOCK_K):
        x = tl.load(of_a, mask=in_a & (k[None, :] < end_k - begin), other=0.0)
        y = tl.load(of_b, mask=in_b & (k[:, None] < K - begin), other=0.0)
        if x.dtype == tl.float32:  # block by block, as in linear.py
            total += tl.dot(x, y, input_precision="ieee") * one
        else:
            total = tl.dot(x, y, total, input_precision="ieee")
        of_a += BLOCK_K * a_col
        of_b += BLOCK_K * b_row
    if HAS_FACTOR:
        total = total * tl.load(factor)
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    of_c = c + rows[:, None] * c_row + cols[None, :]
    in_c = (rows[:, None] < M) & (cols[None, :] < end_n)
    if IS_ADDED:
        total += tl.load(of_c, mask=in_c, other=0.0)
    tl.store(of_c, total, mask=in_c)


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    factor: Tensor | None = None,
    add: bool = False,
    padded: str = "",
) -> Tensor:
    """out (M, N), whose rows are contiguous, = a (M, K) b (K, N) factor + bias; with `add`, added to what out holds.

    a and b are of one dtype, with any strides; factor is one number. The sums are fp32, out is rounded once.
    padded: "M" or "K" where a, or "N" where out, is contiguous along it in memory made by padded(): a's padding holds
    zeros along K and anything along M, out's is written, with zeros if there is no bias.
    """
    (M, K), N = a.shape, b.shape[1]
    tile = product_tile(M, N, a.dtype.itemsize, add, arch(a))
    of_a = whole(a) if padded == "K" else whole(a.t()) if padded == "M" else a
    of_c = whole(out) if padded == "N" else out
    grid = cdiv(M, tile.blocks["BLOCK_M"]) * cdiv(N, tile.blocks["BLOCK_N"])
    launch(
        _product_kernel,
        (grid,),
        *(of_a, b, of_c, bias, factor, M, N, K, *a.stride(), *b.stride(), out.stride(0)),
        HAS_BIAS=bias is not None,
        HAS_FACTOR=factor is not None,
        IS_ADDED=add,
        PADDED=padded,
        tile=tile,
    )
    return out
