"""Advantages: generalised advantage estimation, those of groups (GRPO, Dr. GRPO, RLOO), and whitening.

    gae             delta_t = r_t + gamma V_next - V_t,   A_t = delta_t + gamma lam A_next,   returns R_t = A_t + V_t
                    Schulman et al. (arXiv:1506.02438), eq. 16; V and A are 0 after the last token
    group_advantages    of the n rewards of one prompt's answers:
        "grpo"      (r - mean) / (std + 1e-4), std with n - 1     Shao et al. (arXiv:2402.03300), section 4.1.2
        "dr_grpo"   r - mean                                      Liu et al. (arXiv:2503.20783), section 3
        "rloo"      r - mean of the n - 1 others                  Ahmadian et al. (arXiv:2402.14740), section 3.1
    whiten          (x - mean) / sqrt(var + 1e-8), var biased, over the mask; + mean where shift_mean is False

rewards, values   (B, T)  float32, bfloat16 or float16 (float64 on the reference); group_advantages: rewards (N), the
                  answers of one prompt side by side
x                 any shape
mask              bool like rewards or x, or None: all. gae leaves out what it doesn't keep as if it weren't there:
                  `next` is the next token that is kept, so padding on either side and holes (a tool's output) change
                  nothing. The results are 0 where it is False, and anything may stand there, NaN too
group_size        n; N is a multiple of it; 1 gives 0, "rloo" wants 2
the results       float32 (float64 for float64); no gradients flow through gae and group_advantages; those of whiten
                  are the reference's

gae's rows depend on nothing but themselves, and so do a group's advantages; whiten's normaliser is the whole mask's.

Where TRL differs: its GAE runs over the padding too, with values of 0 there, and knows no holes; its whitening takes
the variance with n - 1; its GRPO may take the std over the batch instead, and leaves answers without a reward out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, map_tensors, nbytes

GROUP_KINDS = ("grpo", "dr_grpo", "rloo")


@torch.no_grad()
def gae_reference(
    rewards: Tensor, values: Tensor, mask: Tensor | None = None, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """The meaning of gae, in plain PyTorch."""
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    r, V = (torch.where(keep, _wide(x), 0.0) for x in (rewards, values))
    advantages = torch.zeros_like(r)
    advantage = next_value = r.new_zeros(r.shape[0])
    for t in range(r.shape[1] - 1, -1, -1):
        delta = r[:, t] + gamma * next_value - V[:, t]
        advantage = torch.where(keep[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(keep[:, t], V[:, t], next_value)
        advantages[:, t] = torch.where(keep[:, t], advantage, 0.0)
    return advantages, advantages + V


@torch.no_grad()
def group_advantages_reference(rewards: Tensor, group_size: int, *, kind: str = "grpo") -> Tensor:
    """The meaning of group_advantages, in plain PyTorch."""
    r = _wide(rewards).view(-1, group_size)
    centred = r - r.mean(1, keepdim=True)
    if kind == "grpo":
        std = r.std(1, keepdim=True) if group_size > 1 else 0.0
        centred = centred / (std + 1e-4)
    elif kind == "rloo":  # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        centred = centred * (group_size / (group_size - 1))
    return centred.flatten()


def whiten_reference(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """The meaning of whiten, in plain PyTorch."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    wide = torch.where(keep, _wide(x), 0.0)
    count = keep.sum().clamp(min=1)
    mean = wide.sum() / count
    centred = torch.where(keep, wide - mean, 0.0)
    white = centred * torch.rsqrt(centred.square().sum() / count + 1e-8)
    return white if shift_mean else torch.where(keep, white + mean, 0.0)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gae_cost(rewards: Tensor, values: Tensor, mask: Tensor | None = None, **_: Any) -> Cost:
    return Cost(flops=6 * rewards.numel(), bytes=nbytes(rewards, values, mask) + 8 * rewards.numel())


def _cost(**arguments: Any) -> Cost:
    given = [a for a in arguments.values() if isinstance(a, Tensor)]
    return Cost(flops=8 * given[0].numel(), bytes=nbytes(*given) + 4 * given[0].numel())


