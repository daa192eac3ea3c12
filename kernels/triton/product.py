"""Matrix products whose every element is summed over K in order, in blocks of one size: no row's result depends on how
many rows there are, and none on the machine."""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, launch
from gptfast.kernels.triton.tiles import product_tile


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    a, b, c, bias, factor, M, N, K,
    a_row, a_col, b_row, b_col, c_row,
    HAS_BIAS: tl.constexpr, HAS_FACTOR: tl.constexpr, IS_ADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c (M, N) = a (M, K) b (K, N) factor + bias, or what c holds. GROUP rows of blocks share b's columns in the L2."""
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
    in_a, in_b = rows[:, None] < M, cols[None, :] < N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    one = tl.where(M > 0, 1.0, 0.0)
    for begin in range(0, K, BLOCK_K):
        x = tl.load(of_a, mask=in_a & (k[None, :] < K - begin), other=0.0)
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
    if IS_ADDED:
        total += tl.load(of_c, mask=in_a & in_b, other=0.0)
    tl.store(of_c, total, mask=in_a & in_b)


def product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, factor: Tensor | None = None, add: bool = False
) -> Tensor:
    """out (M, N), whose rows are contiguous, = a (M, K) b (K, N) factor + bias; with `add`, added to what out holds.

    a and b are of one dtype, with any strides; factor is one number. The sums are fp32, out is rounded once.
    """
    (M, K), N = a.shape, b.shape[1]
    tile = product_tile(M, N, a.dtype.itemsize, add, arch(a))
    grid = cdiv(M, tile.blocks["BLOCK_M"]) * cdiv(N, tile.blocks["BLOCK_N"])
    launch(
        _product_kernel,
        (grid,),
        *(a, b, out, bias, factor, M, N, K, *a.stride(), *b.stride(), out.stride(0)),
        HAS_BIAS=bias is not None,
        HAS_FACTOR=factor is not None,
        IS_ADDED=add,
        tile=tile,
    )
    return out
