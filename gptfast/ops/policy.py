"""The losses of PPO, GRPO and RLOO: the clipped policy loss with its statistics, the clipped value loss, KL estimates.

    rho = exp(clamp(logprobs - old_logprobs, -20, 20))        k = clamp(logprobs - reference_logprobs, -20, 20)
    l   = max(-A rho, -A clamp(rho, 1 - clip, 1 + clip_high)) + beta kl(k)
    policy_loss = sum of l over the tokens of the mask / denominator                                     ("tokens")
                = sum over sequences of the mean of l over the sequence's tokens / denominator        ("sequences")
    kl: "k1" k      "k2" k^2 / 2      "k3" exp(-k) - 1 + k
    value_loss  = 1/2 sum of max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / denominator

Schulman et al.: Proximal Policy Optimization (arXiv:1707.06347), eq. 7; the value loss as in OpenAI's baselines; KL
estimators: Schulman, Approximating KL Divergence (2020). GRPO, Shao et al. (arXiv:2402.03300), eq. 3 and 4, is
"sequences" with beta and k3; DAPO (arXiv:2503.14476), eq. 8 and 10, "tokens" with clip_high > clip; Dr. GRPO (Liu et
al., arXiv:2503.20783) "tokens" with denominator = B times the longest completion that is allowed; RLOO is its
advantages (gptfast/ops/advantages.py).

logprobs              (B, T)  of the tokens under the policy that is trained; float32, bfloat16 or float16 (float64 on
                      the reference); it and values are the only tensors that get a gradient, kl_estimate's too
old_logprobs          (B, T)  of the policy that sampled them
reference_logprobs    (B, T)  of the model that beta keeps it near; needed where beta isn't 0
advantages            (B, T), or (B): one for each sequence
values, old_values, returns   (B, T)
mask                  (B, T) bool, True where a token counts, or None: all do. Elsewhere anything may stand, NaN too
denominator           None: the tokens of the mask (at least 1), or B with "sequences"; a number where other batches or
                      processes have their part in the mean
the results           () float32 (float64 for float64), whatever came in

Statistics are means over the mask's tokens, without gradients: clip_fraction (where the clamped term is the larger),
approx_kl (rho - 1 - log rho, k3 of the sampling policy), ratio_mean, ratio_var (biased), kl (0 without a reference). A
mask without a token gives 0 everywhere. Where the log-ratio is beyond 20 its gradient is 0. A token's terms are fp32,
their sums fp64 in the order of rows and columns.

Where TRL differs: PPO's approxkl is half the mean of squared log-ratios, padding included, and its ratios' mean and
variance are over batches; GRPO's clip ratio counts by the sign of A (the same but where A is 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.ops import dispatch, policy_gradients
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, map_tensors, nbytes

FARTHEST = 20.0  # of a log-ratio: e^20 is what a ratio of 1 may become before something is wrong
KL_KINDS = ("k1", "k2", "k3")


class PolicyLoss(NamedTuple):
    """policy_loss's results, each (); all but the loss are statistics."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_var: Tensor
    kl: Tensor


class ValueLoss(NamedTuple):
    """value_loss's results, each ()."""

    loss: Tensor
    clip_fraction: Tensor


def kl_estimate_reference(logprobs: Tensor, reference_logprobs: Tensor, *, kind: str = "k3") -> Tensor:
    """The meaning of kl_estimate, in plain PyTorch."""
    k = (_wide(logprobs) - _wide(reference_logprobs)).clamp(-FARTHEST, FARTHEST)
    return k if kind == "k1" else k.square() / 2 if kind == "k2" else torch.expm1(-k) + k


def policy_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    normalise: str = "tokens",
    denominator: float | None = None,
) -> PolicyLoss:
    """The meaning of policy_loss, in plain PyTorch."""
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    A = _wide(advantages.detach())
    A = torch.where(keep, A[:, None] if A.dim() == 1 else A, 0.0)
    log_ratio = torch.where(keep, _wide(logprobs) - _wide(old_logprobs.detach()), 0.0).clamp(-FARTHEST, FARTHEST)
    ratio = log_ratio.exp()
    plain, clamped = -A * ratio, -A * ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    tokens = torch.maximum(plain, clamped)
    count = keep.sum().clamp(min=1)
    divergence = tokens.new_zeros(())
    if reference_logprobs is not None:
        given = (logprobs, reference_logprobs.detach())
        estimate = kl_estimate_reference(*(torch.where(keep, _wide(x), 0.0) for x in given), kind=kl)
        tokens, divergence = tokens + beta * estimate, estimate.detach().sum() / count
    if normalise == "sequences":
        rows = tokens.sum(1) / keep.sum(1).clamp(min=1)
        loss = rows.sum() / (max(logprobs.shape[0], 1) if denominator is None else denominator)
    else:
        loss = tokens.sum() / (count if denominator is None else denominator)
    apart, log_ratio = torch.where(keep, ratio.detach() - 1, 0.0), log_ratio.detach()
    mean = apart.sum() / count
    return PolicyLoss(
        loss,
        (keep & (clamped > plain)).sum().to(A.dtype) / count,
        (torch.expm1(log_ratio) - log_ratio).sum() / count,
        mean + keep.any(),
        torch.where(keep, (apart - mean).square(), 0.0).sum() / count,
        divergence,
    )


