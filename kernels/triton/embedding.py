"""embedding: a program copies a piece of some rows; the backward adds up, row by row of the table, what took it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, elsewhere, empty, launch, rows, tiles, unsupported


@triton.jit(do_not_specialize=["N"])
def _embedding_kernel(
    ids, weight, positions, position_weight, out, N, C, weight_stride, position_stride,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // across * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    col = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (col < C)
    taken = tl.load(ids + row, mask=row < N, other=0)
    x = tl.load(weight + taken * weight_stride + col, mask=inside)
    if positions is not None:
        place = tl.load(positions + row, mask=row < N, other=0)
        p = tl.load(position_weight + place * position_stride + col, mask=inside)
        x = (x.to(tl.float32) + p.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * C + col, x, mask=inside)


@triton.jit
def _embedding_backward_kernel(
    dout, ids, ends, order, dweight, C, dout_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The places that took one row follow each other in `ids`, which is sorted; the first of them adds them all up."""
    first = tl.program_id(0)
    taken = tl.load(ids + first)
    before = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if taken != before:
        end = tl.load(ends + first)
        cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(first, end, BLOCK_R):
            place = start + tl.arange(0, BLOCK_R)
            row = tl.load(order + place, mask=place < end, other=0)
            inside = (place < end)[:, None] & (cols < C)[None, :]
            total += tl.load(dout + row[:, None] * dout_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dweight + taken * C + cols, tl.sum(total, 0).to(dweight.dtype.element_ty), mask=cols < C)


def supports(ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> str | None:
    return elsewhere(ids, positions) or unsupported(weight, position_weight, backward=True)


def supports_embedding_backward(dout: Tensor, **_: Any) -> str | None:
    return unsupported(dout)


def embedding(ids: Tensor, weight: Tensor, positions: Tensor | None, position_weight: Tensor | None) -> Tensor:
    N, C = ids.numel(), weight.shape[1]
    ids, (weight, weight_stride), position_stride = ids.contiguous(), rows(weight), 0
    if positions is not None and position_weight is not None:
        positions = positions.expand(ids.shape).contiguous()
        position_weight, position_stride = rows(position_weight)
    out = empty((*ids.shape, C), weight.dtype, weight)
    tile = tiles.elementwise(C, arch(weight))
    launch(
        *(_embedding_kernel, (cdiv(N, tile.blocks["BLOCK_R"]) * cdiv(C, tile.blocks["BLOCK_C"]),)),
        *(ids, weight, positions, position_weight, out, N, C, weight_stride, position_stride),
        tile=tile,
    )
    return out


def embedding_backward(dout: Tensor, ids: Tensor, count: int) -> Tensor:
    """dweight (count, C) of a table whose rows `ids`, of dout's leading shape, were taken."""
    C = dout.shape[-1]
    dweight = torch.zeros(count, C, dtype=dout.dtype, device=dout.device)
    dout, dout_stride = rows(dout)
    in_order, order = ids.reshape(-1).sort(stable=True)
    tile = tiles.embedding_backward(C, arch(dout))
    launch(
        *(_embedding_backward_kernel, (ids.numel() if C else 0, cdiv(C, tile.blocks["BLOCK_C"]))),
        *(dout, in_order, torch.searchsorted(in_order, in_order, right=True), order, dweight, C, dout_stride),
        tile=tile,
    )
    return dweight
