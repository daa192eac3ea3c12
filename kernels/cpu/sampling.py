from __future__ import annotations

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
    reals = _table(
        *(torch.float32, temperature, top_p, min_p, typical_p),
        *(repetition_penalty, presence_penalty, frequency_penalty),
    )
    integers = _table(torch.int64, top_k, seed, step, stream)
    if history is not None:
        history = history.contiguous()
    if prompt_lengths is not None:
        prompt_lengths = prompt_lengths.contiguous()
    if logit_bias is not None:
        logit_bias = logit_bias.contiguous()
    if mask is not None:
        mask = mask.contiguous()
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
        reals=reals.data_ptr(),
        integers=integers.data_ptr(),
        rows=B,
        cols=V,
        logits_stride=stride,
        bias_stride=V if logit_bias is not None and logit_bias.dim() == 2 else 0,
        mask_stride=V if mask is not None and mask.dim() == 2 else 0,
        history_cols=0 if history is None else history.shape[1],
        reals_stride=reals.stride(0),
        integers_stride=integers.stride(0),
        dtype=DTYPES[logits.dtype],
        processed=return_logprobs == "processed",
    )
    return ids if logprobs is None else (ids, logprobs)


def _table(dtype: torch.dtype, *columns: float | Tensor) -> Tensor:
    """The parameters of each row side by side; one row, with stride 0, where none of them has its own for each."""
    if not any(isinstance(x, Tensor) for x in columns):
        return torch.tensor(columns, dtype=dtype).expand(1, -1).as_strided((1, len(columns)), (0, 1))
    B = max(len(x) for x in columns if isinstance(x, Tensor))
    table = torch.empty(B, len(columns), dtype=dtype)
    for i, x in enumerate(columns):
        table[:, i] = x
    return table
