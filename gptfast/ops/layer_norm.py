"""Layer normalisation, with an optional fused residual add.

    s = x + residual                       (in fp32; s = x without a residual)
    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

mean and var (the biased variance, centred) are over the last dimension. Ba, Kiros, Hinton: Layer Normalization
(arXiv:1607.06450), equation 4.

x         (..., C)  float32, bfloat16 or float16 (float64 on the reference)
weight    (C)       x's dtype or float32
bias      (C)       weight's dtype, or None
residual  (..., C)  x's shape and dtype; with it the sum, rounded to the storage dtype, is returned too
eps       float     added to the variance

Everything is computed in fp32 (fp64 for fp64) and rounded once at the end; y comes from the unrounded sum. A row's
result depends on that row alone. dropout_p drops elements of x before the residual is added and scales the others by
1 / (1 - p); which ones, gptfast/ops/philox.py says: that alone depends on the place in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import dispatch, library, norm_gradients
from gptfast.ops.dispatch import require, shape
from gptfast.ops.philox import dropout_keep
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int = 0,
    stream: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of layer_norm, in plain PyTorch."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    s = x.to(wide)
    if dropout_p:
        keep = dropout_keep(tuple(x.shape), dropout_p, seed, stream, x.device)
        s = torch.where(keep, s * (1 / (1 - dropout_p)), 0.0)
    if residual is not None:
        s = s + residual.to(wide)
    centred = s - s.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), s.to(x.dtype))


def baseline(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What one writes with PyTorch."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], weight, bias, eps), s


def plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int = 0,
    stream: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The baseline, with the op's own dropout."""
    if dropout_p:
        keep = dropout_keep(tuple(x.shape), dropout_p, seed, stream, x.device)
        x = torch.where(keep, x * (1 / (1 - dropout_p)), 0.0)
    return baseline(x, weight, bias, eps, residual=residual)


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    **_: Any,
) -> Cost:
    moved = nbytes(x, x, weight, bias, residual, residual)  # x in, y out; residual in, sum out
    return Cost(flops=(8 + (residual is not None)) * x.numel(), bytes=moved)


def train_cost(x: Tensor, weight: Tensor, *, residual: Tensor | None = None, **others: Any) -> Cost:
    """The backward reads the gradients of y and of the sum, and the sum, and writes the gradient of x."""
    forward = cost(x, weight, residual=residual, **others)
    return Cost(flops=3 * forward.flops, bytes=forward.bytes + nbytes(x, x, x, residual))


def cases() -> list[Case]:
    def case(
        *shape: int,
        residual: bool = False,
        bias: bool = True,
        fp32_weight: bool = False,
        dropout: float = 0.0,
        tags: str = "",
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            C, dtype = shape[-1], torch.float32 if fp32_weight else i.dtype
            return {
                "x": i.randn(*shape, scale=2.0, shift=0.5),
                "weight": i.randn(C, shift=1.0, scale=0.2, dtype=dtype),
                "bias": i.randn(C, scale=0.1, dtype=dtype) if bias else None,
                **({"residual": i.randn(*shape)} if residual else {}),
                **({"dropout_p": dropout, "seed": 2**40 + 7, "stream": 3} if dropout else {}),
            }

        name = "x".join(map(str, shape)) + "+residual" * residual + "-nobias" * (not bias) + "-fp32w" * fp32_weight
        name += "-dropout" * bool(dropout)
        return Case(name, make, frozenset(tags.split()))

    return [
        case(2, 3, 64),
        case(5, 1),
        case(3, 7, 33, residual=True),
        case(17, 769, bias=False),
        case(4, 255, residual=True, fp32_weight=True),
        case(300, 768, residual=True, bias=False),
        case(2, 5, 3000),
        case(0, 16),
        case(7, 3, 70, dropout=0.3),
        case(130, 129, residual=True, dropout=0.1),
        case(8192, 768, tags="bench"),
        case(8192, 768, residual=True, tags="bench"),
        case(1, 768, residual=True, tags="bench"),
        case(8, 768, residual=True, tags="bench"),
    ]


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int = 0,
    stream: int = 0,
    backend: str | None = None,
) -> Any:
    """y, or (y, x + residual) where a residual is given. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit; BackendError where `backend` can't serve the call.
    """
    if residual is not None and library.under_autocast(x, residual):
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    arguments = {
        "x": x, "weight": weight, "bias": bias, "eps": eps, "residual": residual, "dropout_p": dropout_p,
        "seed": seed if dropout_p else 0, "stream": stream if dropout_p else 0,
    }  # fmt: skip
    if dropout_p:
        library.check_seed("layer_norm", seed)
    backend, as_op = library.route("layer_norm", backend, arguments, _check)
    if isinstance(as_op, dispatch.Plan) and not dropout_p:
        return _registered.planned(as_op, eps, backend, x, weight, bias, residual)
    if as_op:
        arguments["seed"] = library.seed_tensor(seed, x) if dropout_p else None
        y, total, *_ = _registered(**arguments, backend=backend)
        return y if residual is None else (y, total)
    if dropout_p:  # each call has a seed of its own: nothing to prepare
        _check(**arguments)
        arguments["seed"] = int(seed)
        return dispatch.run("layer_norm", backend, reference, x, **arguments)
    return dispatch.prepared("layer_norm", backend, reference, x, arguments, _check)(**arguments)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    **_: Any,
) -> None:
    """Raises where arguments don't fit together."""
    require(
        x.dim() >= 1 and x.is_floating_point(), lambda: f"layer_norm: expected x (..., C) of floats, got {shape(x)}"
    )
    C = x.shape[-1]
    require(weight.shape == (C,), lambda: f"layer_norm: expected weight ({C},), got {shape(weight)}")
    require(
        bias is None or (bias.shape == (C,) and bias.dtype == weight.dtype),
        lambda: f"layer_norm: expected bias like weight {shape(weight)}, got {shape(bias)}",
    )
    require(
        residual is None or (residual.shape == x.shape and residual.dtype == x.dtype),
        lambda: f"layer_norm: expected residual like x {shape(x)}, got {shape(residual)}",
    )
    require(0 <= dropout_p < 1, lambda: f"layer_norm: expected 0 <= dropout_p < 1, got {dropout_p}")
    require(not isinstance(eps, Tensor), lambda: f"layer_norm: expected eps as a number, got {eps!r}")


def _take(arguments: Any, b: int) -> dict[str, Any]:
    return {k: v[b : b + 1] if k in ("x", "residual") else v for k, v in arguments.items()}


def _statistics(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = s if s.dtype == torch.float64 else s.float()
    mean = wide.mean(-1)
    return mean, torch.rsqrt((wide - mean[..., None]).square().mean(-1) + eps)


_registered = norm_gradients.register("layer_norm", reference, _statistics)

OP = Op(
    *("layer_norm", layer_norm, reference, cost, cases, baseline),
    plain=plain,
    take=_take,
    train_cost=train_cost,
    differentiable=("x", "weight", "bias", "residual"),
    double_backward=True,
)
