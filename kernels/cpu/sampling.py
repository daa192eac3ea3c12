from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, pointer, rows, threads, unsupported


def supports(logits: Tensor, **_: Any) -> str | None:
    return unsupported(logits)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor,
    top_k: int | Tensor,
    top_p: float | Tensor,
    min_p: float | Tensor,
    typical_p: float | Tensor,
    repetition_penalty: float | Tensor,
    presence_penalty: float | Tensor,
    frequency_penalty: float | Tensor,
    logit_bias: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None,
    prompt_lengths: Tensor | None,
    seed: int | Tensor,
    step: int | Tensor,
    stream: int | Tensor,
    return_logprobs: bool | str,
) -> Tensor | tuple[Tensor, Tensor]:
    logits, stride = rows(logits)
    B, V = logits.shape
    reals = (temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty)
    integers = (top_k, seed, step, stream)
    history, prompt_lengths = _contiguous(history), _contiguous(prompt_lengths)
    logit_bias, mask = _contiguous(logit_bias), _contiguous(mask)
    ids = torch.empty(B, dtype=torch.int64)
    logprobs = torch.empty(B, dtype=torch.float32) if return_logprobs else None
    _cpu.sample(
        min(threads(B * V), B),
        ids=ids.data_ptr(),
        logprobs=pointer(logprobs),
        logits=logits.data_ptr(),
        logit_bias=pointer(logit_bias),
        mask=pointer(mask),
        history=pointer(history),
        prompt_lengths=pointer(prompt_lengths),
        reals=_numbers(reals),
        integers=_numbers(integers),
        per_row=tuple(x.data_ptr() if isinstance(x, Tensor) else 0 for x in reals + integers),
        rows=B,
        cols=V,
        logits_stride=stride,
        bias_stride=V if logit_bias is not None and logit_bias.dim() == 2 else 0,
        mask_stride=V if mask is not None and mask.dim() == 2 else 0,
        history_cols=0 if history is None else history.shape[1],
        dtype=DTYPES[logits.dtype],
        processed=return_logprobs == "processed",
    )
    return ids if logprobs is None else (ids, logprobs)


def _numbers(parameters: Sequence[float | Tensor]) -> tuple[float, ...]:
    """The parameters that are one number for all rows; 0 in the place of the others."""
    return tuple(0 if isinstance(x, Tensor) else x for x in parameters)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
