"""The policy and value losses: forward and gradient in one pass, so that a backward only multiplies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, empty, pointer, rows, threads, unsupported

KL_KINDS = {"k1": 1, "k2": 2, "k3": 3}


def alike(*tensors: Tensor) -> list[Tensor]:
    """All of one dtype: as they are, or in fp32."""
    return list(tensors) if len({t.dtype for t in tensors}) == 1 else [t.float() for t in tensors]


def with_stride(x: Tensor) -> tuple[Tensor, int]:
    """(B, T) as rows without a gradient, and their stride."""
    return rows(x.detach())


def mask_rows(mask: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if mask is None else rows(mask)


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
    return unsupported(logprobs, old_logprobs, advantages, reference_logprobs, backward=True)


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
    reference = () if reference_logprobs is None else (reference_logprobs,)
    given = [with_stride(t) for t in alike(logprobs, old_logprobs, *reference)]
    (logprobs, logprobs_stride), (old, old_stride), *more = given
    reference, reference_stride = more[0] if more else (None, 0)
    per_token = advantages.dim() == 2
    advantages, advantages_stride = with_stride(advantages.detach().to(logprobs.dtype))
    mask, mask_stride = mask_rows(mask)
    by = empty((B, T), torch.float32) if gradient else None
    results, sums, counts = torch.empty(6), torch.empty(B, 8, dtype=torch.float64), torch.empty(B, dtype=torch.int64)
    _cpu.policy_loss(
        threads(logprobs.numel()),
        gradient=pointer(by),
        results=results.data_ptr(),
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        logprobs=logprobs.data_ptr(),
        old_logprobs=old.data_ptr(),
        reference_logprobs=pointer(reference),
        advantages=advantages.data_ptr(),
        mask=pointer(mask),
        rows=B,
        cols=T,
        logprobs_stride=logprobs_stride,
        old_stride=old_stride,
        reference_stride=reference_stride,
        advantages_stride=advantages_stride if per_token else 1,
        mask_stride=mask_stride,
        advantages_step=int(per_token),
        denominator=denominator or 0.0,
        low=1 - clip,
        high=1 + (clip if clip_high is None else clip_high),
        beta=beta,
        kind=KL_KINDS[kl],
        sequences=normalise == "sequences",
        dtype=DTYPES[logprobs.dtype],
    )
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
    return unsupported(values, old_values, returns, backward=True)


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
    (values, values_stride), (old, old_stride), (returns, returns_stride) = map(
        with_stride, alike(values, old_values, returns)
    )
    mask, mask_stride = mask_rows(mask)
    by = empty((B, T), torch.float32) if gradient else None
    results, sums, counts = torch.empty(2), torch.empty(B, 2, dtype=torch.float64), torch.empty(B, dtype=torch.int64)
    _cpu.value_loss(
        threads(values.numel()),
        gradient=pointer(by),
        results=results.data_ptr(),
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        values=values.data_ptr(),
        old_values=old.data_ptr(),
        returns=returns.data_ptr(),
        mask=pointer(mask),
        rows=B,
        cols=T,
        values_stride=values_stride,
        old_stride=old_stride,
        returns_stride=returns_stride,
        mask_stride=mask_stride,
        denominator=denominator or 0.0,
        clip=clip,
        dtype=DTYPES[values.dtype],
    )
    return results.unbind() if by is None else (results[0].clone(), by, results[1:].clone())


supports_value_loss_forward = supports_value_loss


def value_loss_forward(**arguments: Any) -> tuple[Tensor, ...]:
    return value_loss(**arguments, gradient=True)
