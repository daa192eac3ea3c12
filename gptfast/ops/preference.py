"""Losses on pairs and on judged answers: the reward model's, DPO with its variants, SimPO, ORPO, KTO.

Each works on one number for a sequence: a score, or the log-probability that a model gives to its completion, the sum
over the completion's tokens (the mean where it says so). h is what the loss wants large:

    reward_loss    h = r_chosen - r_rejected - margin:  -log sigmoid(h) + centring (r_chosen + r_rejected)^2
                   Bradley and Terry (1952); Ouyang et al. (arXiv:2203.02155), eq. 1; margin: Touvron et al.
                   (arXiv:2307.09288), eq. 2; centring: Eisenstein et al. (arXiv:2312.09244)
    dpo_loss       d = (chosen - reference_chosen) - (rejected - reference_rejected),  h = beta d,  e = label_smoothing
        "sigmoid"  -(1 - e) log sigmoid(h) - e log sigmoid(-h)       Rafailov et al. (arXiv:2305.18290), eq. 7; with
                   e > 0 the conservative DPO of Mitchell's note, eq. 3
        "robust"   (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2 e)     Chowdhury et al. (arXiv:2403.00409)
        "ipo"      (d - 1 / (2 beta))^2                              Azar et al. (arXiv:2310.12036), eq. 17
        "hinge"    max(0, 1 - h)                                     Zhao et al., SLiC (arXiv:2305.10425)
    simpo_loss     h = beta (chosen - rejected) - gamma, of mean log-probabilities:  -log sigmoid(h)
                   Meng et al. (arXiv:2405.14734), eq. 6
    orpo_loss      h = log odds(chosen) - log odds(rejected), of mean log-probabilities, odds(p) = p / (1 - p):
                   -log sigmoid(h), what is added lambda times to the chosen answers' cross-entropy.
                   Hong et al. (arXiv:2403.07691), eq. 6 and 7
    kto_loss       a = logprobs - reference_logprobs,  z = max(0, mean(kl)):  w_d (1 - sigmoid(beta (a - z))) where
                   desirable, w_u (1 - sigmoid(beta (z - a))) elsewhere. Ethayarajh et al. (arXiv:2402.01306)

chosen, rejected, logprobs (N)  float32, bfloat16 or float16 (float64 on the reference)
reference_*                (N)  the same of the reference model, or None: zeros (a reference that is uniform)
margin                     (N)  how much better the chosen answer is, or None: zeros
desirable                  (N)  bool: whether the answer was judged good
kl                         (M)  a of answers to other prompts, or None: z = 0
reduction                  "mean", or "none": a loss (N) for each

Losses come in float32 (float64 for float64), whatever came in: they are sums over a batch. dpo_loss, simpo_loss and
kto_loss also give the implied rewards, beta (ours - the reference's), without gradients. chosen, rejected and logprobs
get gradients, nothing else does. Means are sums in fp64 on a GPU; on a CPU all of it is plain PyTorch.

Where TRL differs: its "ipo" divides log-probabilities by the completions' lengths, so give mean ones for that; its
"sigmoid" has no label smoothing; its kto_loss averages kl over all processes; its orpo_loss is lambda times ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.ops import policy_gradients
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, map_tensors, nbytes

DPO_KINDS = ("sigmoid", "robust", "ipo", "hinge")


def reward_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    centring: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The meaning of reward_loss, in plain PyTorch."""
    c, r = _wide(chosen), _wide(rejected)
    h = c - r if margin is None else c - r - _wide(margin)
    loss = -F.logsigmoid(h)
    if centring:
        loss = loss + centring * (c + r).square()
    return _reduced(loss, reduction)


