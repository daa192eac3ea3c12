from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, as_rows, empty, maker, pointer, prepare, rows, threads, unsupported
from gptfast.quantize import PackedWeight, QuantizedWeight

# Of a weight stored as (depth, cols), used from where it lies: chunks of depth and, at most, of cols; rows of a launch,
# for its sums take as much room for each of them.
CHUNK, BAND, ROWS = 96, 4096, 16
# Of a launch for a product of training: rows or columns, and depth, whole chunks of the op page's 384.
LENGTH, DEPTH = 4096, 10 * 384
KEPT = 64 << 20  # bytes that a thread keeps for its next product's operands: fresh memory would cost a tenth of one
PRODUCTS = 16  # take as long as an element that is streamed through: of threads()
OWN = 8192  # so few elements of x, in up to 8 rows, every worker lays out for itself: sharing them would cost more


def supports(x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, **_) -> str | None:
    if x.numel() == 0 or weight.shape[0] == 0:
        return "there is nothing to compute"
    if isinstance(weight, Tensor):
        return unsupported(x, weight, bias, backward=True)
    if weight.packed.device.type != "cpu":
        return f"the weight is on {weight.packed.device}, and this backend's are on the CPU"
    return unsupported(x, bias)


def linear(**arguments: Any) -> Tensor:
    return prepare_linear(**arguments)(**arguments)


