from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gptfast import _cpu
from gptfast.kernels.cpu import DTYPES, as_rows, rows, threads, unsupported


def supports(logits: Tensor, **_: Any) -> str | None:
    return unsupported(logits)


def sample(**arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    return prepare_sample(**arguments)(**arguments)


def prepare_sample(
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
    return_logprobs: bool | str,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
    **tensors: Tensor | None,
) -> Callable[..., Any]:
    """For calls whose parameters are these, tensors of them included; seed, step and stream, where they are numbers,
    are each call's own."""
    B, V = logits.shape
    reals = (temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty)
    integers = (top_k, seed, step, stream)
    given = [name for name, t in tensors.items() if t is not None]  # logit_bias, mask, history, prompt_lengths
    own = [name for name, x in zip(("seed", "step", "stream"), integers[1:]) if not isinstance(x, Tensor)]
    outputs = ("ids", "logprobs") if return_logprobs else ("ids",)
    history = tensors["history"]
    launch = _cpu.Prepared(
        "sample",
        (*outputs, "logits", *given, *own),
        dict(
            reals=_numbers(reals),
            **dict(zip(("top_k", "seed", "step", "stream"), _numbers(integers))),
            per_row=tuple(x.data_ptr() if isinstance(x, Tensor) else 0 for x in reals + integers),
            rows=B,
            cols=V,
            logits_stride=rows(logits)[1],
            bias_stride=_row_stride(tensors["logit_bias"]),
            mask_stride=_row_stride(tensors["mask"]),
            history_cols=0 if history is None else history.shape[1],
            dtype=DTYPES[logits.dtype],
            processed=return_logprobs == "processed",
        ),
    )
    count = min(threads(B * V), B)

    def run(*, logits: Tensor, **arguments: Any) -> Any:
        ids = torch.empty(B, dtype=torch.int64)
        made = [ids, torch.empty(B, dtype=torch.float32)] if return_logprobs else [ids]
        read = [as_rows(logits), *[arguments[name].contiguous() for name in given]]
        launch(count, *[t.data_ptr() for t in (*made, *read)], *[arguments.get(name, 0) for name in own])
        return tuple(made) if return_logprobs else ids

    return run


def _row_stride(t: Tensor | None) -> int:
    """0 where every row uses the same values."""
    return t.shape[1] if t is not None and t.dim() == 2 else 0


def _numbers(parameters: Sequence[float | Tensor]) -> tuple[float, ...]:
    """The parameters that are one number for all rows; 0 in the place of the others."""
    return tuple(0 if isinstance(x, Tensor) else x for x in parameters)
