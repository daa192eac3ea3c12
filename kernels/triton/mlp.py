"""bias_gelu, swiglu and geglu: elementwise, so a program may take any piece of any rows. Formulas of the gradients:
gptfast/ops/mlp_gradients.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import arch, cdiv, count_rows, empty, launch, rows, tiles, unsupported
from gptfast.kernels.triton.sums import column_sums
from gptfast.kernels.triton.tiles import Tile


@triton.jit
def _sigmoid_parts(z):
    """p = 1 / (1 + exp(-z)) and p (1 - p), which cancels nothing and overflows nowhere."""
    t = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + t)
    return tl.where(z < 0, t * r, r), t * r * r


@triton.jit
def _gelu_parts(x, IS_TANH: tl.constexpr):
    """p with gelu(x) = x p, and gelu'(x). (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u))."""
    if IS_TANH:
        K: tl.constexpr = 1.5957691216057308  # 2 sqrt(2/pi)
        square = x * x
        p, slope = _sigmoid_parts(K * x * (1.0 + 0.044715 * square))
        return p, p + x * slope * (K * (1.0 + 0.134145 * square))
    else:
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return p, p + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _silu_parts(x):
    """p with silu(x) = x p, and silu'(x)."""
    p, slope = _sigmoid_parts(x)
    return p, p + x * slope


