from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.cpu import DTYPES, as_rows, chunk_of, prepare, rows, threads, unsupported


def supports_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    return unsupported(x, bias, backward=True)


def bias_gelu(**arguments: Any) -> Tensor:
    return prepare_bias_gelu(**arguments)(**arguments)


def prepare_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Callable[..., Tensor]:
    return _elementwise("bias_gelu", "x", x, "bias", bias, 0, tanh=approximate == "tanh")


def supports_swiglu(gate: Tensor, up: Tensor) -> str | None:
    return unsupported(gate, up, backward=True)


def swiglu(**arguments: Any) -> Tensor:
    return prepare_swiglu(**arguments)(**arguments)


def prepare_swiglu(gate: Tensor, up: Tensor) -> Callable[..., Tensor]:
    return _elementwise("swiglu", "gate", gate, "up", up, rows(up)[1])


def supports_geglu(gate: Tensor, up: Tensor, approximate: str) -> str | None:
    return unsupported(gate, up, backward=True)


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


def supports_bias_gelu_backward(x: Tensor, bias: Tensor | None, **_: Any) -> str | None:
    return unsupported(x, bias, backward=True)


def bias_gelu_backward(**arguments: Any) -> tuple[Tensor, Tensor]:
    return prepare_bias_gelu_backward(**arguments)(**arguments)


def prepare_bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, wants_bias: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """dx, and dbias (empty where nobody wants it)."""
    count = x.numel() // max(x.shape[-1], 1)
    chunk = chunk_of(count)
    return _backward(
        *("bias_gelu_backward", "x", x, "bias", bias),
        *(0, dy, x.shape[-1:] if wants_bias else (0,)),
        workspace=4 * -(-count // chunk) * x.shape[-1] if wants_bias else 0,
        tanh=approximate == "tanh",
        chunk=chunk,
    )


def supports_swiglu_backward(gate: Tensor, up: Tensor, **_: Any) -> str | None:
    return unsupported(gate, up, backward=True)


def swiglu_backward(**arguments: Any) -> tuple[Tensor, Tensor]:
    return prepare_swiglu_backward(**arguments)(**arguments)


def prepare_swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    return _backward("swiglu_backward", "gate", gate, "up", up, rows(up)[1], dy, gate.shape)


def supports_geglu_backward(gate: Tensor, up: Tensor, **_: Any) -> str | None:
    return unsupported(gate, up, backward=True)


def geglu_backward(**arguments: Any) -> tuple[Tensor, Tensor]:
    return prepare_geglu_backward(**arguments)(**arguments)


def prepare_geglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, approximate: str
) -> Callable[..., tuple[Tensor, Tensor]]:
    tanh = approximate == "tanh"
    return _backward("geglu_backward", "gate", gate, "up", up, rows(up)[1], dy, gate.shape, tanh=tanh)


def _backward(
    kernel: str,
    name: str,
    x: Tensor,
    other_name: str,
    other: Tensor | None,
    other_stride: int,
    dy: Tensor,
    dother: Sequence[int],
    workspace: int = 0,
    **more: int,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernel, prepared: the gradients of x and other, which are the arguments of these names."""
    outputs = {"dx": (x.shape, x.dtype), "dother": (dother, x.dtype)}
    if x.numel() == 0:
        return lambda **_: (torch.zeros(x.shape, dtype=x.dtype), torch.zeros(dother, dtype=x.dtype))
    inputs = {"dy": ("dy", as_rows), "x": (name, as_rows)}
    if other is not None:
        inputs["other"] = other_name, as_rows
    return prepare(
        kernel,
        threads(x.numel()),
        outputs,
        inputs,
        {"dy": dy, name: x, other_name: other},
        results=2,
        workspace=workspace,
        rows=x.numel() // x.shape[-1],
        cols=x.shape[-1],
        dy_stride=rows(dy)[1],
        x_stride=rows(x)[1],
        other_stride=other_stride,
        dtype=DTYPES[x.dtype],
        **more,
    )
