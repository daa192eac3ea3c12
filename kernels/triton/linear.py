"""linear: y^T = W x^T by tiles, so that the few rows of x that decoding has are the narrow side of a matrix instruction
and the weights, made in registers where they are quantised, its wide one.

K is summed in chunks, constants of the op page: the sums of a chunk are added to those before it. Many rows: a program
walks through all chunks. Few rows: each chunk has a program of its own, so that enough of the weights is on its way,
and a second launch adds them up, in the same order to the same bits. All tiles of a dtype use one matrix instruction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, elsewhere, empty, launch, rows, tiles, unsupported
from gptfast.kernels.triton.product import product
from gptfast.kernels.triton.sums import column_sums
from gptfast.quantize import GROUP, KINDS, PANEL, PackedWeight, QuantizedWeight

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _place(M, N, K, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, CHUNK: tl.constexpr, IS_SPLIT: tl.constexpr):
    """This program's outputs (BLOCK_N), rows of x (BLOCK_R) and its part [first, last) of K. Programs beside each other
    read the same weights."""
    blocks_r = tl.cdiv(M, BLOCK_R)
    col = (tl.program_id(0) // blocks_r * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    row = (tl.program_id(0) % blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    if IS_SPLIT:
        first = tl.program_id(1) * CHUNK
        last = tl.minimum(first + CHUNK, K)
    else:
        first = 0
        last = K
    return col, row, first, last


@triton.jit
def _finish(total, y, bias, col, row, M, N, IS_SPLIT: tl.constexpr):
    """The sums (BLOCK_N, BLOCK_R) to y (M, N), rounded once; a chunk's alone to its (M, N) of fp32."""
    inside = (col < N)[:, None] & (row < M)[None, :]
    at = row[None, :] * N + col[:, None]
    if IS_SPLIT:
        at += tl.program_id(1).to(tl.int64) * M * N
    elif bias is not None:
        total += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, weight, bias, y, M, N, K, x_row, weight_row, weight_depth,
    TYPE: tl.constexpr, IS_SPLIT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Float weights. TYPE: of the products' operands. In fp32 a block's sums are added to those before it by a product
    with 1, or the compiler would go on from them: one long sum, twice as far from the exact one."""
    col, row, first, last = _place(M, N, K, BLOCK_N, BLOCK_R, CHUNK, IS_SPLIT)
    k = tl.arange(0, BLOCK_K)
    of_w = weight + col[:, None] * weight_row
    of_x = x + row[None, :] * x_row
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    one = tl.where(M > 0, 1.0, 0.0)
    for begin in range(first, last, CHUNK):
        end = tl.minimum(begin + CHUNK, K)
        part = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(begin, end, BLOCK_K):
            at = tl.cast(start, tl.int64) + k
            w = tl.load(of_w + at[None, :] * weight_depth, mask=(col < N)[:, None] & (at < K)[None, :], other=0.0)
            v = tl.load(of_x + at[:, None], mask=(row < M)[None, :] & (at < K)[:, None], other=0.0)
            if TYPE == tl.float32:  # noqa: SIM300
                part += tl.dot(w.to(TYPE), v.to(TYPE), input_precision="ieee") * one
            else:
                part = tl.dot(w.to(TYPE), v.to(TYPE), part, input_precision="ieee")
        total += part
    _finish(total, y, bias, col, row, M, N, IS_SPLIT)


@triton.jit
def _centred(nibbles, TYPE: tl.constexpr):
    """4-bit q as q - 8. Numbers of 16 bits by way of one whose last bits are q: a conversion would take longer."""
    if TYPE == tl.bfloat16:  # noqa: SIM300
        return (nibbles.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif TYPE == tl.float16:  # noqa: SIM300
        return (nibbles.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        return nibbles.to(TYPE) - 8.0


@triton.jit
def _rounded(low, high):
    """Halves (16, BLOCK_R) of a group as activations="int8" sees them: scale (BLOCK_R), whole numbers. Page's rules."""
    amax = tl.maximum(tl.max(tl.abs(low), 0), tl.max(tl.abs(high), 0))
    wild = tl.max(((tl.abs(low) < float("inf")) & (tl.abs(high) < float("inf"))).to(tl.int32) ^ 1, 0) > 0
    usable = (amax >= 2.0**-120) & (wild == 0)
    amax = tl.where(usable, amax, 1.0)
    scale = tl.where(usable, tl.div_rn(amax, 127.0), tl.where(wild, float("nan"), 0.0))
    factor = tl.where(usable, tl.div_rn(127.0, amax), 0.0)[None, :]
    low, high = tl.where(usable[None, :], low, 0.0), tl.where(usable[None, :], high, 0.0)
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even
    return scale, (low * factor + ROUND) - ROUND, (high * factor + ROUND) - ROUND


