"""The backward of layer_norm and rms_norm: gptfast/ops/norm_gradients.py has the formulas.

A program takes a chunk of rows, whose number depends on the shape alone, and keeps the chunk's sums for the gradients
of weight and bias in registers. Rows that are too wide for that are read twice: for the two means that each row's
gradient needs, then by blocks of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, blocks, cdiv, count_rows, empty, launch, rows, tiles
from gptfast.kernels.triton.philox import UNSPECIALISED, dropout_arguments, kept
from gptfast.kernels.triton.sums import column_sums

COUNTS = ["N", "chunk", "block"]  # of rows: a row's result is that of one code, however many there are


@triton.jit
def _normal(s, mean, rstd, row, inside_row, IS_CENTRED: tl.constexpr):
    """A row's s, centred and scaled, and its 1 / sqrt(variance + eps)."""
    r = tl.load(rstd + row, mask=inside_row, other=0.0)
    if IS_CENTRED:
        s = s - tl.load(mean + row, mask=inside_row, other=0.0)
    return s * r, r


@triton.jit
def _store_gradients(
    ds, dsum, dx, dresidual, dsum_start, start, col, inside, seed_low, seed_high, stream_id, drop_below, keep_scale,
    HAS_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    if dsum is not None:
        ds += tl.load(dsum + dsum_start + col, mask=inside, other=0.0).to(tl.float32)
    if dresidual is not None:
        tl.store(dresidual + start + col, ds.to(dresidual.dtype.element_ty), mask=inside)
    if HAS_DROPOUT:
        keep = kept(start, col, seed_low, seed_high, stream_id, drop_below, IS_BY_FOURS, BLOCK_R, BLOCK_C)
        ds = tl.where(keep, ds * keep_scale, 0.0)
    tl.store(dx + start + col, ds.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*UNSPECIALISED, *COUNTS])
