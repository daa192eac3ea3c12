"""Sampling without a sort of the vocabulary, in two to five launches that leave the host nothing to wait for:

0. process, where there is something to: bias, mask and penalties.
1. prepare: a chunk of a row to a program; the largest logits of the chunk's parts.
2. masses: what weighs how much, where no top-k comes first.
3. gather: the few tokens that may survive the filters. A bound on the k-th largest logit comes from the parts' largest,
   one on a nucleus from the masses of those that are at most so many bits below the top.
4. choose: a row to a program; cuts them exactly, by bisection on the bits of the keys, and draws.

All sums that decide are sums of integers: how a row is shared out changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.kernels.triton import cdiv, empty, launch, rows, signed, unsupported
from gptfast.kernels.triton.sampling_choose import _choose_sample_kernel
from gptfast.kernels.triton.sampling_kernels import (
    _gather_sample_kernel,
    _prepare_sample_kernel,
    _process_sample_kernel,
    _sample_masses_kernel,
)
from gptfast.kernels.triton.tiles import (
    next_power_of_2,
    sampling_choose_tile,
    sampling_chunk,
    sampling_process_tile,
    sampling_tile,
)

PARTS = 32  # of a chunk, whose largest logits bound the k-th largest
KEYS = 1024  # parts of a row that are looked at: the largest k with a bound
PIVOTS = 8  # thresholds, 2 bits apart, whose masses bound a nucleus


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
    return_logprobs: bool | str,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    stream: int | Tensor = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    B, V = logits.shape
    logits, logits_stride = rows(logits)
    reals = (temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty)
    integers = (top_k, seed, step, stream)
    of_rows = sum(isinstance(x, Tensor) << i for i, x in enumerate(reals + integers))
    k_words, seed_words, step_words, stream_words = (words(x) for x in integers)
    logit_bias, bias_stride = shared_rows(logit_bias)
    mask, mask_stride = shared_rows(None if mask is None else mask.view(torch.uint8))
    is_processed = logit_bias is not None or mask is not None or history is not None
    is_raw = return_logprobs in (True, "raw")

    greedy_only = isinstance(temperature, float | int) and temperature == 0
    may_be_greedy = greedy_only or isinstance(temperature, Tensor)
    no_k = not isinstance(top_k, Tensor) and top_k == 0
    no_p = not isinstance(top_p, Tensor) and top_p >= 1
    no_typical = not isinstance(typical_p, Tensor) and typical_p >= 1
    has_all = not greedy_only and (no_k or isinstance(top_k, Tensor))
    has_filters = not (greedy_only or (no_k and no_p and no_typical))

    chunk = sampling_chunk(V)
    chunks, few = cdiv(V, chunk), chunk  # where more than a few tokens may survive, all of the row are read instead
    padded = max(next_power_of_2(chunks), 16)
    tile, last_tile = sampling_tile(chunk), sampling_choose_tile(chunk)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32, when: bool = True) -> Tensor:
        return empty(shape if when else (1,), dtype, logits)

    processed = scratch(B, V, when=is_processed)
    tops, best = scratch(B, chunks), scratch(B, chunks, dtype=torch.int32, when=may_be_greedy)
    parts = scratch(B, chunks, PARTS, when=has_filters and not no_k)
    raw_tops, raw_sums = (scratch(B, chunks, when=is_raw) for _ in range(2))
    masses = scratch(B, chunks, dtype=torch.int64, when=has_all)
    above = scratch(B, chunks, PIVOTS, dtype=torch.int64, when=has_filters and has_all)
    counts = scratch(B, chunks, dtype=torch.int32, when=has_filters)
    found = scratch(B, chunks * chunk, dtype=torch.int16, when=has_filters)
    few_ids, few_values = (scratch(B, few, dtype=d, when=has_filters) for d in (torch.int32, torch.float32))
    ids, logprobs = scratch(B, dtype=torch.int64), scratch(B, when=bool(return_logprobs))

    values, values_stride = logits, logits_stride
    if is_processed:
        values, values_stride = processed, V
        process_tile = sampling_process_tile(V)
        blocks = cdiv(V, process_tile.blocks["BLOCK"])
        launch(
            _process_sample_kernel,
            (B * blocks,),
            *(logits, logit_bias, mask, history, prompt_lengths, *reals[4:], processed),
            *(logits_stride, bias_stride, mask_stride, V, 0 if history is None else history.shape[1], blocks),
            ROWS_OF=of_rows,
            HAS_BIAS=logit_bias is not None,
            HAS_MASK=mask is not None,
            HAS_HISTORY=history is not None,
            HAS_PROMPT=prompt_lengths is not None,
            tile=process_tile,
            fp_fusion=False,
        )
    launch(
        _prepare_sample_kernel,
        (B * chunks,),
        *(logits, values, temperature, tops, parts, best, raw_tops, raw_sums),
        *(logits_stride, values_stride, V, chunks),
        ROWS_OF=of_rows,
        USE_PARTS=has_filters and not no_k,
        USE_BEST=may_be_greedy,
        USE_RAW=is_raw,
        PARTS=PARTS,
        tile=tile,
        fp_fusion=False,
    )
    filters = (values, temperature, *k_words, *reals[1:4], tops)
    if has_all:
        launch(
            _sample_masses_kernel,
            (B * chunks,),
            *(*filters, masses, above, values_stride, V, chunks),
            ROWS_OF=of_rows,
            USE_PIVOTS=has_filters,
            CHUNKS=padded,
            PIVOTS=PIVOTS,
            tile=tile,
            fp_fusion=False,
        )
    if has_filters:
        launch(
            _gather_sample_kernel,
            (B * chunks,),
            *(*filters, parts, masses, above, counts, found, values_stride, V, chunks),
            ROWS_OF=of_rows,
            CHUNKS=padded,
            PARTS=PARTS,
            PIVOTS=PIVOTS,
            KEYS=KEYS,
            tile=tile,
            fp_fusion=False,
        )
    launch(
        _choose_sample_kernel,
        (B,),
        *(logits, *filters[:-1], *seed_words, *step_words, *stream_words),
        *(tops, best, raw_tops, raw_sums, masses, counts, found, few_ids, few_values, ids, logprobs),
        *(logits_stride, values_stride, V, chunks),
        ROWS_OF=of_rows,
        USE_BEST=may_be_greedy,
        USE_ALL=has_all,
        USE_FILTERS=has_filters,
        IS_TYPICAL=not no_typical,
        LOGPROBS=1 if is_raw else 2 if return_logprobs else 0,
        CHUNKS=padded,
        FEW=few,
        tile=last_tile,
        fp_fusion=False,
    )
    return (ids, logprobs) if return_logprobs else ids


def words(x: int | Tensor) -> tuple[int | Tensor, int]:
    """An integer parameter as a kernel takes it: two signed words, or its tensor."""
    return (x, 0) if isinstance(x, Tensor) else (signed(x), signed(x >> 32))


def shared_rows(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A tensor (V,) or (B, V) and its row stride, 0 where every row uses the same values."""
    if t is None:
        return None, 0
    whole = t.contiguous()
    return whole, whole.shape[1] if whole.dim() == 2 else 0