@triton.jit(do_not_specialize=["M"])
def _linear_quantised_kernel(
    x, packed, scales, bias, y, M, N, K, x_row, panel_bytes,
    TYPE: tl.constexpr, HALVES: tl.constexpr, QUADS: tl.constexpr, IS_INT8: tl.constexpr,
    IS_SPLIT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Blocks of 32 in panels of 16 rows (gptfast/quantize.py), `scales` the same memory as fp16. A group's products are
    of the stored whole numbers, which are exact in 16 bits; its sums are multiplied by the scale in fp32. Products with
    Q4_1's minimum need the sum of x: a product with ones, whose order no tile changes."""
    col, row, first, last = _place(M, N, K, BLOCK_N, BLOCK_R, CHUNK, IS_SPLIT)
    HEAD: tl.constexpr = 32 * HALVES
    BLOCK: tl.constexpr = HEAD + 64 * QUADS
    k = tl.arange(0, 16)
    there = (col < N)[:, None] & (k >= 0)[None, :]
    of_q = packed + (col // 16 * panel_bytes + HEAD + col % 16 * 4)[:, None] + (k // 4 * 64 + k % 4)[None, :]
    of_d = scales + col // 16 * (panel_bytes // 2) + col % 16
    of_x = x + row[None, :] * x_row + k[:, None]
    known = (row < M)[None, :] & (k >= 0)[:, None]
    ones = tl.full((BLOCK_N, 16), 1.0, TYPE)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for begin in range(first, last, CHUNK):
        end = tl.minimum(begin + CHUNK, K)
        part = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(begin, end, 32):
            group = tl.cast(start // 32, tl.int64) * BLOCK
            low = tl.load(of_x + start, mask=known, other=0.0)
            high = tl.load(of_x + start + 16, mask=known, other=0.0)
            q = tl.load(of_q + group, mask=there, other=0)
            d = tl.load(of_d + group // 2, mask=col < N, other=0.0).to(tl.float32)[:, None]
            if QUADS == 4:
                first_half, second_half = _centred(q & 15, TYPE), _centred(q >> 4, TYPE)
            else:
                first_half = (q.to(tl.float32) - 128.0).to(TYPE)
                second_half = (tl.load(of_q + group + 256, mask=there, other=0).to(tl.float32) - 128.0).to(TYPE)
            scale = tl.full((BLOCK_R,), 1.0, tl.float32)
            if IS_INT8:
                scale, low, high = _rounded(low.to(tl.float32), high.to(tl.float32))
                d *= scale[None, :]
            low, high = low.to(TYPE), high.to(TYPE)
            dots = tl.dot(first_half, low, input_precision="ieee")
            dots = tl.dot(second_half, high, dots, input_precision="ieee")
            part += dots * d
            if HALVES == 2:
                sums = tl.dot(ones, low, input_precision="ieee")
                sums = tl.dot(ones, high, sums, input_precision="ieee")
                m = tl.load(of_d + group // 2 + 16, mask=col < N, other=0.0).to(tl.float32)[:, None]
                if IS_INT8:
                    m *= scale[None, :]
                part += sums * (m + 8.0 * d)
        total += part
    _finish(total, y, bias, col, row, M, N, IS_SPLIT)


@triton.jit(do_not_specialize=["M"])
def _linear_merge_kernel(partial, bias, y, M, N, chunks, BLOCK: tl.constexpr):
    """y (M, N) = the sums of partial (chunks, M, N) over the chunks in order + bias."""
    row = tl.program_id(1).to(tl.int64)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(chunks):
        total += tl.load(partial + (tl.cast(chunk, tl.int64) * M + row) * N + col, mask=col < N, other=0.0)
    if bias is not None:
        total += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + col, total.to(y.dtype.element_ty), mask=col < N)


def supports(x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, **_: Any) -> str | None:
    if isinstance(weight, PackedWeight):
        return "the weight is packed for the CPU's kernels; PackedWeight.unpack() gives it back"
    if isinstance(weight, QuantizedWeight):
        return elsewhere(weight.packed) or unsupported(x, bias)
    return unsupported(x, weight, bias, backward=True)


def supports_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias, backward=True)


def supports_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(dy, x, weight, bias, backward=True)


def linear(
    x: Tensor, weight: Tensor | QuantizedWeight, bias: Tensor | None, activations: str = "exact", **_: Any
) -> Tensor:
    (N, K), M = weight.shape, x[..., 0].numel()
    y = empty((*x.shape[:-1], N), x.dtype, x)
    x, x_row = rows(x)
    bias = None if bias is None else bias.contiguous()
    if isinstance(weight, QuantizedWeight):
        operands = torch.bfloat16 if activations == "int8" else x.dtype
        tile = tiles.linear_quantised(M, operands.itemsize, KINDS[weight.kind].halves == 2, arch(x))
    else:
        operands = x.dtype if x.dtype == weight.dtype else torch.float32
        tile = tiles.linear(M, operands.itemsize, arch(x))
    blocks, CHUNK = tile.blocks, tile.blocks["CHUNK"]
    chunks = cdiv(K, CHUNK)
    split = chunks > 1 and M <= tiles.SPLIT_ROWS
    out = empty((chunks, M, N), torch.float32, x) if split else y
    grid = cdiv(N, blocks["BLOCK_N"]) * cdiv(M, blocks["BLOCK_R"]), chunks if split else 1
    given = None if split else bias, out, M, N, K, x_row
    named = {"TYPE": TYPES[operands], "IS_SPLIT": split, "tile": tile}
    if isinstance(weight, QuantizedWeight):
        kind = KINDS[weight.kind]
        named |= {"HALVES": kind.halves, "QUADS": kind.quads, "IS_INT8": activations == "int8"}
        scales = weight.packed.view(torch.float16)
        panel = K // GROUP * PANEL * kind.block
        launch(_linear_quantised_kernel, grid, x, weight.packed, scales, *given, panel, **named)
    else:
        launch(_linear_kernel, grid, x, weight, *given, *weight.stride(), **named)
    if split:
        merge = tiles.linear_merge(N)
        launch(_linear_merge_kernel, (cdiv(N, merge.blocks["BLOCK"]), M), out, bias, y, M, N, chunks, tile=merge)
    return y


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x, weight, bias)


def linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, laid out as the weight is, and dbias; those that nobody wants are empty."""
    (N, K), dtype = weight.shape, x.dtype if x.dtype == weight.dtype else torch.float32
    of_y, of_x = dy.reshape(-1, N).to(dtype), x.reshape(-1, K).to(dtype)
    dx = dweight = dbias = x.new_empty(0)
    if wants_x:
        dx = product(of_y, weight.to(dtype), empty(of_x.shape, x.dtype, x)).view(x.shape)
    if wants_weight and weight.stride(0) == 1 < N:
        dweight = product(of_x.t(), of_y, empty((K, N), weight.dtype, x)).t()
    elif wants_weight:
        dweight = product(of_y.t(), of_x, empty((N, K), weight.dtype, x))
    if bias is not None:
        dbias = empty((N,), bias.dtype, x)
        column_sums(of_y.float()[None].contiguous(), dbias[None])
    return dx, dweight, dbias