def value_loss_reference(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    denominator: float | None = None,
) -> ValueLoss:
    """The meaning of value_loss, in plain PyTorch."""
    keep = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    V, old, R = (torch.where(keep, _wide(x), 0.0) for x in (values, old_values.detach(), returns.detach()))
    plain, clamped = (V - R).square(), (V.clamp(old - clip, old + clip) - R).square()
    count = keep.sum().clamp(min=1)
    loss = 0.5 * torch.maximum(plain, clamped).sum() / (count if denominator is None else denominator)
    return ValueLoss(loss, (keep & (clamped > plain)).sum().to(V.dtype) / count)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _cost(**arguments: Any) -> Cost:
    """Everything is read once; of a loss that is to be differentiated, the gradient would be written."""
    given = [a for a in arguments.values() if isinstance(a, Tensor)]
    return Cost(flops=40 * given[0].numel(), bytes=nbytes(*given))


def _mask(i: Inputs, *size: int) -> Tensor:
    """Left and right padding, and now and then a hole."""
    B, T = size
    at, first, length = torch.arange(T), i.randint(0, T // 4 + 1, (B, 1)), i.randint(T // 2, T + 1, (B, 1))
    return (at >= first) & (at < length) & (i.rand(B, T, dtype=torch.float32) < 0.95)


def _policy_cases() -> list[Case]:
    def case(
        B: int, T: int, mask: bool = True, rows: bool = False, ref: bool = False, tags: str = "", **more: Any
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            old = i.randn(B, T, scale=0.5, shift=-2)
            arguments: dict[str, Any] = {
                "logprobs": old + i.randn(B, T, scale=0.15),
                "old_logprobs": old,
                "advantages": i.randn(B) if rows else i.randn(B, T),
                **({"mask": _mask(i, B, T)} if mask else {}),
                **({"reference_logprobs": old + i.randn(B, T, scale=0.3)} if ref else {}),
            }
            return arguments | more

        kind = "-mask" * mask + "-rows" * rows + "-reference" * ref
        return Case("-".join([f"{B}x{T}{kind}", *(f"{k}={v}" for k, v in more.items())]), make, frozenset(tags.split()))

    return [
        case(3, 37),
        case(5, 64, mask=False, rows=True, clip_high=0.28),
        case(4, 129, rows=True, ref=True, beta=0.04, normalise="sequences"),
        case(2, 1000, ref=True, beta=0.1, kl="k1"),
        case(7, 33, ref=True, beta=0.1, kl="k2", denominator=100.0),
        case(64, 512, ref=True, beta=0.04, tags="bench"),
        case(1, 1, mask=False),
    ]  # fmt: skip


def _value_cases() -> list[Case]:
    def case(B: int, T: int, mask: bool = True, tags: str = "", **more: Any) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            old = i.randn(B, T)
            arguments = {"values": old + i.randn(B, T, scale=0.3), "old_values": old, "returns": i.randn(B, T)}
            return arguments | ({"mask": _mask(i, B, T)} if mask else {}) | more

        name = "-".join([f"{B}x{T}" + "-mask" * mask, *(f"{k}={v}" for k, v in more.items())])
        return Case(name, make, frozenset(tags.split()))

    return [
        case(3, 37),
        case(5, 64, mask=False, clip=0.5),
        case(2, 1000, denominator=77.0),
        case(1, 1, mask=False),
        case(64, 512, tags="bench"),
    ]


def _kl_cases() -> list[Case]:
    def make(i: Inputs) -> dict[str, Any]:
        policy = i.randn(4, 33, shift=-2)
        return {"logprobs": policy, "reference_logprobs": policy + i.randn(4, 33, scale=0.3)}

    def case(name: str, tags: str = "", **more: Any) -> Case:
        return Case(name, lambda i: make(i) | more, frozenset(tags.split()))

    return [case("k1", kind="k1"), case("k2", kind="k2"), case("k3", tags="bench")]


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    reference_logprobs: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    normalise: str = "tokens",
    denominator: float | None = None,
    backend: str | None = None,
) -> Any:
    """PolicyLoss(loss, statistics). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit, numbers out of range and beta without a reference;
    BackendError where `backend` can't serve the call.
    """
    _check("policy_loss", mask, logprobs=logprobs, old_logprobs=old_logprobs, reference_logprobs=reference_logprobs)
    require(
        advantages.shape in (logprobs.shape, logprobs.shape[:1]) and advantages.is_floating_point(),
        lambda: f"policy_loss: expected advantages {tuple(logprobs.shape)} or (B), got {shape(advantages)}",
    )
    require(0 <= clip <= 1, lambda: f"policy_loss: expected clip in [0, 1], got {clip}")
    require(clip_high is None or clip_high >= 0, lambda: f"policy_loss: expected clip_high >= 0, got {clip_high}")
    require(kl in KL_KINDS, lambda: f"policy_loss: expected kl as one of {', '.join(KL_KINDS)}, got {kl!r}")
    require(beta == 0 or reference_logprobs is not None, "policy_loss: expected reference_logprobs beside beta")
    require(
        normalise in ("tokens", "sequences"),
        lambda: f"policy_loss: expected normalise 'tokens' or 'sequences', got {normalise!r}",
    )
    _check_denominator("policy_loss", denominator)
    arguments = {
        "logprobs": logprobs, "old_logprobs": old_logprobs.detach(), "advantages": advantages.detach(), "mask": mask,
        "clip": clip, "clip_high": clip_high,
        "reference_logprobs": None if reference_logprobs is None else reference_logprobs.detach(),
        "beta": beta, "kl": kl, "normalise": normalise, "denominator": denominator,
    }  # fmt: skip
    found = _policy_loss.run(backend, **arguments)
    return found if isinstance(found, dispatch.Choice) else PolicyLoss(*found)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float = 0.2,
    denominator: float | None = None,
    backend: str | None = None,
) -> Any:
    """ValueLoss(loss, clip_fraction). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit and numbers out of range; BackendError where `backend` can't
    serve the call.
    """
    _check("value_loss", mask, values=values, old_values=old_values, returns=returns)
    require(clip >= 0, lambda: f"value_loss: expected clip >= 0, got {clip}")
    _check_denominator("value_loss", denominator)
    arguments = {
        "values": values, "old_values": old_values.detach(), "returns": returns.detach(), "mask": mask, "clip": clip,
        "denominator": denominator,
    }  # fmt: skip
    found = _value_loss.run(backend, **arguments)
    return found if isinstance(found, dispatch.Choice) else ValueLoss(*found)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, *, kind: str = "k3", backend: str | None = None) -> Any:
    """An estimate of KL(policy, reference) for each token that the policy sampled, of any shape. Formula: the top of
    this page.

    Raises ValueError for shapes that differ and an unknown kind; BackendError where `backend` has no kernel.
    """
    require(
        logprobs.shape == reference_logprobs.shape and logprobs.is_floating_point(),
        lambda: f"kl_estimate: expected floats of one shape, got {shape(logprobs)} and {shape(reference_logprobs)}",
    )
    require(kind in KL_KINDS, lambda: f"kl_estimate: expected kind as one of {', '.join(KL_KINDS)}, got {kind!r}")
    return _kl_estimate.run(backend, logprobs=logprobs, reference_logprobs=reference_logprobs.detach(), kind=kind)


