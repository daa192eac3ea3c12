"""AdamW for a list of tensors in one launch, with the clipping of the gradient's norm in the same pass; and that norm.

    g = grad * grad_scale * min(1, max_norm / (norm + 1e-6))            norm = |grad_scale| gradient_norm(grads)
    m = beta1 m + (1 - beta1) g                 v = beta2 v + (1 - beta2) g^2               t = t + 1
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    gradient_norm(grads) = sqrt(sum of the squares of all elements of all tensors)

Loshchilov and Hutter: Decoupled Weight Decay Regularization (arXiv:1711.05101), algorithm 2, as torch.optim.AdamW has
it: the decay is lr * weight_decay, eps is added to the corrected root. The clip is torch.nn.utils.clip_grad_norm_'s,
its 1e-6 too; the gradients stay as they are.

params       list of tensors of any shapes, float32, bfloat16 or float16 (float64 on the reference), updated in place
grads        their gradients: each of its parameter's dtype or float32
exp_avgs     m, exp_avg_sqs v: like params, float32 (float64 for float64); updated in place
steps        t: () float32, on the CPU; counted up in place
masters      None, or a list of each parameter in float32 or None: where one is, it takes the update, and the parameter
             is its rounded copy. Without one a 16-bit parameter is read, updated in fp32 and rounded to nearest, which
             loses an update below half a unit of its last place; that is what torch.optim does
grad_scale   a number, or one in a tensor, () of floats, which a GPU doesn't wait for
max_norm     None: nothing is clipped and no norm is computed; infinity: the norm is computed, nothing is clipped
nonfinite    what an infinite or NaN norm does: "propagate" (as in torch: gradients become 0 or NaN), "skip" (nothing is
             written, t isn't counted up), "raise" (RuntimeError, nothing is written)
the result   the norm, () float32 (float64 for float64); None without max_norm

Arithmetic is fp32; what a step takes for a whole tensor (bias corrections) is fp64. Squares are summed in fp64, so no
gradient is too large or too small for its norm, in chunks of 8,192 elements of one tensor whose sums are added in the
order of the list: the norm depends on the tensors alone, not on threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from gptfast.ops import dispatch
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes

_torch: Any = torch  # whose stubs leave out what begins with an underscore
NONFINITE = ("propagate", "skip", "raise")


def gradient_norm_reference(grads: Sequence[Tensor]) -> Tensor:
    """The meaning of gradient_norm, in plain PyTorch."""
    wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    norms = [torch.linalg.vector_norm(g, dtype=wide) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms))


def reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: float | Tensor = 1.0,
    max_norm: float | None = None,
    nonfinite: str = "propagate",
    masters: Sequence[Tensor | None] | None = None,
) -> Tensor | None:
    """The meaning of adamw, in plain PyTorch."""
    norm = None
    if max_norm is not None:
        norm = gradient_norm_reference(grads) * abs(grad_scale)
        if not _go_on(norm, nonfinite):
            return norm
        grad_scale = grad_scale * clip_coefficient(norm, max_norm)
    _update_reference(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, grad_scale, masters)
    return norm


@torch.no_grad()
def _update_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    masters: Sequence[Tensor | None] | None,
) -> None:
    """One step with a scale that is known."""
    beta1, beta2 = betas
    for i, (p, grad, m, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps)):
        t = float(step.add_(1))
        g = grad.to(m.dtype) * grad_scale
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(eps)
        master = masters[i] if masters is not None else None
        w = (p if master is None else master).to(m.dtype) * (1 - lr * weight_decay)
        w.addcdiv_(m, root, value=-lr / (1 - beta1**t))
        if master is not None:
            master.copy_(w)
        p.copy_(w)


def clip_coefficient(norm: Tensor, max_norm: float) -> float | Tensor:
    """What gradients of this norm are multiplied by so that theirs is at most max_norm; NaN stays NaN. On a GPU it
    stays there, () float64: nobody waits for the norm."""
    if norm.is_cuda:
        return (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    coefficient = max_norm / (float(norm) + 1e-6)
    return min(coefficient, 1.0)  # NaN and not 1.0 where it is one: it comes first


def _go_on(norm: Tensor, nonfinite: str) -> bool:
    """Whether a step with this norm is made."""
    if nonfinite == "propagate" or math.isfinite(float(norm)):
        return True
    if nonfinite == "raise":
        raise RuntimeError(f"the gradients' norm is {float(norm)}: nothing was updated")
    return False


def baseline(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_norm: float | None = None,
    **more: Any,
) -> Tensor | None:
    """What one writes with PyTorch: its fused AdamW after clipping, which writes the gradients; the reference where
    the fused one takes no such tensors (fp32 state of 16-bit parameters)."""
    if more or any(t.dtype != params[0].dtype for t in (*params, *grads, *exp_avgs)):
        more |= {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        return reference(params, grads, exp_avgs, exp_avg_sqs, steps, **more)
    norm = None
    if max_norm is not None:
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        _torch._foreach_mul_(list(grads), clip_coefficient(norm, max_norm))
    _torch._fused_adamw_(
        *(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), [], _counted(steps)),
        **dict(amsgrad=False, lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps),
        maximize=False,
    )
    return norm


def _counted(steps: Sequence[Tensor]) -> list[Tensor]:
    _torch._foreach_add_(list(steps), 1)
    return list(steps)


def cost(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    max_norm: float | None = None,
    masters: Sequence[Tensor | None] | None = None,
    **_: Any,
) -> Cost:
    """Everything is read once, the gradients twice where their norm comes first; all but the gradients are written."""
    updated = nbytes(*params, *exp_avgs, *exp_avg_sqs, *(masters or ()))
    n = sum(p.numel() for p in params)
    read = nbytes(*grads) * (1 if max_norm is None else 2) + updated
    if masters is not None:  # a parameter that has a master is only written
        read -= nbytes(*(p for p, master in zip(params, masters) if master is not None))
    return Cost(flops=n * (15 if max_norm is None else 17), bytes=read + updated)


def gradient_norm_cost(grads: Sequence[Tensor]) -> Cost:
    return Cost(flops=2 * sum(g.numel() for g in grads), bytes=nbytes(*grads))


# A layer of GPT-2 124M: norms, attention, MLP.
GPT2_LAYER = ((768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,))
GPT2_LAYER += ((3072, 768), (3072,), (768, 3072), (768,))


def cases() -> list[Case]:
    def case(
        name: str,
        *shapes: tuple[int, ...],
        fp32_grads: bool = False,
        masters: bool = False,
        transposed: bool = False,
        tags: str = "",
        **more: Any,
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            params = [i.randn(*shape) for shape in shapes]
            if transposed:
                params = [p.mT.contiguous().mT for p in params]
            wide = torch.float32
            arguments = {
                "params": params,
                "grads": [i.randn(*s, scale=0.1, dtype=wide if fp32_grads else None) for s in shapes],
                "exp_avgs": [torch.empty_like(p, dtype=wide).copy_(i.randn(*p.shape, scale=0.1)) for p in params],
                "exp_avg_sqs": [torch.empty_like(p, dtype=wide).copy_(i.rand(*p.shape) * 0.01) for p in params],
                "steps": [torch.tensor(float(n % 7 * 50)) for n in range(len(shapes))],
                **({"masters": [p.float() * 1.001 for p in params]} if masters else {}),
            }
            return arguments | more

        return Case(name, make, frozenset(tags.split()))

    return [
        case("one", (3, 5), lr=0.1),
        case("ragged", (7,), (), (2, 3, 4), (0, 3), (8192,), (8193,), (129, 130), weight_decay=0.1, lr=0.01),
        case("clipped", (40, 33), (17,), (5, 4097), max_norm=0.5, betas=(0.9, 0.95), lr=0.01),
        case("not-clipped", (40, 33), (17,), max_norm=1e3, grad_scale=0.25),
        case("fp32-grads", (129, 65), (31,), fp32_grads=True, max_norm=1.0, lr=0.05),
        case("masters", (129, 65), (31,), masters=True, fp32_grads=True, lr=0.01),
        case("descent-up", (1000,), grad_scale=-2.0, weight_decay=0.0),
        case("transposed", (64, 96), (33, 70), transposed=True, lr=0.01),
        case("gpt2-layers", *GPT2_LAYER * 4, max_norm=1.0, lr=6e-4, betas=(0.9, 0.95), tags="bench big"),
    ]


def gradient_norm_cases() -> list[Case]:
    def case(name: str, *shapes: tuple[int, ...], scale: float = 1.0, tags: str = "") -> Case:
        return Case(name, lambda i: {"grads": [i.randn(*s, scale=scale) for s in shapes]}, frozenset(tags.split()))

    return [
        case("one", (3, 5)),
        case("ragged", (7,), (), (2, 3, 4), (0, 3), (8192,), (8193,), (3, 100_000)),
        case("large", (513, 5), scale=300.0),
        case("gpt2-layers", *GPT2_LAYER * 4, scale=0.02, tags="bench"),
    ]


def gradient_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Any:
    """The norm of all gradients as one vector, () float32. Order of the sum, dtypes: the top of this page.

    Raises ValueError for an empty list and for tensors that aren't floats on one device.
    """
    _check_list("gradient_norm", "grads", grads)
    return dispatch.run("adamw.gradient_norm", backend, gradient_norm_reference, grads[0], grads=grads)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    grad_scale: float | Tensor = 1.0,
    max_norm: float | None = None,
    nonfinite: str = "propagate",
    masters: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> Any:
    """One step of AdamW in place; the gradients' norm where max_norm is given. Formula, dtypes: the top of this page.

    Raises ValueError for lists, shapes, dtypes and numbers that don't fit; RuntimeError for a norm that isn't finite if
    nonfinite is "raise"; BackendError where `backend` can't serve the call. In all these cases nothing was written.
    """
    _check(params, grads, exp_avgs, exp_avg_sqs, steps, masters)
    require(0 <= betas[0] < 1 and 0 <= betas[1] < 1, lambda: f"adamw: expected betas in [0, 1), got {betas}")
    require(eps >= 0, lambda: f"adamw: expected eps >= 0, got {eps}")
    require(max_norm is None or max_norm > 0, lambda: f"adamw: expected max_norm > 0 or None, got {max_norm}")
    require(nonfinite in NONFINITE, lambda: f"adamw: expected nonfinite as one of {NONFINITE}, got {nonfinite!r}")
    require(
        not isinstance(grad_scale, Tensor) or (grad_scale.dim() == 0 and grad_scale.is_floating_point()),
        lambda: f"adamw: expected grad_scale as a number or () of floats, got {shape(cast(Tensor, grad_scale))}",
    )
    if isinstance(grad_scale, Tensor) and not params[0].is_cuda:
        grad_scale = float(grad_scale)
    norm, scale = None, grad_scale
    if max_norm is not None and not isinstance(backend, dispatch.Explain):
        norm = gradient_norm(grads, backend=backend) * abs(grad_scale)
        if not _go_on(norm, nonfinite):
            return norm
        scale = grad_scale * clip_coefficient(norm, max_norm)
    done = dispatch.run(
        *("adamw", backend, _update_reference, params[0]),
        **dict(params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, steps=steps, lr=lr, betas=betas),
        **dict(eps=eps, weight_decay=weight_decay, grad_scale=scale, masters=masters),
    )
    return done if norm is None else norm


def _check_list(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    require(len(tensors) > 0, lambda: f"{op}: expected {name} as a list of tensors, got none")
    device = tensors[0].device
    for t in tensors:
        if not t.is_floating_point() or t.device != device:
            raise ValueError(f"{op}: expected {name} of floats on {device}, got {shape(t)} on {t.device}")


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None,
) -> None:
    """Raises where the lists don't fit together."""
    _check_list("adamw", "params", params)
    _check_list("adamw", "grads", grads)
    lists = (params, grads, exp_avgs, exp_avg_sqs, steps, *(() if masters is None else (masters,)))
    require(
        len({len(l) for l in lists}) == 1, lambda: f"adamw: expected lists of one length, got {[len(l) for l in lists]}"
    )
    for i, (p, g, m, v, step) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, steps)):
        _check_one(i, p, g, m, v, step, None if masters is None else masters[i])


def _check_one(i: int, p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, master: Tensor | None) -> None:
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    require(
        g.shape == p.shape and g.dtype in (p.dtype, torch.float32),
        lambda: f"adamw: expected a gradient like parameter {i}, {shape(p)}, or float32, got {shape(g)}",
    )
    require(
        m.shape == v.shape == p.shape and m.dtype == v.dtype == wide,
        lambda: f"adamw: expected moments like parameter {i}, {shape(p)}, in {wide}, got {shape(m)} and {shape(v)}",
    )
    require(step.dim() == 0, lambda: f"adamw: expected the steps of parameter {i} as (), got {shape(step)}")
    require(
        master is None or (master.shape == p.shape and master.dtype == wide),
        lambda: f"adamw: expected a master like parameter {i}, {shape(p)}, in {wide}, got {shape(master)}",
    )


OPS = [
    Op("adamw", adamw, reference, cost, cases, baseline, plain=reference,
       mutates=("params", "exp_avgs", "exp_avg_sqs", "steps", "masters"), host=("steps",)),
    Op("gradient_norm", gradient_norm, gradient_norm_reference, gradient_norm_cost, gradient_norm_cases),
]  # fmt: skip