def dpo_loss_reference(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of dpo_loss, in plain PyTorch."""
    c = _wide(chosen) if reference_chosen is None else _wide(chosen) - _wide(reference_chosen)
    r = _wide(rejected) if reference_rejected is None else _wide(rejected) - _wide(reference_rejected)
    h, e = beta * (c - r), label_smoothing
    if kind in ("sigmoid", "robust"):
        loss = -F.logsigmoid(h)
        if e:  # without it an infinite h, a rejected answer of probability 0, isn't multiplied by 0
            other = e * F.logsigmoid(-h)
            loss = (1 - e) * loss - other if kind == "sigmoid" else ((1 - e) * loss + other) / (1 - 2 * e)
    elif kind == "ipo":
        loss = (c - r - 1 / (2 * beta)).square()
    else:
        loss = F.relu(1 - h)
    return _reduced(loss, reduction), beta * c.detach(), beta * r.detach()


def simpo_loss_reference(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0, reduction: str = "mean"
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of simpo_loss, in plain PyTorch."""
    c, r = _wide(chosen), _wide(rejected)
    loss = -F.logsigmoid(beta * (c - r) - gamma)
    return _reduced(loss, reduction), beta * c.detach(), beta * r.detach()


def orpo_loss_reference(chosen: Tensor, rejected: Tensor, *, reduction: str = "mean") -> Tensor:
    """The meaning of orpo_loss, in plain PyTorch."""
    c, r = _wide(chosen), _wide(rejected)
    return _reduced(-F.logsigmoid((c - r) - (_log1mexp(c) - _log1mexp(r))), reduction)


def kto_loss_reference(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The meaning of kto_loss, in plain PyTorch."""
    a = _wide(logprobs) - _wide(reference_logprobs)
    z = 0.0 if kl is None else _wide(kl).detach().mean().clamp(min=0)
    good = desirable_weight * torch.sigmoid(beta * (z - a))  # 1 - sigmoid(x) = sigmoid(-x) keeps small values
    bad = undesirable_weight * torch.sigmoid(beta * (a - z))
    return _reduced(torch.where(desirable, good, bad), reduction), beta * a.detach()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    return loss.mean() if reduction == "mean" else loss


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate near 0 and far from it (Maechler 2012, eq. 7); each branch gets an x for
    which its gradient is finite."""
    near = x > -0.6931471805599453
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -0.5))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def _cost(**arguments: Any) -> Cost:
    given = [a for a in arguments.values() if isinstance(a, Tensor)]
    return Cost(flops=30 * given[0].numel(), bytes=nbytes(*given))


def _cases(make: Callable[[Inputs, int], dict[str, Any]], *options: dict[str, Any]) -> Callable[[], list[Case]]:
    def case(n: int, more: dict[str, Any], tags: str = "") -> Case:
        name = "-".join([str(n), *(f"{k}={v}" for k, v in more.items())])
        return Case(name, lambda i: make(i, n) | more, frozenset(tags.split()))

    def cases() -> list[Case]:
        whole: dict[str, Any] = {"reduction": "none"}
        return [case(7, {}), case(1, {}), *(case(33, whole | o) for o in options), case(64, {}, tags="bench")]

    return cases


def _pair(i: Inputs, n: int) -> dict[str, Any]:
    return {"chosen": i.randn(n, scale=8, shift=-60), "rejected": i.randn(n, scale=8, shift=-62)}


def _pair_and_reference(i: Inputs, n: int) -> dict[str, Any]:
    more = {"reference_chosen": i.randn(n, scale=8, shift=-60), "reference_rejected": i.randn(n, scale=8, shift=-61)}
    return _pair(i, n) | more


def _scores(i: Inputs, n: int) -> dict[str, Any]:
    return {"chosen": i.randn(n, scale=2, shift=0.5), "rejected": i.randn(n, scale=2), "margin": i.rand(n)}


def _means(i: Inputs, n: int) -> dict[str, Any]:
    return {"chosen": -i.rand(n) - 0.05, "rejected": -2 * i.rand(n) - 0.05}