def _mask(i: Inputs, B: int, T: int) -> Tensor:
    """Left and right padding, and now and then a hole."""
    at, first, length = torch.arange(T), i.randint(0, T // 4 + 1, (B, 1)), i.randint(T // 2, T + 1, (B, 1))
    return (at >= first) & (at < length) & (i.rand(B, T, dtype=torch.float32) < 0.95)


def _gae_cases() -> list[Case]:
    def case(B: int, T: int, mask: bool = True, strided: bool = False, tags: str = "", **more: Any) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            arguments = {"rewards": i.randn(B, T, scale=0.1), "values": i.randn(B, T + strided)[:, :T]}
            return arguments | ({"mask": _mask(i, B, T)} if mask else {}) | more

        kind = "-mask" * mask + "-strided" * strided
        return Case("-".join([f"{B}x{T}{kind}", *(f"{k}={v}" for k, v in more.items())]), make, frozenset(tags.split()))

    return [
        case(3, 37),
        case(5, 64, mask=False, gamma=0.99),
        case(17, 100, strided=True, lam=1.0),
        case(2, 1),
        case(0, 8),
        case(64, 512, tags="bench"),
    ]


def _group_cases() -> list[Case]:
    def case(n: int, size: int, kind: str, tags: str = "") -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            return {"rewards": i.randn(n * size), "group_size": size, "kind": kind}

        return Case(f"{n}x{size}-{kind}", make, frozenset(tags.split()))

    return [*(case(5, 8, kind) for kind in GROUP_KINDS), case(3, 2, "rloo"), case(8, 8, "grpo", tags="bench")]


def _whiten_cases() -> list[Case]:
    def case(B: int, T: int, mask: bool = True, tags: str = "", **more: Any) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            return {"x": i.randn(B, T, scale=3, shift=1)} | ({"mask": _mask(i, B, T)} if mask else {}) | more

        name = f"{B}x{T}" + "-mask" * mask + "".join(f"-{k}={v}" for k, v in more.items())
        return Case(name, make, frozenset(tags.split()))

    return [case(3, 37), case(4, 65, mask=False), case(3, 37, shift_mean=False), case(64, 512, tags="bench")]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    backend: str | None = None,
) -> Any:
    """(advantages, returns), each (B, T). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit and numbers outside [0, 1]; BackendError where `backend`
    can't serve the call.
    """
    require(
        rewards.dim() == 2 and rewards.is_floating_point(),
        lambda: f"gae: expected rewards (B, T) of floats, got {shape(rewards)}",
    )
    require(
        values.shape == rewards.shape and values.is_floating_point(),
        lambda: f"gae: expected values like rewards {shape(rewards)}, got {shape(values)}",
    )
    _check_mask("gae", rewards, mask)
    require(0 <= gamma <= 1 and 0 <= lam <= 1, lambda: f"gae: expected gamma and lam in [0, 1], got {gamma} and {lam}")
    arguments = dict(rewards=rewards.detach(), values=values.detach(), mask=mask, gamma=gamma, lam=lam)
    backend, as_op = library.route("advantages.gae", backend, arguments)
    if as_op:
        return _gae(**arguments, backend=backend)
    return dispatch.run("advantages.gae", backend, gae_reference, rewards, **arguments)


def group_advantages(rewards: Tensor, group_size: int, *, kind: str = "grpo", backend: str | None = None) -> Any:
    """The advantage of each answer in its group, (N). Formula: the top of this page.

    Raises ValueError for rewards that aren't (N) of whole groups, an unknown kind, and "rloo" in groups of one;
    BackendError where `backend` has no kernel.
    """
    require(kind in GROUP_KINDS, lambda: f"group_advantages: expected kind in {', '.join(GROUP_KINDS)}, got {kind!r}")
    least = 2 if kind == "rloo" else 1
    require(group_size >= least, lambda: f"group_advantages: expected group_size >= {least}, got {group_size}")
    require(
        rewards.dim() == 1 and rewards.is_floating_point() and rewards.numel() % group_size == 0,
        lambda: f"group_advantages: expected rewards (N) of floats in groups of {group_size}, got {shape(rewards)}",
    )
    arguments = dict(rewards=rewards.detach(), group_size=group_size, kind=kind)
    return dispatch.as_reference_compiled(
        "advantages.group_advantages", backend, group_advantages_reference, rewards, **arguments
    )


def whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, backend: str | None = None) -> Any:
    """x with mean 0 and variance 1 over the mask, like x. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for a mask that doesn't fit; BackendError where `backend` has no kernel.
    """
    require(x.is_floating_point(), lambda: f"whiten: expected x of floats, got {shape(x)}")
    _check_mask("whiten", x, mask)
    arguments = dict(x=x, mask=mask, shift_mean=shift_mean)
    return dispatch.as_reference_compiled("advantages.whiten", backend, whiten_reference, x, **arguments)


def _check_mask(op: str, x: Tensor, mask: Tensor | None) -> None:
    require(
        mask is None or (mask.shape == x.shape and mask.dtype == torch.bool),
        lambda: f"{op}: expected mask {tuple(x.shape)} of bool, got {shape(mask)}",
    )


def _take(arguments: Any, b: int) -> dict[str, Any]:
    return map_tensors(lambda t: t[b : b + 1], arguments)


def _gae_values(backend: str | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    return dispatch.run("advantages.gae", backend, gae_reference, arguments["rewards"], **arguments)


def _gae_shapes(rewards: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return rewards.new_empty(rewards.shape, dtype=wide), rewards.new_empty(rewards.shape, dtype=wide)


_gae = library.define(
    "gae(Tensor rewards, Tensor values, Tensor? mask, float gamma, float lam, str? backend) -> (Tensor, Tensor)",
    *(_gae_values, _gae_shapes),
)

OPS = [
    Op("gae", gae, gae_reference, gae_cost, _gae_cases, take=_take),
    Op("group_advantages", group_advantages, group_advantages_reference, _cost, _group_cases, kernels=("triton",)),
    Op("whiten", whiten, whiten_reference, _cost, _whiten_cases, kernels=("triton",)),
]
