"""layer_norm, and what rms_norm shares with it.

A row that fits a program's registers is read once. A wider one is read twice: block by block for its mean and variance,
which are merged as Chan et al. do (Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979),
and again to be normalised; the second reading comes from the L2 cache. The backward: layer_norm_backward.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, blocks, cdiv, count_rows, empty, launch, rows, tiles, unsupported
from gptfast.kernels.triton.layer_norm_backward import COUNTS, normalise_backward
from gptfast.kernels.triton.philox import UNSPECIALISED, dropout_arguments, kept


@triton.jit
def _summed(
    x, residual, x_start, residual_start, start, col, inside,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    HAS_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """x, where dropout keeps it, + residual, in fp32; 0 outside."""
    s = tl.load(x + x_start + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        keep = kept(start, col, seed_low, seed_high, stream_id, drop_below, IS_BY_FOURS, BLOCK_R, BLOCK_C)
        s = tl.where(keep, s * keep_scale, 0.0)
    if residual is not None:
        s += tl.load(residual + residual_start + col, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def _scaled(normal, weight, bias, col, C):
    y = normal * tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=[*UNSPECIALISED, *COUNTS])
def _layer_norm_kernel(
    x, residual, weight, bias, y, total, mean, rstd,
    N, C, block, block_stride, x_stride, residual_stride, eps,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    IS_CENTRED: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of N, each within BLOCK_C columns."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    col = tl.arange(0, BLOCK_C)[None, :]
    inside = (row < N) & (col < C)
    start = row * C
    s = _summed(
        x, residual, row // block * block_stride + row % block * x_stride, row * residual_stride, start, col, inside,
        seed_low, seed_high, stream_id, drop_below, keep_scale, HAS_DROPOUT, IS_BY_FOURS, BLOCK_R, BLOCK_C,
    )  # fmt: skip
    if total is not None:
        tl.store(total + start + col, s.to(total.dtype.element_ty), mask=inside)
    if IS_CENTRED:
        m = tl.sum(s, 1)[:, None] / C
        s = tl.where(col < C, s - m, 0.0)
        if mean is not None:
            tl.store(mean + row, m, mask=row < N)
    r = tl.rsqrt(tl.sum(s * s, 1)[:, None] / C + eps)
    if rstd is not None:
        tl.store(rstd + row, r, mask=row < N)
    tl.store(y + start + col, _scaled(s * r, weight, bias, col, C).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*UNSPECIALISED, *COUNTS])
def _layer_norm_wide_kernel(
    x, residual, weight, bias, y, total, mean, rstd,
    N, C, block, block_stride, x_stride, residual_stride, eps,
    seed_low, seed_high, stream_id, drop_below, keep_scale,
    IS_CENTRED: tl.constexpr, HAS_DROPOUT: tl.constexpr, IS_BY_FOURS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row, BLOCK_C columns at a time."""
    row = (tl.program_id(0) + tl.zeros((1, 1), tl.int32)).to(tl.int64)
    x_start, residual_start, start = (
        row // block * block_stride + row % block * x_stride,
        row * residual_stride,
        row * C,
    )
    m = tl.zeros((1, 1), tl.float32)
    squares = tl.zeros((1, 1), tl.float32)  # about the mean of the columns so far; about 0 where nothing is centred
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)[None, :]
        inside = col < C
        s = _summed(
            x, residual, x_start, residual_start, start, col, inside,
            seed_low, seed_high, stream_id, drop_below, keep_scale, HAS_DROPOUT, IS_BY_FOURS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if total is not None:
            tl.store(total + start + col, s.to(total.dtype.element_ty), mask=inside)
        if IS_CENTRED:
            count = tl.minimum(C - first, BLOCK_C).to(tl.float32)
            own = tl.sum(s, 1)[:, None] / count
            s = tl.where(inside, s - own, 0.0)
            apart = own - m
            m += apart * (count / (first + count))
            squares += apart * apart * (first * count / (first + count))
        squares += tl.sum(s * s, 1)[:, None]
    r = tl.rsqrt(squares / C + eps)
    if mean is not None:
        tl.store(mean + row, m)
    if rstd is not None:
        tl.store(rstd + row, r)
    for first in range(0, C, BLOCK_C):
        col = first + tl.arange(0, BLOCK_C)[None, :]
        inside = col < C
        s = _summed(
            x, residual, x_start, residual_start, start, col, inside,
            seed_low, seed_high, stream_id, drop_below, keep_scale, HAS_DROPOUT, IS_BY_FOURS, BLOCK_R, BLOCK_C,
        )  # fmt: skip
        tl.store(y + start + col, _scaled((s - m) * r, weight, bias, col, C).to(y.dtype.element_ty), mask=inside)


def supports(x: Tensor, weight: Tensor, residual: Tensor | None, bias: Tensor | None = None, **_: Any) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32):
        return f"weight must have x's dtype or be float32, not {str(weight.dtype).removeprefix('torch.')}"
    return unsupported(x, weight, bias, residual, backward=True)


def supports_layer_norm_backward(s: Tensor, weight: Tensor, **_: Any) -> str | None:
    return supports(s, weight, None)


def layer_norm(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return normalise("layer_norm", **arguments)


def layer_norm_forward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return normalise_forward("layer_norm", **arguments)


def layer_norm_backward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return normalise_backward("layer_norm", **arguments)


def normalise(op: str, x: Tensor, residual: Tensor | None, **arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    """y, or (y, sum)."""
    y = empty(x.shape, x.dtype, x)
    total = None if residual is None else empty(x.shape, x.dtype, x)
    _normalise(op, x, residual, y=y, total=total, mean=None, rstd=None, **arguments)
    return y if total is None else (y, total)


def normalise_forward(
    op: str, x: Tensor, residual: Tensor | None, dropout_p: float, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, sum, mean and rstd, empty where there is none: what the backward reads too."""
    y = empty(x.shape, x.dtype, x)
    total = empty(x.shape, x.dtype, x) if residual is not None or dropout_p else None
    rstd = empty(x.shape[:-1], torch.float32, x)
    mean = torch.empty_like(rstd) if op == "layer_norm" else None
    _normalise(op, x, residual, y=y, total=total, mean=mean, rstd=rstd, dropout_p=dropout_p, **arguments)
    return y, x.new_empty(0) if total is None else total, rstd.new_empty(0) if mean is None else mean, rstd


def _normalise(
    op: str, x: Tensor, residual: Tensor | None, *, weight: Tensor, eps: float, dropout_p: float, seed: int,
    stream: int, y: Tensor, total: Tensor | None, mean: Tensor | None, rstd: Tensor | None, bias: Tensor | None = None,
) -> None:  # fmt: skip
    N, C = count_rows(x), x.shape[-1]
    x, block, block_stride, x_stride = blocks(x)
    residual, residual_stride = (None, 0) if residual is None else rows(residual)
    tile = tiles.layer_norm(C, arch(x))
    fits = tile.blocks["BLOCK_C"] >= C
    launch(
        _layer_norm_kernel if fits else _layer_norm_wide_kernel,
        (cdiv(N, tile.blocks["BLOCK_R"]),),
        *(x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), y, total, mean, rstd),
        *(N, C, block, block_stride, x_stride, residual_stride, eps),
        **dropout_arguments(dropout_p, seed, stream),
        IS_CENTRED=op == "layer_norm",
        HAS_DROPOUT=dropout_p > 0,
        IS_BY_FOURS=C % 4 == 0 and tile.blocks["BLOCK_C"] >= 4,
        tile=tile,
    )
