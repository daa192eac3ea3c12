"""The losses of preferences: one launch for the loss, its gradients and the rewards, so that a backward only
multiplies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.triton import elsewhere, empty, launch, preference_kernels, unsupported
from gptfast.kernels.triton.preference_kernels import _kto_loss_kernel, _pair_losses_kernel
from gptfast.kernels.triton.tiles import sequence_tile

DPO_KINDS = {name: getattr(preference_kernels, name.upper()).value for name in ("sigmoid", "robust", "ipo", "hinge")}


def flat(t: Tensor | None) -> Tensor | None:
    """(N) without gradient and gaps."""
    return None if t is None else t.detach().contiguous()


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None = None,
    reference_rejected: Tensor | None = None,
    margin: Tensor | None = None,
    *,
    kind: int,
    beta: float = 1.0,
    gamma: float = 0.0,
    smoothing: float = 0.0,
    centring: float = 0.0,
    rewards: int,
    reduction: str,
    gradient: bool,
) -> Any:
    """The loss and the rewards; with `gradient` the loss, its gradients (2, N), and the rewards (2, N) or (0)."""
    N, is_mean = chosen.shape[0], reduction == "mean"
    loss = empty(() if is_mean else (N,), torch.float32, chosen)
    by = empty((2, N), torch.float32, chosen) if gradient else None
    implied = empty((rewards, N), torch.float32, chosen) if rewards else None
    launch(
        _pair_losses_kernel,
        (1 if N or is_mean else 0,),
        *map(flat, (chosen, rejected, reference_chosen, reference_rejected, margin)),
        *(loss, by, implied, N, float(beta), float(gamma), float(smoothing), float(centring)),
        KIND=kind,
        HAS_CHOSEN=reference_chosen is not None,
        HAS_REJECTED=reference_rejected is not None,
        HAS_MARGIN=margin is not None,
        HAS_REWARDS=implied is not None,
        IS_MEAN=is_mean,
        USE_GRADIENT=gradient,
        tile=sequence_tile(N),
    )
    return given_back(loss, by, implied)


def given_back(loss: Tensor, by: Tensor | None, implied: Tensor | None) -> Any:
    if by is not None:
        return loss, by, empty((0,), torch.float32, loss) if implied is None else implied
    return loss if implied is None else (loss, *implied.unbind())


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None,
    centring: float,
    reduction: str,
    gradient: bool = False,
) -> Any:
    more: dict[str, Any] = {"centring": centring, "reduction": reduction, "gradient": gradient}
    return pair_loss(chosen, rejected, margin=margin, kind=preference_kernels.REWARD.value, rewards=0, **more)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | None,
    reference_rejected: Tensor | None,
    beta: float,
    kind: str,
    label_smoothing: float,
    reduction: str,
    gradient: bool = False,
) -> Any:
    more: dict[str, Any] = {"smoothing": label_smoothing, "reduction": reduction, "gradient": gradient}
    references = (reference_chosen, reference_rejected)
    return pair_loss(chosen, rejected, *references, kind=DPO_KINDS[kind], beta=beta, rewards=2, **more)


def simpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, gamma: float, reduction: str, gradient: bool = False
) -> Any:
    more: dict[str, Any] = {"beta": beta, "gamma": gamma, "reduction": reduction, "gradient": gradient}
    return pair_loss(chosen, rejected, kind=preference_kernels.SIGMOID.value, rewards=2, **more)


def orpo_loss(chosen: Tensor, rejected: Tensor, reduction: str, gradient: bool = False) -> Any:
    more: dict[str, Any] = {"reduction": reduction, "gradient": gradient}
    return pair_loss(chosen, rejected, kind=preference_kernels.ORPO.value, rewards=0, **more)


def kto_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor | None,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: str,
    gradient: bool = False,
) -> Any:
    """The loss and the rewards; with `gradient` the loss, its gradient (N), and the rewards (1, N)."""
    N, is_mean = logprobs.shape[0], reduction == "mean"
    loss = empty(() if is_mean else (N,), torch.float32, logprobs)
    by = empty((N,), torch.float32, logprobs) if gradient else None
    implied = empty((1, N), torch.float32, logprobs)
    launch(
        _kto_loss_kernel,
        (1 if N or is_mean else 0,),
        *map(flat, (logprobs, reference_logprobs, desirable.view(torch.uint8), kl)),
        *(loss, by, implied, N, 0 if kl is None else kl.shape[0]),
        *(float(beta), float(desirable_weight), float(undesirable_weight)),
        HAS_KL=kl is not None,
        IS_MEAN=is_mean,
        USE_GRADIENT=gradient,
        tile=sequence_tile(N),
    )
    return given_back(loss, by, implied)


def supports(*sequences: Tensor | None, **numbers: Any) -> str | None:
    """Of any of these losses: what it is given by name too."""
    given = [t for t in (*sequences, *numbers.values()) if isinstance(t, Tensor)]
    return elsewhere(*given) or unsupported(*(t for t in given if t.dtype != torch.bool), backward=True)


def _forward(loss: Callable[..., Any]) -> Callable[..., Any]:
    return partial(loss, gradient=True)


reward_loss_forward, dpo_loss_forward, simpo_loss_forward, orpo_loss_forward, kto_loss_forward = map(
    _forward, (reward_loss, dpo_loss, simpo_loss, orpo_loss, kto_loss)
)
