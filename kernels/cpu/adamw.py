"""adamw and gradient_norm: lists of tensors as lists of addresses."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, threads

CHUNK = 8192  # as in adamw.cpp


def supports_gradient_norm(grads: Sequence[Tensor]) -> str | None:
    return _unsupported(grads)


def gradient_norm(grads: Sequence[Tensor]) -> Tensor:
    grads = [g if _is_dense(g) else g.contiguous() for g in grads]
    sizes, starts = _chunks(grads)
    # The last one is the norm.
    sums = torch.empty(starts[-1] + 1, dtype=torch.float64)
    addresses, dtypes = _addresses(grads), _dtypes(grads)
    _cpu.gradient_norm(
        threads(sum(sizes)),
        norm=sums.data_ptr() + 8 * starts[-1],
        sums=sums.data_ptr(),
        grads=_at(addresses),
        starts=_at(starts),
        sizes=_at(sizes),
        grad_dtypes=_at(dtypes),
        tensors=len(grads),
    )
    return sums[-1].float()


def supports(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    masters: Sequence[Tensor | None] | None,
    **_: Any,
) -> str | None:
    kept = [t for t in masters or () if t is not None]
    if reason := _unsupported(params, grads, exp_avgs, exp_avg_sqs, kept):
        return reason
    if any(not s.is_cpu or s.dtype != torch.float32 for s in steps):
        return "steps must be float32 on the CPU"
    for i, (p, m, v) in enumerate(zip(params, exp_avgs, exp_avg_sqs)):
        master = p if masters is None else masters[i]
        strides = p.stride()
        if not _is_dense(p) or m.stride() != strides or v.stride() != strides:
            return "a parameter and its moments must lie alike, without gaps"
        if master is not None and master.stride() != strides:
            return "a parameter and its master must lie alike"
    return None


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float,
    masters: Sequence[Tensor | None] | None,
) -> None:
    grads = [
        g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g) for p, g in zip(params, grads)
    ]
    torch._foreach_add_(list(steps), 1)  # pyright: ignore[reportPrivateImportUsage]
    sizes, starts = _chunks(params)
    kept = None if masters is None else _addresses(masters)
    lists = [_addresses(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, steps)]
    dtypes, grad_dtypes = _dtypes(params), _dtypes(grads)
    _cpu.adamw(
        threads(sum(sizes)),
        **dict(zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "steps"), map(_at, lists))),
        masters=0 if kept is None else _at(kept),
        starts=_at(starts),
        sizes=_at(sizes),
        dtypes=_at(dtypes),
        grad_dtypes=_at(grad_dtypes),
        tensors=len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )
    # So that a backward through what the step has overwritten raises, as after PyTorch's own.
    written = [*params, *exp_avgs, *exp_avg_sqs, *(t for t in masters or () if t is not None)]
    for t in written:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _unsupported(*lists: Iterable[Tensor]) -> str | None:
    for tensors in lists:
        for t in tensors:
            if not t.is_cpu:
                return f"the tensors are on {t.device}, and this backend's are on the CPU"
            if t.dtype not in DTYPES:
                return f"it takes float32, bfloat16 and float16, not {str(t.dtype).removeprefix('torch.')}"
    return None


def _is_dense(t: Tensor) -> bool:
    """Whether its elements fill their memory without gaps, in whichever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _chunks(tensors: Sequence[Tensor]) -> tuple[array[int], array[int]]:
    """Each tensor's elements, and its first chunk; one more of these, the number of chunks."""
    sizes = array("q", [t.numel() for t in tensors])
    return sizes, array("q", accumulate((-(-n // CHUNK) for n in sizes), initial=0))


def _addresses(tensors: Sequence[Tensor | None]) -> array[int]:
    return array("Q", [0 if t is None else t.data_ptr() for t in tensors])


def _dtypes(tensors: Sequence[Tensor]) -> array[int]:
    return array("i", [DTYPES[t.dtype] for t in tensors])


def _at(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]