def _judged(i: Inputs, n: int) -> dict[str, Any]:
    one = {"logprobs": i.randn(n, scale=8, shift=-60), "reference_logprobs": i.randn(n, scale=8, shift=-61)}
    return one | {"desirable": i.rand(n) < 0.5, "kl": i.randn(n + 3, scale=2, shift=1)}


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | None = None,
    centring: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Any:
    """The Bradley-Terry loss of a reward model's scores. Formula, shapes, dtypes: the top of this page.

    Raises ValueError for shapes that differ and for an unknown reduction; BackendError where `backend` has no kernel.
    """
    arguments = dict(chosen=chosen, rejected=rejected, margin=_constant(margin))
    _check("reward_loss", reduction, **arguments)
    return _reward_loss.run(backend, **arguments, centring=centring, reduction=reduction)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Any:
    """(loss, chosen's rewards, rejected's rewards). Formula, shapes, dtypes: the top of this page.

    Raises ValueError for shapes that differ, an unknown kind or reduction, beta <= 0, a label_smoothing outside
    [0, 1/2) or beside "ipo" or "hinge", which have none; BackendError where `backend` has no kernel.
    """
    references = dict(reference_chosen=_constant(reference_chosen), reference_rejected=_constant(reference_rejected))
    arguments = dict(chosen=chosen, rejected=rejected, **references)
    _check("dpo_loss", reduction, **arguments)
    require(kind in DPO_KINDS, lambda: f"dpo_loss: expected kind as one of {', '.join(DPO_KINDS)}, got {kind!r}")
    require(beta > 0, lambda: f"dpo_loss: expected beta > 0, got {beta}")
    smooths = label_smoothing == 0 or (kind in ("sigmoid", "robust") and 0 < label_smoothing < 0.5)
    require(
        smooths,
        lambda: f"dpo_loss: expected label_smoothing in [0, 0.5), 0 for ipo and hinge, got {label_smoothing}, {kind}",
    )
    numbers = dict(beta=beta, kind=kind, label_smoothing=label_smoothing, reduction=reduction)
    return _dpo_loss.run(backend, **arguments, **numbers)


def simpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Any:
    """(loss, chosen's rewards, rejected's rewards) of mean log-probabilities. Formula, shapes, dtypes: the top of this
    page.

    Raises ValueError for shapes that differ and an unknown reduction; BackendError where `backend` has no kernel.
    """
    _check("simpo_loss", reduction, chosen=chosen, rejected=rejected)
    numbers = dict(beta=beta, gamma=gamma, reduction=reduction)
    return _simpo_loss.run(backend, chosen=chosen, rejected=rejected, **numbers)


def orpo_loss(chosen: Tensor, rejected: Tensor, *, reduction: str = "mean", backend: str | None = None) -> Any:
    """The odds-ratio loss of mean log-probabilities, which are below 0. Formula, shapes, dtypes: the top of this page.

    Raises ValueError for shapes that differ and an unknown reduction; BackendError where `backend` has no kernel. A
    mean log-probability of 0 or more gives NaN or an infinity.
    """
    _check("orpo_loss", reduction, chosen=chosen, rejected=rejected)
    return _orpo_loss.run(backend, chosen=chosen, rejected=rejected, reduction=reduction)


def kto_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Any:
    """(loss, rewards) of answers judged one by one. Formula, shapes, dtypes: the top of this page.

    Raises ValueError for shapes that differ, desirable that isn't bool, and an unknown reduction; BackendError where
    `backend` has no kernel.
    """
    require(
        isinstance(reference_logprobs, Tensor),
        lambda: f"kto_loss: expected reference_logprobs like logprobs {shape(logprobs)}, got {reference_logprobs!r}",
    )
    arguments = dict(logprobs=logprobs, reference_logprobs=reference_logprobs.detach())
    _check("kto_loss", reduction, **arguments)
    require(
        desirable.shape == logprobs.shape and desirable.dtype == torch.bool,
        lambda: f"kto_loss: expected desirable {tuple(logprobs.shape)} of bool, got {shape(desirable)}",
    )
    require(
        kl is None or (kl.dim() == 1 and kl.numel() > 0), lambda: f"kto_loss: expected kl (M), M > 0, got {shape(kl)}"
    )
    numbers = dict(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight, reduction=reduction
    )
    return _kto_loss.run(backend, **arguments, desirable=desirable, kl=_constant(kl), **numbers)


