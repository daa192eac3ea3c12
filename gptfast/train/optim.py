"""AdamW as a torch optimiser over gptfast.ops.adamw, and the clipping of a gradient's norm.

Everything that holds for torch.optim.AdamW holds here: param_groups, learning-rate schedules, hooks, state dicts of the
same form (`step`, `exp_avg`, `exp_avg_sq`), so that either loads the other's, gradient scalers, and parameters that are
DTensors (FSDP2), each process updating its shards. What is different: the state is fp32 whatever the parameters are,
and clipping belongs to the step, which leaves the gradients as they are.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gptfast.ops import adamw, gradient_norm
from gptfast.ops.adamw import clip_coefficient

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW (formula: gptfast/ops/adamw.py) with fp32 state, one launch a param_group.

    params          parameters, or dicts of them with their own options, as in torch.optim
    max_norm        clips the norm of all gradients together, over all processes where parameters are DTensors; None
                    computes no norm, infinity computes it only
    nonfinite       what a norm that isn't finite does: "propagate" (as in torch), "skip" (the step isn't made), "raise"
    master_weights  keeps an fp32 copy of each 16-bit parameter (state `master`), which takes the updates; the parameter
                    follows it rounded. Without it updates smaller than half a unit of the parameter's last place are
                    lost, as in torch.optim. Who writes to a parameter later writes to its master too
    maximize        goes up

    grad_norm is the last step's norm, before clipping, () float32; None without max_norm. Raises ValueError for options
    out of range, for amsgrad and for sparse gradients.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler gives grad_scale and found_inf instead of unscaling

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        nonfinite: str = "propagate",
        master_weights: bool = False,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        if float(lr) < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"AdamW: expected lr, eps, weight_decay >= 0, got {float(lr)}, {eps} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamW: expected betas in [0, 1), got {betas}")
        if nonfinite != "propagate" and max_norm is None:
            raise ValueError(f"AdamW: nonfinite={nonfinite!r} needs a norm: expected max_norm (it may be infinity)")
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize)
        super().__init__(params, defaults)
        self.max_norm, self.nonfinite = max_norm, nonfinite
        self.master_weights, self.backend = master_weights, backend
        self.grad_norm: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name) for name in ("max_norm", "nonfinite", "master_weights", "backend", "grad_norm")
        }
        return super().__getstate__() | own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scale: float = 1.0) -> Any:  # pyright: ignore
        """One step; the closure's loss, if one is given.

        scale multiplies the gradients first: 1 / n where n backward passes were accumulated. grad_norm is that of the
        scaled ones. Raises RuntimeError where the norm isn't finite and nonfinite is "raise".
        """
        loss, by = None, scale
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if (found := getattr(self, "found_inf", None)) is not None and float(found):
            return loss
        if (amp := getattr(self, "grad_scale", None)) is not None:
            by = scale = scale / float(amp)
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [p.grad for _, params in groups for p in params]
        if any(g.is_sparse for g in grads):
            raise ValueError("AdamW: expected dense gradients, got a sparse one")
        if self.max_norm is not None and grads:
            self.grad_norm = norm = total_norm(grads, backend=self.backend) * abs(scale)
            if self.nonfinite != "propagate" and not math.isfinite(float(norm)):
                if self.nonfinite == "raise":
                    raise RuntimeError(f"AdamW: the gradients' norm is {float(norm)}: nothing was updated")
                return loss
            by = scale * clip_coefficient(norm, self.max_norm)
        for group, params in groups:
            if params:
                self._update(group, params, -by if group["maximize"] else by)
        return loss

    def _update(self, group: dict[str, Any], params: Sequence[Tensor], scale: float | Tensor) -> None:
        states = [self._state_of(p) for p in params]
        masters = [local(s["master"]) if "master" in s else None for s in states]
        adamw(
            [local(p) for p in params],
            [_gradient(p) for p in params],
            [local(s["exp_avg"]) for s in states],
            [local(s["exp_avg_sq"]) for s in states],
            [s["step"] for s in states],
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=scale,
            masters=masters if any(m is not None for m in masters) else None,
            backend=self.backend,
        )

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state = cast(dict[str, Any], self.state[p])
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            for name in MOMENTS:
                state[name] = torch.zeros_like(p, dtype=_wide(p), memory_format=torch.preserve_format)
        if self.master_weights and p.dtype != _wide(p) and "master" not in state:
            state["master"] = p.detach().to(_wide(p))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this class's state or torch.optim.AdamW's. Raises ValueError for one made with amsgrad."""
        if any(group.get("amsgrad") for group in state_dict["param_groups"]):
            raise ValueError("AdamW: expected a state without amsgrad")
        super().load_state_dict(state_dict)
        # torch casts the state to each parameter's dtype; what was stored wider is taken from where it is.
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params):
            if i not in state_dict["state"]:
                continue
            state, stored = self.state[p], state_dict["state"][i]
            state["step"] = torch.tensor(float(stored["step"]))
            for name in (*MOMENTS, "master"):
                if name in stored:
                    state[name] = stored[name].detach().to(p.device, _wide(p), copy=True)


def total_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The norm of all gradients as one vector, () float32: of all processes' shards where they are DTensors.

    The order of the sum is fixed: gptfast/ops/adamw.py for one process, the process group's for several.
    """
    if not grads:
        return torch.tensor(0.0)
    if any(g.is_sparse for g in grads):
        raise ValueError("total_norm: expected dense gradients, got a sparse one")
    kinds: defaultdict[Any, list[Tensor]] = defaultdict(list)
    for g in grads:
        mine = local(g)
        kinds[mine.device if mine is g else (g.device_mesh, g.placements)].append(mine)  # pyright: ignore
    if len(kinds) == 1 and not isinstance(next(iter(kinds)), tuple):
        return gradient_norm(grads, backend=backend)
    squares = torch.zeros((), dtype=torch.float64)
    for kind, tensors in kinds.items():
        mine = gradient_norm(tensors, backend=backend).double().square()
        if isinstance(kind, tuple):
            mesh, placements = kind
            for dim, placement in enumerate(placements):
                if placement.is_partial():
                    raise ValueError("total_norm: expected gradients that are reduced, got a partial one")
                if not placement.is_replicate():
                    torch.distributed.all_reduce(mine, group=mesh.get_group(dim))
        squares += mine.to(squares.device)
    return squares.sqrt().to(local(grads[0]).device, torch.float32)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    *,
    error_if_nonfinite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ with the norm in one pass, and a second, over the gradients, only where they are
    longer than max_norm. Returns the norm before clipping, () float32, or float64 where the gradients are.

    Raises ValueError for sparse gradients, and RuntimeError for a norm that isn't finite if error_if_nonfinite; they
    stay as they were. With AdamW(max_norm=...) there is no second pass at all.
    """
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = [p.grad for p in given if p.grad is not None]
    norm = total_norm(grads, backend=backend)
    if error_if_nonfinite and not math.isfinite(float(norm)):
        raise RuntimeError(f"the gradients' norm is {float(norm)}: they were not clipped")
    if grads and (coefficient := float(clip_coefficient(norm, max_norm))) != 1:
        torch._foreach_mul_([local(g) for g in grads], coefficient)  # pyright: ignore[reportPrivateImportUsage]
    return norm


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def local(t: Any) -> Tensor:
    """This process's part of a DTensor; another tensor as it is. Without that module there are no DTensors, and it
    takes long to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return t.to_local() if module is not None and isinstance(t, module.DTensor) else t


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    mine = local(p.grad)
    return mine if mine.dtype in (p.dtype, torch.float32) else mine.float()
