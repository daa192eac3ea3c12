"""Speculative sampling in three launches: which tokens of each draft are kept; the masses of what is left at the first
that isn't, a chunk of the vocabulary to a program; the token drawn from them. Of all rows of V numbers two are read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from gptfast.kernels.triton import cdiv, elsewhere, empty, launch, unsupported
from gptfast.kernels.triton.sampling import words
from gptfast.kernels.triton.sampling_kernels import NO_ID, philox_words, whole
from gptfast.kernels.triton.tiles import Tile, next_power_of_2, sampling_chunk, sampling_tile

NUMBERS = ["seed", "seed_high", "step", "step_high", "stream", "stream_high"]


@triton.jit
def mass_of(p):
    """trunc(2^32 p) of a probability; the product is exact."""
    p = tl.where(p > 0, p.to(tl.float32), 0.0)
    return (tl.where(p > 1, 1.0, p) * 4294967296.0).to(tl.int64)


@triton.jit
def left(target, draft, cols, V, drafted):
    """What the target has beyond the draft, and all of it. drafted: V, or 0 behind the draft's last token."""
    P = mass_of(tl.load(target + cols, mask=cols < V, other=0.0))
    Q = mass_of(tl.load(draft + cols, mask=cols < drafted, other=0.0))
    return tl.maximum(P - Q, 0), P


@triton.jit(do_not_specialize=[*NUMBERS, "n"])
def _keep_speculative_kernel(
    draft, ids, target, out, accepted, emitted, seed, seed_high, step, step_high, stream, stream_high, n, V,
    ROWS_OF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    token = tl.load(ids + row * n + i, mask=i < n, other=-1).to(tl.int64)
    known = (token >= 0) & (token < V)
    at = tl.where(known, token, 0)
    P = mass_of(tl.load(target + (row * (n + 1) + i) * V + at, mask=known, other=0.0))
    Q = mass_of(tl.load(draft + (row * n + i) * V + at, mask=known, other=0.0))
    zero = at - at
    of = whole(stream, stream_high, row, ROWS_OF & 4) * (n + 1) + i
    key, index = whole(seed, seed_high, row, ROWS_OF & 1), whole(step, step_high, row, ROWS_OF & 2)
    r = philox_words(zero + key, zero + index, of)
    kept = (tl.umulhi(r, Q.to(tl.uint64)).to(tl.int64) < P) & (i < n)
    first = tl.min(tl.where(kept, n, i), 0)
    tl.store(accepted + row, tl.sum(kept.to(tl.int64), 0))
    tl.store(emitted + row, first.to(tl.int64))
    tl.store(out + row * (n + 1) + i, tl.where(i < first, token, -1), mask=i <= n)


@triton.jit(do_not_specialize=["n"])
def _speculative_masses_kernel(draft, target, emitted, masses, n, V, chunks, CHUNK: tl.constexpr):
    """Of a chunk: the mass that the draft leaves, and the target's."""
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    e = tl.load(emitted + row)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    rest, P = left(target + (row * (n + 1) + e) * V, draft + (row * n + e) * V, cols, V, tl.where(e < n, V, 0))
    tl.store(masses + (row * 2) * chunks + chunk, tl.sum(rest, 0))
    tl.store(masses + (row * 2 + 1) * chunks + chunk, tl.sum(P, 0))


@triton.jit(do_not_specialize=[*NUMBERS, "n"])
def _choose_speculative_kernel(
    draft, target, emitted, masses, out, seed, seed_high, step, step_high, stream, stream_high, n, V, chunks,
    ROWS_OF: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The chunk that holds the token by the chunks' masses, then the token in there."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.load(emitted + row)
    c = tl.arange(0, CHUNKS)
    of_rest = tl.load(masses + (row * 2) * chunks + c, mask=c < chunks, other=0)
    of_target = tl.load(masses + (row * 2 + 1) * chunks + c, mask=c < chunks, other=0)
    is_rest = tl.sum(of_rest, 0) > 0
    m = tl.where(is_rest, of_rest, of_target)
    total = tl.sum(m, 0)
    of = whole(stream, stream_high, row, ROWS_OF & 4) * (n + 1) + n
    r = philox_words(whole(seed, seed_high, row, ROWS_OF & 1), whole(step, step_high, row, ROWS_OF & 2), of)
    below = tl.umulhi(r, total.to(tl.uint64)).to(tl.int64)
    chunk = tl.minimum(tl.sum((tl.cumsum(m, 0) <= below).to(tl.int32), 0), chunks - 1)
    below -= tl.sum(tl.where(c < chunk, m, 0), 0)
    cols = chunk * CHUNK + tl.arange(0, CHUNK)
    rest, P = left(target + (row * (n + 1) + e) * V, draft + (row * n + e) * V, cols, V, tl.where(e < n, V, 0))
    up_to = tl.cumsum(tl.where(is_rest, rest, P), 0)
    chosen = tl.min(tl.where(up_to > below, cols, NO_ID), 0).to(tl.int64)
    tl.store(out + row * (n + 1) + e, tl.where(total > 0, chosen, -1))


def supports(draft_probs: Tensor, draft_ids: Tensor, target_probs: Tensor, **_: Any) -> str | None:
    return elsewhere(draft_ids) or unsupported(draft_probs, target_probs)


def speculative_sampling(
    draft_probs: Tensor,
    draft_ids: Tensor,
    target_probs: Tensor,
    seed: int | Tensor,
    step: int | Tensor,
    stream: int | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    B, n, V = draft_probs.shape
    draft, target = draft_probs.contiguous(), target_probs.contiguous()
    chunk = sampling_chunk(V)
    chunks = cdiv(V, chunk)
    ids = empty((B, n + 1), torch.int64, draft)
    accepted, emitted = (empty((B,), torch.int64, draft) for _ in range(2))
    masses = empty((B, 2, chunks), torch.int64, draft)
    numbers = [word for x in (seed, step, stream) for word in words(x)]
    rows_of = sum(isinstance(x, Tensor) << i for i, x in enumerate((seed, step, stream)))
    launch(
        _keep_speculative_kernel,
        (B,),
        *(draft, draft_ids.contiguous(), target, ids, accepted, emitted, *numbers, n, V),
        ROWS_OF=rows_of,
        tile=Tile(1, blocks={"BLOCK": next_power_of_2(n + 1)}),
    )
    tile = sampling_tile(chunk)
    launch(_speculative_masses_kernel, (B * chunks,), draft, target, emitted, masses, n, V, chunks, tile=tile)
    launch(
        _choose_speculative_kernel,
        (B,),
        *(draft, target, emitted, masses, ids, *numbers, n, V, chunks),
        ROWS_OF=rows_of,
        CHUNKS=next_power_of_2(chunks),
        tile=tile,
    )
    return ids, accepted, emitted
