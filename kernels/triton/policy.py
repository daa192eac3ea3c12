"""The policy and value losses: forward and gradient in one pass, so that a backward only multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.triton import cdiv, elsewhere, empty, launch, rows, unsupported
from gptfast.kernels.triton.policy_kernels import (
    _count_tokens_kernel,
    _kl_estimate_kernel,
    _policy_results_kernel,
    _policy_rows_kernel,
    _value_results_kernel,
    _value_rows_kernel,
)
from gptfast.kernels.triton.tiles import flat_tile, sequence_tile

KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}


def with_stride(x: Tensor | None) -> tuple[Tensor | None, int]:
    """(B, T) as rows without a gradient, and their stride."""
    return (None, 0) if x is None else rows(x.detach())


def counted(mask: Tensor | None) -> tuple[Tensor | None, int, Tensor | None]:
    """A mask as bytes, its row stride, and how many tokens count in each row."""
    if mask is None:
        return None, 0, None
    mask, stride = rows(mask.view(torch.uint8))
    counts = empty(mask.shape[:1], torch.int32, mask)
    T = mask.shape[1]
    launch(_count_tokens_kernel, mask.shape[:1], mask, counts, T, stride, tile=sequence_tile(T))
    return mask, stride, counts


def supports_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: float,
    clip_high: float | None,
    reference_logprobs: Tensor | None,
    beta: float,
    kl: str,
    normalise: str,
    denominator: float | None,
) -> str | None:
    return elsewhere(mask) or unsupported(logprobs, old_logprobs, advantages, reference_logprobs, backward=True)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: float,
    clip_high: float | None,
    reference_logprobs: Tensor | None,
    beta: float,
    kl: str,
    normalise: str,
    denominator: float | None,
    gradient: bool = False,
) -> tuple[Tensor, ...]:
    """The six results; with `gradient` the loss, its gradient by logprobs, (B, T) in fp32, and the statistics (5)."""
    B, T = logprobs.shape
    tile = sequence_tile(T)
    (logprobs_, logprobs_stride), (old, old_stride), (reference, reference_stride) = (
        with_stride(t) for t in (logprobs, old_logprobs, reference_logprobs)
    )
    per_token = advantages.dim() == 2
    advantages_, advantages_stride = with_stride(advantages) if per_token else (advantages.contiguous(), 1)
    mask, mask_stride, counts = counted(mask)
    by = empty((B, T), torch.float32, logprobs) if gradient else None
    results, sums = empty((6,), torch.float32, logprobs), empty((6, B), torch.float64, logprobs)
    flags: dict[str, Any] = {
        "HAS_MASK": mask is not None,
        "HAS_DENOMINATOR": denominator is not None,
        "IS_SEQUENCES": normalise == "sequences",
    }
    numbers = (float(denominator or 0), float(1 - clip), float(1 + (clip if clip_high is None else clip_high)))
    launch(
        _policy_rows_kernel,
        (B,),
        *(logprobs_, old, reference, advantages_, mask, counts, sums, by),
        *(B, T, logprobs_stride, old_stride, reference_stride, advantages_stride, mask_stride),
        *(*numbers, float(beta)),
        HAS_REFERENCE=reference is not None,
        IS_PER_TOKEN=per_token,
        USE_GRADIENT=gradient,
        KIND=KL_KINDS[kl],
        **flags,
        tile=tile,
    )
    launch(_policy_results_kernel, (1,), sums, counts, results, B, T, numbers[0], **flags, tile=tile)
    return results.unbind() if by is None else (results[0].clone(), by, results[1:].clone())


supports_policy_loss_forward = supports_policy_loss


def policy_loss_forward(**arguments: Any) -> tuple[Tensor, ...]:
    return policy_loss(**arguments, gradient=True)


def supports_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip: float,
    denominator: float | None,
) -> str | None:
    return elsewhere(mask) or unsupported(values, old_values, returns, backward=True)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor | None,
    clip: float,
    denominator: float | None,
    gradient: bool = False,
) -> tuple[Tensor, ...]:
    """(loss, clip_fraction); with `gradient` the loss, its gradient by values, (B, T) in fp32, and the statistics
    (1)."""
    B, T = values.shape
    tile = sequence_tile(T)
    given = [with_stride(t) for t in (values, old_values, returns)]
    mask, mask_stride, counts = counted(mask)
    by = empty((B, T), torch.float32, values) if gradient else None
    results, sums = empty((2,), torch.float32, values), empty((2, B), torch.float64, values)
    flags: dict[str, Any] = {"HAS_MASK": mask is not None, "HAS_DENOMINATOR": denominator is not None}
    share = float(denominator or 0)
    launch(
        _value_rows_kernel,
        (B,),
        *(*(t for t, _ in given), mask, counts, sums, by),
        *(B, T, *(stride for _, stride in given), mask_stride, share, float(clip)),
        USE_GRADIENT=gradient,
        **flags,
        tile=tile,
    )
    launch(_value_results_kernel, (1,), sums, counts, results, B, T, share, **flags, tile=tile)
    return results.unbind() if by is None else (results[0].clone(), by, results[1:].clone())


supports_value_loss_forward = supports_value_loss


def value_loss_forward(**arguments: Any) -> tuple[Tensor, ...]:
    return value_loss(**arguments, gradient=True)


def supports_kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: str) -> str | None:
    return unsupported(logprobs, reference_logprobs, backward=True)


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, kind: str, gradient: bool = False) -> Any:
    """The estimates; with `gradient` those, the gradients by logprobs, both in fp32, and nothing."""
    n, tile = logprobs.numel(), flat_tile()
    estimate = empty(logprobs.shape, torch.float32, logprobs)
    by = torch.empty_like(estimate) if gradient else None
    launch(
        _kl_estimate_kernel,
        (cdiv(n, tile.blocks["BLOCK"]),),
        *(logprobs.detach().contiguous(), reference_logprobs.detach().contiguous(), estimate, by, n),
        KIND=KL_KINDS[kind],
        USE_GRADIENT=gradient,
        tile=tile,
    )
    return estimate if by is None else (estimate, by, empty((0,), torch.float32, logprobs))


supports_kl_estimate_forward = supports_kl_estimate


def kl_estimate_forward(**arguments: Any) -> Any:
    return kl_estimate(**arguments, gradient=True)