def prepare_linear(
    x: Tensor, weight: Tensor | QuantizedWeight | PackedWeight, bias: Tensor | None, activations: str
) -> Callable[..., Tensor]:
    (cols, depth), dtype = weight.shape, x.dtype
    count, x_stride = x.numel() // depth, rows(x)[1]
    weight_fit, weight_stride = attrgetter("packed"), 0
    if isinstance(weight, Tensor):
        weight_fit = None if weight.stride(1) == 1 else Tensor.contiguous
        weight_stride = depth if weight_fit else weight.stride(0)
        kernel, code = "linear", DTYPES[weight.dtype]
    elif isinstance(weight, PackedWeight):
        kernel, code = "linear_packed", DTYPES[weight.dtype]
    else:
        kernel, code = "linear_int8" if activations == "int8" else "linear_exact", weight.code
    shared = count > 8 or x.numel() > OWN
    workspace = count * ((depth + 63) & -64) * 4 if shared else 0
    if isinstance(weight, Tensor) and weight.stride(0) == 1 and weight.stride(1) >= cols > 1:
        if count > ROWS:
            return _by_rows
        weight_fit, weight_stride = None, -weight.stride(1)
        workspace = -(-depth // CHUNK) * count * -(-cols // BAND) * BAND * 4
    inputs = {"x": ("x", as_rows), "weight": ("weight", weight_fit)}
    bias_dtype = 0
    if bias is not None:
        fits = bias.dtype in (dtype, torch.float32) and bias.is_contiguous()
        inputs["bias"] = "bias", None if fits else lambda b: b.float().contiguous()
        bias_dtype = DTYPES[bias.dtype] if fits else DTYPES[torch.float32]
    return prepare(
        kernel,
        threads(cols * depth * -(-count // PRODUCTS)),
        {"y": ((*x.shape[:-1], cols), dtype)},
        inputs,
        dict(x=x, weight=weight, bias=bias),
        workspace=workspace,
        rows=count,
        cols=cols,
        depth=depth,
        x_stride=x_stride,
        weight_stride=weight_stride,
        dtype=DTYPES[dtype],
        format=code,
        bias_dtype=bias_dtype,
        before=0,
    )


def _by_rows(x: Tensor, **arguments: Any) -> Tensor:
    """The op for a few rows of x after another; each row's result is the same as in any other company."""
    y = [linear(x=part, **arguments) for part in x.reshape(-1, x.shape[-1]).split(ROWS)]
    return torch.cat(y).view(*x.shape[:-1], -1)


def supports_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias, backward=True)


def linear_forward(**arguments: Any) -> Tensor:
    return prepare_linear_forward(**arguments)(**arguments)


def prepare_linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    shape, dtype = (*x.shape[:-1], weight.shape[0]), x.dtype
    once = _once(_matrix(x), weight.t(), bias, shape, dtype)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if once:
            return once(as_rows(x), weight, bias)[0]
        return multiply(_matrix(x), weight.t(), bias)[0].to(dtype).view(shape)

    return run


def supports_linear_backward(x: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, weight, bias, backward=True)


def linear_backward(**arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return prepare_linear_backward(**arguments)(**arguments)


def prepare_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, bias: Tensor | None
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """dx, dweight, laid out as the weight is, and dbias; those that nobody wants are empty."""
    rows, d, wants_bias = _matrix(x), _matrix(dy).contiguous(), bias is not None
    turned = wants_weight and weight.stride(0) == 1 < weight.shape[0]
    inwards = _once(d, weight, None, x.shape, x.dtype) if wants_x else None
    if turned:
        outwards = _once(rows.t(), d, None, None, weight.dtype, column_sums=wants_bias)
    else:
        outwards = _once(d.t(), rows, None, None, weight.dtype, row_sums=wants_bias) if wants_weight else None

    def run(
        dy: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, dy, sums = as_rows(x), as_rows(dy).contiguous(), None
        dx = dweight = dbias = x.new_empty(0)
        if inwards:
            dx = inwards(dy, weight, None)[0]
        elif wants_x:
            dx = multiply(_matrix(dy), weight)[0].to(x.dtype).view(x.shape)
        if turned:
            made, sums = (
                outwards(rows, dy, None)
                if outwards
                else multiply(_matrix(rows).t(), _matrix(dy), column_sums=wants_bias)
            )
            dweight = made.to(weight.dtype).t()
        elif outwards:
            dweight, sums = outwards(dy, rows, None)
        elif wants_weight or wants_bias:
            of = _matrix(rows) if wants_weight else _matrix(rows)[:, :1]
            made, sums = multiply(_matrix(dy).t(), of, row_sums=wants_bias)
            dweight = made.to(weight.dtype) if wants_weight else dweight
        if bias is not None and sums is not None:
            dbias = sums.to(bias.dtype)
        return dx, dweight, dbias

    return run


def multiply(
    a: Tensor, b: Tensor, bias: Tensor | None = None, *, row_sums: bool = False, column_sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """a (M, K) b (K, N) + bias (N) in fp32, and the sums over K of a's rows, (M), or of b's columns, (N), if asked for.

    What is summed must be contiguous across the sums. Any of the storage dtypes; the order of each sum depends on K
    alone.
    """
    a, b = _sided(a), _sided(b)
    (M, K), N = a.shape, b.shape[1]
    c = empty((M, N), torch.float32)
    sums = torch.zeros(M if row_sums else N, dtype=torch.float32) if row_sums or column_sums else None
    if K == 0 or M == 0 or N == 0:
        return c.zero_() if bias is None else c.copy_(bias.expand(M, N)), sums
    bias = None if bias is None else bias.float().contiguous()
    a_row, a_depth, b_depth, b_col = _strides(a, b, row_sums, column_sums)
    width, workers = _width(M), threads(M * N * -(-K // PRODUCTS))
    for m in range(0, M, LENGTH):
        for n in range(0, N, width):
            rows, cols = min(LENGTH, M - m), min(width, N - n)
            for k in range(0, K, DEPTH):
                depth = min(DEPTH, K - k)
                wanted = sums is not None and (n == 0 if row_sums else m == 0)
                last = bias is not None and k + depth == K
                room = _room(4 * depth * (rows + cols + 128))
                _cpu.product(
                    workers,
                    c=c.data_ptr() + 4 * (m * N + n),
                    sums=sums.data_ptr() + 4 * (m if row_sums else n) if wanted and sums is not None else 0,
                    workspace=room.data_ptr(),
                    a=a.data_ptr() + a.element_size() * (m * a_row + k * a_depth),
                    b=b.data_ptr() + b.element_size() * (k * b_depth + n * b_col),
                    bias=pointer(bias) + 4 * n if last else 0,
                    **dict(rows=rows, cols=cols, depth=depth, c_stride=N),
                    **dict(a_row=a_row, a_depth=a_depth, b_depth=b_depth, b_col=b_col),
                    **dict(a_dtype=DTYPES[a.dtype], b_dtype=DTYPES[b.dtype], rounded_dtype=0),
                    **dict(of_b=int(column_sums), add=int(k > 0)),
                )
    return c, sums


def _once(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    row_sums: bool = False,
    column_sums: bool = False,
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None:
    """multiply() prepared for all operands that lie as these do, its product in this shape and dtype; None where it
    takes more than one launch. What it is called with may have other shapes, if it starts where the matrices do."""
    (M, K), N = a.shape, b.shape[1]
    if not (0 < M <= LENGTH and 0 < N <= _width(M) and 0 < K <= DEPTH) or 1 not in a.stride() or 1 not in b.stride():
        return None
    a_row, a_depth, b_depth, b_col = _strides(a, b, row_sums, column_sums)
    sizes = dict(rows=M, cols=N, depth=K, c_stride=N, a_row=a_row, a_depth=a_depth, b_depth=b_depth, b_col=b_col)
    types = dict(a_dtype=DTYPES[a.dtype], b_dtype=DTYPES[b.dtype], rounded_dtype=DTYPES[dtype])
    types |= dict(of_b=int(column_sums), add=0)
    c = "c" if dtype == torch.float32 else "rounded"
    launch = _cpu.Prepared("product", (c, "sums", "workspace", "a", "b", "bias"), sizes | types)
    make, summed = maker((M, N) if shape is None else shape, dtype), M if row_sums else N if column_sums else 0
    workers, room = threads(M * N * -(-K // PRODUCTS)), 4 * K * (M + N + 128)

    def run(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        c, sums = make(), torch.empty(summed) if summed else None
        bias = None if bias is None else bias.float().contiguous()
        launch(workers, c.data_ptr(), pointer(sums), _room(room).data_ptr(), a.data_ptr(), b.data_ptr(), pointer(bias))
        return c, sums

    return run


def _width(rows: int) -> int:
    """Of so many rows, the columns of a launch."""
    return max(LENGTH, LENGTH * LENGTH // rows)


def _strides(a: Tensor, b: Tensor, row_sums: bool, column_sums: bool) -> tuple[int, int, int, int]:
    """a's and b's. What is summed must be contiguous across the sums: of a single one any stride is, and some tensors
    have another one there."""
    (a_row, a_depth), (b_depth, b_col) = a.stride(), b.stride()
    return (
        1 if row_sums and a.shape[0] == 1 else a_row,
        a_depth,
        b_depth,
        1 if column_sums and b.shape[1] == 1 else b_col,
    )


def _sided(t: Tensor) -> Tensor:
    """A matrix with one stride of 1."""
    return t if 1 in t.stride() else t.contiguous()


class _Own(threading.local):
    room = torch.empty(0, dtype=torch.uint8)


_own = _Own()


def _room(nbytes: int) -> Tensor:
    """Where operands are packed, undefined bytes."""
    if _own.room.shape[0] >= nbytes:
        return _own.room
    room = empty((nbytes,), torch.uint8)
    if nbytes <= KEPT:
        _own.room = room
    return room


def _matrix(x: Tensor) -> Tensor:
    return as_rows(x).view(-1, x.shape[-1]) if x.numel() else x.reshape(-1, x.shape[-1])
