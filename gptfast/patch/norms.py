"""LayerNorm and RMSNorm modules, torch's own and anybody's, computed by ops.layer_norm and ops.rms_norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.patch import probe
from gptfast.patch.changes import Replacement

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "norm_eps")
USUAL_EPS = (1e-5, 1e-6, 1e-12, 1e-8)


class Formula(NamedTuple):
    """op: "layer_norm" or "rms_norm"; eps None = the smallest step of the input's dtype; plus: 1 where 1 + weight
    scales, as Gemma's."""

    op: str
    eps: float | None
    plus: float = 0.0

    def __str__(self) -> str:
        return f"ops.{self.op}" + ", scaled by 1 + weight" * bool(self.plus)


class Norm(Replacement):
    """The forward of a norm."""

    def __init__(self, module: nn.Module, formula: Formula, backend: str | None) -> None:
        super().__init__(module, backend)
        self.formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) != 1 or kwargs:
            return self.original(*args, **kwargs)
        module: Any = self.module
        x, weight, (op, eps, plus) = args[0], module.weight, self.formula
        if (x.dtype != weight.dtype and weight.dtype != torch.float32) or x.shape[-1:] != weight.shape:
            return self.original(x)
        if op == "layer_norm":
            assert eps is not None
            return ops.layer_norm(x, weight, getattr(module, "bias", None), eps, backend=self.backend)
        if plus:
            weight = weight.float() + plus
        return ops.rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps, backend=self.backend)


def recognise(module: nn.Module) -> Formula | str | None:
    """What a norm computes; a sentence where no op does, None where it is no norm at all."""
    if type(module) in (nn.LayerNorm, nn.RMSNorm):
        if len(module.normalized_shape) != 1:  # pyright: ignore[reportArgumentType]
            return f"it normalises over {len(module.normalized_shape)} dimensions, and the op over the last one"  # pyright: ignore[reportArgumentType]
        if module.weight is None:
            return "it has no weight, and the op takes one"
        return Formula("layer_norm" if type(module) is nn.LayerNorm else "rms_norm", module.eps)  # pyright: ignore[reportArgumentType]
    parameters = dict(module.named_parameters())
    named = "norm" in type(module).__name__.lower()
    if next(module.children(), None) is not None or set(parameters) - {"weight", "bias"} or "weight" not in parameters:
        return None
    weight = parameters["weight"]
    if weight.dim() != 1 or weight.shape[0] < 2:
        return None
    given = [getattr(module, name) for name in EPS_NAMES if isinstance(getattr(module, name, None), float)]
    formulas = [
        Formula(op, eps, plus)
        for eps in dict.fromkeys((*given, *USUAL_EPS))
        for op, plus in (("layer_norm", 0.0), ("rms_norm", 0.0), ("rms_norm", 1.0))
        if "bias" not in parameters or op == "layer_norm"
    ]
    # the small scale is there to tell one eps from another
    found = probe.first_match(module, formulas, lambda m, f: Norm(m, f, None), (3, weight.shape[0]), (1.0, 1e-3))
    return found if isinstance(found, Formula) or named else None
