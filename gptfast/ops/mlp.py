"""The activations of MLPs, fused with what stands beside them.

    bias_gelu(x, bias)    = gelu(x + bias)
    swiglu(gate, up)      = silu(gate) * up,  silu(g) = g / (1 + exp(-g))
    geglu(gate, up)       = gelu(gate) * up

    gelu(x) = x/2 * (1 + erf(x / sqrt(2)))                                   approximate="none"
    gelu(x) = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))            approximate="tanh"

Hendrycks, Gimpel: Gaussian Error Linear Units (arXiv:1606.08415); Shazeer: GLU Variants Improve Transformer
(arXiv:2002.05202).

x, gate   (..., C)  float32, bfloat16 or float16 (float64 on the reference)
bias      (C)       x's dtype, or None
up        (..., C)  gate's shape and dtype. gate and up may be the two halves of one tensor: no copy is made of rows
                    whose elements lie side by side

Everything is computed in fp32 (fp64 for fp64) and rounded once at the end: x + bias isn't rounded to the storage dtype,
nor is the activation before its product with up. Each element's result depends on that element alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import dispatch, library, mlp_gradients
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "none":
        return x * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))
    return x * (0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def bias_gelu_reference(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """The meaning of bias_gelu, in plain PyTorch."""
    s = _wide(x) if bias is None else _wide(x) + _wide(bias)
    return _gelu(s, approximate).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The meaning of swiglu, in plain PyTorch."""
    return (_wide(gate) * torch.sigmoid(_wide(gate)) * _wide(up)).to(gate.dtype)