def _layer_norm_backward_kernel(
    dy, dsum, s, weight, mean, rstd, dx, dresidual, dweight, dbias,
    N, C, chunk, block, block_stride, s_stride, dy_stride, dsum_stride,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    IS_CENTRED: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`chunk` rows, BLOCK_R at a time; dweight and dbias (chunks, C) are this chunk's sums."""
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, N)
    col = tl.arange(0, BLOCK_C)[None, :]
    w = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    weights = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    biases = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for at in tl.range(first, end, BLOCK_R, num_stages=STAGES):
        row = (at + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        inside = (row < end) & (col < C)
        d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        source = s + row // block * block_stride + row % block * s_stride + col
        normal, r = _normal(
            tl.load(source, mask=inside, other=0.0).to(tl.float32), mean, rstd, row, row < end, IS_CENTRED
        )
        if dweight is not None:
            weights += d * normal
        if dbias is not None:
            biases += d
        g = d * w
        ds = g - normal * (tl.sum(g * normal, 1)[:, None] / C)
        if IS_CENTRED:
            ds -= tl.sum(g, 1)[:, None] / C
        _store_gradients(
            ds * r, dsum, dx, dresidual, row * dsum_stride, row * C, col, inside,
            seed_low, seed_high, stream_id, drop_below, keep_scale, HAS_DROPOUT, IS_BY_FOURS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    out = tl.program_id(0).to(tl.int64) * C + tl.arange(0, BLOCK_C)
    within = tl.arange(0, BLOCK_C) < C
    if dweight is not None:
        tl.store(dweight + out, tl.sum(weights, 0), mask=within)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(biases, 0), mask=within)


@triton.jit(do_not_specialize=COUNTS)
def _layer_norm_means_kernel(
    dy, s, weight, mean, rstd, means, N, C, block, block_stride, s_stride, dy_stride,
    IS_CENTRED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of one row the means of g * xhat and of g: means (2, N)."""
    row = tl.program_id(0).to(tl.int64)
    source = s + row // block * block_stride + row % block * s_stride
    products = tl.zeros((BLOCK_C,), tl.float32)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)
        inside = col < C
        d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        g = d * tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
        normal, _ = _normal(
            tl.load(source + col, mask=inside, other=0.0).to(tl.float32), mean, rstd, row, row < N, IS_CENTRED
        )
        products += g * normal
        sums += g
    tl.store(means + row, tl.sum(products, 0) / C)
    tl.store(means + N + row, tl.sum(sums, 0) / C)


@triton.jit(do_not_specialize=[*UNSPECIALISED, *COUNTS])
def _layer_norm_backward_wide_kernel(
    dy, dsum, s, weight, mean, rstd, means, dx, dresidual, dweight, dbias,
    N, C, chunk, block, block_stride, s_stride, dy_stride, dsum_stride,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    IS_CENTRED: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`chunk` rows, BLOCK_R at a time, and BLOCK_C of their columns."""
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, N)
    col = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    w = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    weights = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    biases = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for at in tl.range(first, end, BLOCK_R, num_stages=STAGES):
        row = (at + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        inside = (row < end) & (col < C)
        d = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        source = s + row // block * block_stride + row % block * s_stride + col
        normal, r = _normal(
            tl.load(source, mask=inside, other=0.0).to(tl.float32), mean, rstd, row, row < end, IS_CENTRED
        )
        weights += d * normal
        biases += d
        ds = d * w - normal * tl.load(means + row, mask=row < end, other=0.0)
        if IS_CENTRED:
            ds -= tl.load(means + N + row, mask=row < end, other=0.0)
        _store_gradients(
            ds * r, dsum, dx, dresidual, row * dsum_stride, row * C, col, inside,
            seed_low, seed_high, stream_id, drop_below, keep_scale, HAS_DROPOUT, IS_BY_FOURS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = tl.program_id(0).to(tl.int64) * C + cols
    if dweight is not None:
        tl.store(dweight + out, tl.sum(weights, 0), mask=cols < C)
    if dbias is not None:
        tl.store(dbias + out, tl.sum(biases, 0), mask=cols < C)


def normalise_backward(
    op: str, dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dropout_p: float,
    seed: int, stream: int, wants_residual: bool, wants_weight: bool, wants_bias: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual, dweight and dbias, empty where there is none."""
    N, C = count_rows(s), s.shape[-1]
    weight, centred = weight.contiguous(), op == "layer_norm"
    s, block, block_stride, s_stride = blocks(s)
    dy, dy_stride = rows(dy)
    dsum, dsum_stride = (None, 0) if dsum is None else rows(dsum)
    dx = empty(s.shape, s.dtype, s)
    dresidual = empty(s.shape, s.dtype, s) if wants_residual and dropout_p else None
    tile = tiles.layer_norm_backward(C, arch(s), dropout_p > 0)
    chunk = tiles.chunk_of(N, tile.blocks["BLOCK_R"])
    chunks, wanted = cdiv(N, chunk), wants_weight + wants_bias
    partial = empty((wanted, chunks, C), torch.float32, s)
    dweight, dbias = partial[0] if wants_weight else None, partial[-1] if wants_bias else None
    outputs = (dx, dresidual, dweight, dbias)
    numbers = (N, C, chunk, block, block_stride, s_stride, dy_stride, dsum_stride)
    more = dict(
        **dropout_arguments(dropout_p, seed, stream),
        IS_CENTRED=centred,
        HAS_DROPOUT=dropout_p > 0,
        IS_BY_FOURS=C % 4 == 0 and tile.blocks["BLOCK_C"] >= 4,
        tile=tile,
    )
    given = (dy, dsum, s, weight, mean if centred else None, rstd)
    if tile.blocks["BLOCK_C"] >= C:
        launch(_layer_norm_backward_kernel, (chunks,), *given, *outputs, *numbers, **more)
    else:
        means = empty((2, N), torch.float32, s)
        launch(
            *(_layer_norm_means_kernel, (N,), dy, s, weight, mean if centred else None, rstd, means),
            *(N, C, block, block_stride, s_stride, dy_stride),
            IS_CENTRED=centred,
            tile=tiles.layer_norm_means(C, arch(s)),
        )
        grid = (chunks, cdiv(C, tile.blocks["BLOCK_C"]))
        launch(_layer_norm_backward_wide_kernel, grid, *given, means, *outputs, *numbers, **more)
    sums = (torch.empty if N else torch.zeros)(wanted, C, dtype=weight.dtype, device=s.device)
    if N and wanted:
        column_sums(partial, sums)
    nothing = s.new_empty(0)
    return (
        dx,
        nothing if dresidual is None else dresidual,
        sums[0] if wants_weight else nothing,
        sums[-1] if wants_bias else nothing,
    )