def _check(op: str, mask: Tensor | None, **tensors: Tensor | None) -> None:
    name, first = next(iter(tensors.items()))
    if first is None or first.dim() != 2 or not first.is_floating_point():
        raise ValueError(f"{op}: expected {name} (B, T) of floats, got {shape(first)}")
    for other, t in tensors.items():
        if t is not None and (t.shape != first.shape or not t.is_floating_point()):
            raise ValueError(f"{op}: expected {other} like {name} {shape(first)}, got {shape(t)}")
    if mask is not None and (mask.shape != first.shape or mask.dtype != torch.bool):
        raise ValueError(f"{op}: expected mask {tuple(first.shape)} of bool, got {shape(mask)}")


def _check_denominator(op: str, denominator: float | None) -> None:
    require(denominator is None or denominator > 0, lambda: f"{op}: expected denominator > 0, got {denominator}")


def _op(
    function: Callable[..., Any], reference: Callable[..., Any], cases: Callable[[], list[Case]], **more: Any
) -> Op:
    return Op(function.__name__, function, reference, _cost, cases, **more)


def _like(argument: str) -> dict[str, Any]:
    """Its gradients, and theirs."""
    return {"differentiable": (argument,), "double_backward": True}


def _take(arguments: Any, b: int) -> dict[str, Any]:
    return map_tensors(lambda t: t[b : b + 1], arguments)


_policy_loss = policy_gradients.register(
    "policy.policy_loss",
    "Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? mask, float clip, float? clip_high, "
    "Tensor? reference_logprobs, float beta, str kl, str normalise, float? denominator",
    *(["logprobs"], lambda given: ((), (5,)), policy_loss_reference),
)
_value_loss = policy_gradients.register(
    "policy.value_loss",
    "Tensor values, Tensor old_values, Tensor returns, Tensor? mask, float clip, float? denominator",
    *(["values"], lambda given: ((), (1,)), value_loss_reference),
)
_kl_estimate = policy_gradients.register(
    "policy.kl_estimate",
    "Tensor logprobs, Tensor reference_logprobs, str kind",
    *(["logprobs"], lambda given: (given["logprobs"].shape, (0,)), kl_estimate_reference),
    compiled=False,
)

OPS = [
    _op(policy_loss, policy_loss_reference, _policy_cases, **_like("logprobs")),
    _op(value_loss, value_loss_reference, _value_cases, **_like("values")),
    _op(kl_estimate, kl_estimate_reference, _kl_cases, kernels=("triton",), take=_take, **_like("logprobs")),
]