@triton.jit
def _place(N, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's rows (BLOCK_R, 1) and columns (1, BLOCK_C), and which of them there are."""
    across = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // across * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
    col = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, col, (row < N) & (col < C)


@triton.jit(do_not_specialize=["N"])
def _bias_gelu_kernel(x, bias, y, N, C, x_stride, IS_TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    row, col, inside = _place(N, C, BLOCK_R, BLOCK_C)
    s = tl.load(x + row * x_stride + col, mask=inside).to(tl.float32)
    if bias is not None:
        s += tl.load(bias + col, mask=col < C).to(tl.float32)
    p, _ = _gelu_parts(s, IS_TANH)
    tl.store(y + row * C + col, (s * p).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _gated_kernel(
    gate, up, y, N, C, gate_stride, up_stride,
    IS_SILU: tl.constexpr, IS_TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _place(N, C, BLOCK_R, BLOCK_C)
    g = tl.load(gate + row * gate_stride + col, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside).to(tl.float32)
    if IS_SILU:
        p, _ = _silu_parts(g)
    else:
        p, _ = _gelu_parts(g, IS_TANH)
    tl.store(y + row * C + col, (g * p * u).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def _gated_backward_kernel(
    dy, gate, up, dgate, dup, N, C, dy_stride, gate_stride, up_stride,
    IS_SILU: tl.constexpr, IS_TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, col, inside = _place(N, C, BLOCK_R, BLOCK_C)
    d = tl.load(dy + row * dy_stride + col, mask=inside).to(tl.float32)
    g = tl.load(gate + row * gate_stride + col, mask=inside).to(tl.float32)
    u = tl.load(up + row * up_stride + col, mask=inside).to(tl.float32)
    if IS_SILU:
        p, slope = _silu_parts(g)
    else:
        p, slope = _gelu_parts(g, IS_TANH)
    tl.store(dgate + row * C + col, (d * u * slope).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * C + col, (d * g * p).to(dup.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "chunk"])
def _bias_gelu_backward_kernel(
    dy, x, bias, dx, dbias, N, C, chunk, dy_stride, x_stride,
    IS_TANH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`chunk` rows, BLOCK_R at a time, and BLOCK_C columns; dbias (chunks, C) are this chunk's sums."""
    first = tl.program_id(0) * chunk
    end = tl.minimum(first + chunk, N)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    col = cols[None, :]
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for at in range(first, end, BLOCK_R):
        row = (at + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        inside = (row < end) & (col < C)
        s = tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            s += tl.load(bias + col, mask=col < C, other=0.0).to(tl.float32)
        _, slope = _gelu_parts(s, IS_TANH)
        ds = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32) * slope
        total += tl.where(inside, ds, 0.0)
        tl.store(dx + row * C + col, ds.to(dx.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + tl.program_id(0).to(tl.int64) * C + cols, tl.sum(total, 0), mask=cols < C)


def supports_bias_gelu(x: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, bias, backward=True)


def supports_bias_gelu_backward(x: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, bias, backward=True)


def supports_swiglu(gate: Tensor, up: Tensor, **_: Any) -> str | None:
    return unsupported(gate, up, backward=True)


supports_geglu = supports_swiglu_backward = supports_geglu_backward = supports_swiglu


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    y = empty(x.shape, x.dtype, x)
    N, C, tile = _layout(x, *(() if bias is None else (bias,)))
    (x, x_stride), bias = rows(x), None if bias is None else bias.contiguous()
    launch(_bias_gelu_kernel, _grid(N, C, tile), x, bias, y, N, C, x_stride, IS_TANH=approximate == "tanh", tile=tile)
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _gated(gate, up, IS_SILU=True, IS_TANH=False)


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    return _gated(gate, up, IS_SILU=False, IS_TANH=approximate == "tanh")


def _gated(gate: Tensor, up: Tensor, **kind: Any) -> Tensor:
    y = empty(gate.shape, gate.dtype, gate)
    N, C, tile = _layout(gate, up)
    (gate, gate_stride), (up, up_stride) = rows(gate), rows(up)
    launch(_gated_kernel, _grid(N, C, tile), gate, up, y, N, C, gate_stride, up_stride, **kind, tile=tile)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_backward(dy, gate, up, IS_SILU=True, IS_TANH=False)


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return _gated_backward(dy, gate, up, IS_SILU=False, IS_TANH=approximate == "tanh")


def _gated_backward(dy: Tensor, gate: Tensor, up: Tensor, **kind: Any) -> tuple[Tensor, Tensor]:
    dgate, dup = empty(gate.shape, gate.dtype, gate), empty(gate.shape, gate.dtype, gate)
    N, C, tile = _layout(gate, up, dy)
    (dy, dy_stride), (gate, gate_stride), (up, up_stride) = rows(dy), rows(gate), rows(up)
    launch(
        *(_gated_backward_kernel, _grid(N, C, tile), dy, gate, up, dgate, dup, N, C, dy_stride, gate_stride, up_stride),
        **kind,
        tile=tile,
    )
    return dgate, dup


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx, and dbias (empty where nobody wants it)."""
    N, C = count_rows(x), x.shape[-1]
    dx = empty(x.shape, x.dtype, x)
    (dy, dy_stride), (x, x_stride) = rows(dy), rows(x)
    tile = tiles.bias_gelu_backward(C, arch(x))
    chunk = tiles.bias_gelu_chunk(N, tile)
    chunks = cdiv(N, chunk)
    partial = empty((1, chunks, C), torch.float32, x) if wants_bias else None
    launch(
        *(_bias_gelu_backward_kernel, (chunks, cdiv(C, tile.blocks["BLOCK_C"])), dy, x),
        *(None if bias is None else bias.contiguous(), dx, partial, N, C, chunk, dy_stride, x_stride),
        IS_TANH=approximate == "tanh",
        tile=tile,
    )
    dbias = (torch.empty if N else torch.zeros)(C if wants_bias else 0, dtype=x.dtype, device=x.device)
    if partial is not None and N:
        column_sums(partial, dbias[None])
    return dx, dbias


def _layout(x: Tensor, *others: Tensor) -> tuple[int, int, Tile]:
    """Rows, columns and the tile; tensors that all lie without gaps are one row."""
    N, C = count_rows(x), x.shape[-1]
    if x.numel() and all(t.is_contiguous() and t.shape == x.shape for t in (x, *others)):
        N, C = 1, x.numel()
    return N, C, tiles.elementwise(C, arch(x))


def _grid(N: int, C: int, tile: Tile) -> tuple[int]:
    return (cdiv(N, tile.blocks["BLOCK_R"]) * cdiv(C, tile.blocks["BLOCK_C"]),)
