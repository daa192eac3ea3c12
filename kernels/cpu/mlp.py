from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, pointer, rows, threads, unsupported


def supports_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    return unsupported(x, bias)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    bias = None if bias is None else bias.contiguous()
    return _elementwise(_cpu.bias_gelu, x, pointer(bias), 0, tanh=approximate == "tanh")


def supports_swiglu(gate: Tensor, up: Tensor) -> str | None:
    return unsupported(gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    up, stride = rows(up)
    return _elementwise(_cpu.swiglu, gate, up.data_ptr(), stride)


def supports_geglu(gate: Tensor, up: Tensor, approximate: str) -> str | None:
    return unsupported(gate, up)


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    up, stride = rows(up)
    return _elementwise(_cpu.geglu, gate, up.data_ptr(), stride, tanh=approximate == "tanh")


def _elementwise(kernel: Callable[..., None], x: Tensor, other: int, other_stride: int, **more: int) -> Tensor:
    x, x_stride = rows(x)
    y = empty(x.shape, x.dtype)
    kernel(
        threads(x.numel()),
        y=y.data_ptr(),
        x=x.data_ptr(),
        other=other,
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        cols=x.shape[-1],
        x_stride=x_stride,
        other_stride=other_stride,
        dtype=DTYPES[x.dtype],
        **more,
    )
    return y
