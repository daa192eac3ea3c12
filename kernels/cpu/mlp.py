from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gptfast.kernels.cpu import DTYPES, as_rows, prepare, rows, threads, unsupported


def supports_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    return unsupported(x, bias)


def bias_gelu(**arguments: Any) -> Tensor:
    return prepare_bias_gelu(**arguments)(**arguments)


def prepare_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Callable[..., Tensor]:
    return _elementwise("bias_gelu", "x", x, "bias", bias, 0, tanh=approximate == "tanh")


def supports_swiglu(gate: Tensor, up: Tensor) -> str | None:
    return unsupported(gate, up)


def swiglu(**arguments: Any) -> Tensor:
    return prepare_swiglu(**arguments)(**arguments)


def prepare_swiglu(gate: Tensor, up: Tensor) -> Callable[..., Tensor]:
    return _elementwise("swiglu", "gate", gate, "up", up, rows(up)[1])


def supports_geglu(gate: Tensor, up: Tensor, approximate: str) -> str | None:
    return unsupported(gate, up)


def geglu(**arguments: Any) -> Tensor:
    return prepare_geglu(**arguments)(**arguments)


def prepare_geglu(gate: Tensor, up: Tensor, approximate: str) -> Callable[..., Tensor]:
    return _elementwise("geglu", "gate", gate, "up", up, rows(up)[1], tanh=approximate == "tanh")


def _elementwise(
    kernel: str, name: str, x: Tensor, other_name: str, other: Tensor | None, other_stride: int, **more: int
) -> Callable[..., Tensor]:
    """The kernel, prepared. Its x and other are the arguments of these names."""
    inputs = {"x": (name, as_rows)}
    if other is not None:
        inputs["other"] = other_name, as_rows
    return prepare(
        kernel,
        threads(x.numel()),
        {"y": (x.shape, x.dtype)},
        inputs,
        {name: x, other_name: other},
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        cols=x.shape[-1],
        x_stride=rows(x)[1],
        other_stride=other_stride,
        dtype=DTYPES[x.dtype],
        **more,
    )