def geglu_reference(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """The meaning of geglu, in plain PyTorch."""
    return (_gelu(_wide(gate), approximate) * _wide(up)).to(gate.dtype)


def bias_gelu_baseline(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """What one writes with PyTorch."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def swiglu_baseline(gate: Tensor, up: Tensor) -> Tensor:
    """What one writes with PyTorch."""
    return F.silu(gate) * up


def geglu_baseline(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """What one writes with PyTorch."""
    return F.gelu(gate, approximate=approximate) * up


def bias_gelu_cost(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Cost:
    """A transcendental function counts as 10 operations here and below."""
    return Cost(flops=17 * x.numel(), bytes=nbytes(x, x, bias))


def swiglu_cost(gate: Tensor, up: Tensor) -> Cost:
    return Cost(flops=13 * gate.numel(), bytes=nbytes(gate, gate, up))


def geglu_cost(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Cost:
    return Cost(flops=17 * gate.numel(), bytes=nbytes(gate, gate, up))


def bias_gelu_train_cost(x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh") -> Cost:
    """The backward reads the gradient of y and x and writes that of x."""
    return Cost(flops=45 * x.numel(), bytes=nbytes(x, x, bias) + nbytes(x, x, x, bias))


def swiglu_train_cost(gate: Tensor, up: Tensor) -> Cost:
    """The backward reads the gradient of y, gate and up, and writes two gradients."""
    return Cost(flops=35 * gate.numel(), bytes=8 * nbytes(gate))


def geglu_train_cost(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Cost:
    return Cost(flops=45 * gate.numel(), bytes=8 * nbytes(gate))


def bias_gelu_cases() -> list[Case]:
    def case(*shape: int, bias: bool = True, approximate: str = "tanh", scale: float = 2.0, tags: str = "") -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            return {
                "x": i.randn(*shape, scale=scale),
                "bias": i.randn(shape[-1], scale=0.5) if bias else None,
                "approximate": approximate,
            }

        kind = "-nobias" * (not bias) + "-erf" * (approximate == "none") + "-large" * (scale > 2)
        return Case("x".join(map(str, shape)) + kind, make, frozenset(tags.split()))

    return [
        case(2, 3, 64),
        case(5, 1),
        case(3, 7, 33, bias=False),
        case(4, 255, approximate="none"),
        case(17, 769, bias=False, approximate="none"),
        case(9, 1000, scale=30.0),
        case(9, 1000, scale=30.0, approximate="none"),
        case(0, 16),
        case(8192, 3072, tags="bench big"),
        case(8192, 3072, approximate="none", tags="bench big"),
        case(1, 3072, tags="bench"),
        case(8, 3072, tags="bench"),
    ]


def _gated_cases(**kinds: dict[str, Any]) -> list[Case]:
    """Cases of gate and up, for each named set of further arguments."""

    def case(*shape: int, kind: str, halves: bool = False, scale: float = 2.0, tags: str = "") -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            if halves:
                gate, up = i.randn(*shape[:-1], 2 * shape[-1], scale=scale).chunk(2, -1)
            else:
                gate, up = i.randn(*shape, scale=scale), i.randn(*shape)
            return {"gate": gate, "up": up, **kinds[kind]}

        name = "x".join(map(str, shape)) + kind.rstrip("_") + "-halves" * halves + "-large" * (scale > 2)
        return Case(name, make, frozenset(tags.split()))

    first = next(iter(kinds))
    return [
        *(case(2, 3, 64, kind=kind) for kind in kinds),
        *(case(3, 5, 33, kind=kind, halves=True) for kind in kinds),
        *(case(9, 1000, kind=kind, scale=30.0) for kind in kinds),
        case(5, 1, kind=first),
        case(17, 769, kind=first, halves=True),
        case(0, 16, kind=first),
        case(8192, 1536, kind=first, tags="bench big"),
        case(8192, 1536, kind=first, halves=True, tags="bench big"),
        case(1, 1536, kind=first, tags="bench"),
        case(8, 1536, kind=first, tags="bench"),
    ]


def swiglu_cases() -> list[Case]:
    return _gated_cases(_={})


def geglu_cases() -> list[Case]:
    return _gated_cases(_={}, erf={"approximate": "none"})


def bias_gelu(
    x: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh", backend: str | None = None
) -> Tensor:
    """gelu(x + bias). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit; BackendError where `backend` can't serve the call.
    """
    if bias is not None and library.under_autocast(x, bias):
        bias = bias.to(x.dtype)
    arguments = {"x": x, "bias": bias, "approximate": approximate}
    backend, as_op = library.route("mlp.bias_gelu", backend, arguments, _check_bias_gelu)
    if as_op:
        return _bias_gelu(**arguments, backend=backend)
    return dispatch.prepared("mlp.bias_gelu", backend, bias_gelu_reference, x, arguments, _check_bias_gelu)(**arguments)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit; BackendError where `backend` can't serve the call.
    """
    arguments = {"gate": gate, "up": up}
    backend, as_op = library.route("mlp.swiglu", backend, arguments, _check_swiglu)
    if as_op:
        return _swiglu(**arguments, backend=backend)
    return dispatch.prepared("mlp.swiglu", backend, swiglu_reference, gate, arguments, _check_swiglu)(**arguments)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh", backend: str | None = None) -> Tensor:
    """gelu(gate) * up. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for arguments that don't fit; BackendError where `backend` can't serve the call.
    """
    arguments = {"gate": gate, "up": up, "approximate": approximate}
    backend, as_op = library.route("mlp.geglu", backend, arguments, _check_geglu)
    if as_op:
        return _geglu(**arguments, backend=backend)
    return dispatch.prepared("mlp.geglu", backend, geglu_reference, gate, arguments, _check_geglu)(**arguments)


def _check_bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> None:
    _check_gelu("bias_gelu", x, "x", approximate)
    require(
        bias is None or (bias.shape == x.shape[-1:] and bias.dtype == x.dtype),
        lambda: f"bias_gelu: expected bias ({x.shape[-1]},) of x's dtype, got {shape(bias)} beside {shape(x)}",
    )


def _check_swiglu(gate: Tensor, up: Tensor) -> None:
    _check_pair("swiglu", gate, up)


def _check_geglu(gate: Tensor, up: Tensor, approximate: str) -> None:
    _check_gelu("geglu", gate, "gate", approximate)
    _check_pair("geglu", gate, up)


def _check_gelu(op: str, x: Tensor, name: str, approximate: str) -> None:
    require(x.dim() >= 1 and x.is_floating_point(), lambda: f"{op}: expected {name} (..., C) of floats, got {shape(x)}")
    require(
        approximate in ("none", "tanh"),
        lambda: f"{op}: expected approximate to be 'none' or 'tanh', got {approximate!r}",
    )


def _check_pair(op: str, gate: Tensor, up: Tensor) -> None:
    require(
        gate.dim() >= 1 and gate.is_floating_point(),
        lambda: f"{op}: expected gate (..., C) of floats, got {shape(gate)}",
    )
    require(
        up.shape == gate.shape and up.dtype == gate.dtype,
        lambda: f"{op}: expected up like gate {shape(gate)}, got {shape(up)}",
    )


def _take(arguments: Any, b: int) -> dict[str, Any]:
    return {k: v[b : b + 1] if k in ("x", "gate", "up") else v for k, v in arguments.items()}


_bias_gelu = mlp_gradients.register_bias_gelu(bias_gelu_reference)
_swiglu = mlp_gradients.register_gated("swiglu", swiglu_reference, approximate=False)
_geglu = mlp_gradients.register_gated("geglu", geglu_reference, approximate=True)


def _op(name: str, *parts: Any, train_cost: Callable[..., Cost], differentiable: tuple[str, ...]) -> Op:
    return Op(*(name, *parts), take=_take, train_cost=train_cost, differentiable=differentiable, double_backward=True)


OPS = [
    _op(*("bias_gelu", bias_gelu, bias_gelu_reference, bias_gelu_cost, bias_gelu_cases, bias_gelu_baseline),
        train_cost=bias_gelu_train_cost, differentiable=("x", "bias")),
    _op(*("swiglu", swiglu, swiglu_reference, swiglu_cost, swiglu_cases, swiglu_baseline),
        train_cost=swiglu_train_cost, differentiable=("gate", "up")),
    _op(*("geglu", geglu, geglu_reference, geglu_cost, geglu_cases, geglu_baseline),
        train_cost=geglu_train_cost, differentiable=("gate", "up")),
]  # fmt: skip
