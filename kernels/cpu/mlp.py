from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, as_rows, chunk_of, empty, prepare, rows, shared, threads, unsupported


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


def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, wants_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx, and dbias (empty where nobody wants it)."""
    given, made, sizes = _backward(dy, x)
    dbias = torch.zeros(x.shape[-1:] if wants_bias else 0, dtype=x.dtype)
    chunk = chunk_of(sizes["rows"])
    if sizes["rows"]:
        if bias is not None:
            given["other"] = bias.contiguous()
        if wants_bias:
            made |= {"dother": dbias, "workspace": shared(4 * -(-sizes["rows"] // chunk) * sizes["cols"])}
        _launch("bias_gelu_backward", given | made, sizes, tanh=approximate == "tanh", chunk=chunk, other_stride=0)
    return made["dx"], dbias


def supports_swiglu_backward(gate: Tensor, up: Tensor, **_: Any) -> str | None:
    return unsupported(gate, up, backward=True)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _gated_backward("swiglu_backward", dy, gate, up)


def supports_geglu_backward(gate: Tensor, up: Tensor, **_: Any) -> str | None:
    return unsupported(gate, up, backward=True)


def geglu_backward(dy: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    return _gated_backward("geglu_backward", dy, gate, up, tanh=approximate == "tanh")


def _gated_backward(kernel: str, dy: Tensor, gate: Tensor, up: Tensor, **more: int) -> tuple[Tensor, Tensor]:
    given, made, sizes = _backward(dy, gate)
    given["other"], sizes["other_stride"] = rows(up)
    made["dother"] = empty(gate.shape, gate.dtype)
    if sizes["rows"]:
        _launch(kernel, given | made, sizes, **more)
    return made["dx"], made["dother"]


def _backward(dy: Tensor, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """What all backwards share: inputs, outputs and numbers."""
    (dy, dy_stride), (x, x_stride) = rows(dy), rows(x)
    sizes = dict(
        rows=x.numel() // x.shape[-1] if x.numel() else 0,
        cols=x.shape[-1],
        dy_stride=dy_stride,
        x_stride=x_stride,
        dtype=DTYPES[x.dtype],
    )
    return {"dy": dy, "x": x}, {"dx": empty(x.shape, x.dtype)}, sizes


def _launch(kernel: str, tensors: dict[str, Tensor], sizes: dict[str, int], **more: int) -> None:
    count = threads(sizes["rows"] * sizes["cols"])
    getattr(_cpu, kernel)(count, **{name: t.data_ptr() for name, t in tensors.items()}, **sizes, **more)