def _check(op: str, reduction: str, **tensors: Tensor | None) -> None:
    name, first = next(iter(tensors.items()))
    require(
        isinstance(first, Tensor) and first.dim() == 1 and first.is_floating_point(),
        lambda: f"{op}: expected {name} (N) of floats, got {shape(first)}",
    )
    for other, t in tensors.items():
        if first is not None and t is not None and (t.shape != first.shape or not t.is_floating_point()):
            raise ValueError(f"{op}: expected {other} like {name} {shape(first)}, got {shape(t)}")
    require(reduction in ("mean", "none"), lambda: f"{op}: expected reduction 'mean' or 'none', got {reduction!r}")


def _results(rewards: int) -> policy_gradients.Shapes:
    """A loss, or one for each sequence, and the rewards of so many."""

    def shapes(given: dict[str, Any]) -> tuple[Sequence[int], Sequence[int]]:
        sequences = next(iter(given.values())).shape
        return () if given["reduction"] == "mean" else sequences, (rewards, *sequences) if rewards else (0,)

    return shapes


def _register(name: str, arguments: str, wanted: Sequence[str], rewards: int, reference: Any) -> policy_gradients.Loss:
    whole = (f"preference.{name}", f"{arguments}, str reduction", wanted, _results(rewards), reference)
    return policy_gradients.register(*whole, compiled=False)


PAIR = ["chosen", "rejected"]
_reward_loss = _register(
    "reward_loss",
    "Tensor chosen, Tensor rejected, Tensor? margin, float centring",
    *(PAIR, 0, reward_loss_reference),
)
_dpo_loss = _register(
    "dpo_loss",
    "Tensor chosen, Tensor rejected, Tensor? reference_chosen, Tensor? reference_rejected, float beta, str kind, "
    "float label_smoothing",
    *(PAIR, 2, dpo_loss_reference),
)
_simpo_loss = _register(
    "simpo_loss", "Tensor chosen, Tensor rejected, float beta, float gamma", PAIR, 2, simpo_loss_reference
)
_orpo_loss = _register("orpo_loss", "Tensor chosen, Tensor rejected", PAIR, 0, orpo_loss_reference)
_kto_loss = _register(
    "kto_loss",
    "Tensor logprobs, Tensor reference_logprobs, Tensor desirable, Tensor? kl, float beta, float desirable_weight, "
    "float undesirable_weight",
    *(["logprobs"], 1, kto_loss_reference),
)


def _constant(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _op(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    cases: Callable[[], list[Case]],
    differentiable: Sequence[str] = PAIR,
) -> Op:
    """Each sequence of a batch has its own loss where nothing is reduced and no kl is shared; the cases test that."""

    def take(arguments: Any, b: int) -> dict[str, Any]:
        row = map_tensors(lambda t: t[b : b + 1], arguments)
        return {**row, "kl": arguments["kl"]} if "kl" in arguments else row

    def batch(arguments: Any) -> int:
        return next(iter(arguments.values())).shape[0] if arguments.get("reduction") == "none" else 0

    of: dict[str, Any] = {"kernels": ("triton",), "take": take, "batch": batch}
    gradients: dict[str, Any] = {"differentiable": tuple(differentiable), "double_backward": True}
    return Op(function.__name__, function, reference, _cost, cases, **of, **gradients)


OPS = [
    _op(reward_loss, reward_loss_reference, _cases(_scores, {}, {"centring": 0.01})),
    _op(
        dpo_loss,
        dpo_loss_reference,
        _cases(
            _pair_and_reference,
            {"label_smoothing": 0.1},
            {"kind": "robust", "label_smoothing": 0.1},
            {"kind": "ipo"},
            {"kind": "hinge"},
        ),
    ),
    _op(simpo_loss, simpo_loss_reference, _cases(_means, {}, {"gamma": 0.3})),
    _op(orpo_loss, orpo_loss_reference, _cases(_means, {})),
    _op(kto_loss, kto_loss_reference, _cases(_judged, {}, {"undesirable_weight": 1.5}), ["logprobs"]),
]
