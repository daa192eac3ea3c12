"""flashinfer.sampling's functions over ops.sample: same names and arguments, our exact meaning.

    from gptfast.compat import flashinfer_sampling as sampling     # was: import flashinfer.sampling as sampling

probs and logits (B, V); every parameter is a number or (B,). Ids come back as int32 (B,). A token's weight is a whole
number of 2^-32 of the largest, and ties at a cut go by the lowest id: the page gptfast/ops/sampling.py says it all, and
the same probabilities and seed give the same ids on every machine. One token with top_k = 1 is the arg-max, always.

seed and offset name a draw; without a seed one is drawn from `generator`, or PyTorch's own. Row i of a call draws from
stream i. `deterministic` is taken and changes nothing. indices (B,): row i is drawn from probs[indices[i]].
check_nan raises ValueError for a row that holds NaN; otherwise such a row, like one of zeros, gives -1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops.philox import philox
from gptfast.ops.sampling import survivors

Real = float | Tensor
Integer = int | Tensor


def sampling_from_probs(
    probs: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """One id for each row, by its probabilities, which need not sum to 1."""
    return _draw(probs.log(), indices, generator, check_nan, seed, offset)


def sampling_from_logits(
    logits: Tensor,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """One id for each row, by softmax(logits)."""
    return _draw(logits, indices, generator, check_nan, seed, offset)


def top_p_sampling_from_probs(
    probs: Tensor,
    top_p: Real,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """One id among the likeliest that together have top_p of the mass."""
    return _draw(probs.log(), indices, generator, check_nan, seed, offset, top_p=top_p)


def top_k_sampling_from_probs(
    probs: Tensor,
    top_k: Integer,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """One id among the top_k likeliest."""
    return _draw(probs.log(), indices, generator, check_nan, seed, offset, top_k=top_k)


def min_p_sampling_from_probs(
    probs: Tensor,
    min_p: Real,
    indices: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """One id among those at least min_p times as likely as the likeliest."""
    return _draw(probs.log(), indices, generator, check_nan, seed, offset, min_p=min_p)


def top_k_top_p_sampling_from_logits(
    logits: Tensor,
    top_k: Integer,
    top_p: Real,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """top_k, then top_p of what is left ("top_k_first"), or what both leave of softmax(logits) ("joint")."""
    filters: dict[str, Any] = {"top_k": top_k, "top_p": top_p}
    if filter_apply_order == "joint":
        row = slice(None) if indices is None else indices.long()
        left = survivors(logits[row], top_k=top_k) & survivors(logits[row], top_p=top_p)
        filters = {"mask": left}
    elif filter_apply_order != "top_k_first":
        raise ValueError(f"expected filter_apply_order to be 'top_k_first' or 'joint', got {filter_apply_order!r}")
    return _draw(logits, indices, generator, check_nan, seed, offset, **filters)


def top_k_top_p_sampling_from_probs(
    probs: Tensor,
    top_k: Integer,
    top_p: Real,
    indices: Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> Tensor:
    """The same of probabilities."""
    rest = (indices, filter_apply_order, deterministic, generator, check_nan, seed, offset)
    return top_k_top_p_sampling_from_logits(probs.log(), top_k, top_p, *rest)


def top_p_renorm_probs(probs: Tensor, top_p: Real) -> Tensor:
    """probs with what top_p cuts set to 0, summing to 1."""
    return _renormed(probs, survivors(probs.log(), top_p=top_p))


def top_k_renorm_probs(probs: Tensor, top_k: Integer) -> Tensor:
    """probs with what top_k cuts set to 0, summing to 1."""
    return _renormed(probs, survivors(probs.log(), top_k=top_k))


def top_k_mask_logits(logits: Tensor, top_k: Integer) -> Tensor:
    """logits with what top_k cuts set to -inf."""
    return logits.masked_fill(~survivors(logits, top_k=top_k), -torch.inf)


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: Integer | None = None,
    offset: Integer | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., arXiv:2211.17192): draft tokens that the target keeps, and one more.

    draft_probs (B, n, V), draft_token_ids (B, n), target_probs (B, n + 1, V). A token is kept while
    u * draft < target, u uniform in [0, 1); at the first that isn't, one is drawn from max(target - draft, 0), after
    the last from the target. Returns ids (B, n + 1) int32, -1 behind the last; how many draft tokens would be kept each
    by itself, and how many were, (B,) int32, added to the tensors given for them.
    """
    B, n, _ = draft_probs.shape
    key, step = _random(generator, seed, offset)
    row = torch.arange(B, device=draft_probs.device)
    at = torch.arange(n, device=draft_probs.device)
    key_, step_ = (torch.as_tensor(t, dtype=torch.int64, device=row.device).reshape(-1, 1) for t in (key, step))
    r0, r1, _, _ = philox(key_, step_, row[:, None] * (n + 1) + at)
    u = (r1.double() * 2.0**32 + r0.double()) * 2.0**-64
    chosen = draft_token_ids.long()[..., None]
    p, q = (t[:, :n].gather(-1, chosen)[..., 0].double() for t in (target_probs, draft_probs))
    keep = u * q < p
    kept = keep.cumprod(-1).sum(-1)
    last = target_probs[row, kept]
    draft = draft_probs[row, kept.clamp(max=n - 1)] if n else torch.zeros_like(last)
    rest = torch.where((kept < n)[:, None], (last - draft).clamp(min=0), last)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, last)
    new = ops.sample(rest.log(), seed=key, step=step, stream=row * (n + 1) + n)
    ids = torch.full((B, n + 1), -1, dtype=torch.int32, device=row.device)
    ids[:, :n] = torch.where(at < kept[:, None], draft_token_ids, -1).to(torch.int32)
    ids[row, kept] = new.to(torch.int32)
    counts = (maybe_output_accepted_token_num, keep.sum(-1)), (maybe_output_emitted_draft_token_num, kept)
    accepted, emitted = (c.to(torch.int32) if given is None else given.add_(c) for given, c in counts)
    return ids, accepted, emitted


def _random(generator: torch.Generator | None, seed: Integer | None, offset: Integer | None) -> tuple[Any, Any]:
    if seed is None:
        seed = int(torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"))
    return seed, 0 if offset is None else offset


def _draw(
    logits: Tensor,
    indices: Tensor | None,
    generator: torch.Generator | None,
    check_nan: bool,
    seed: Integer | None,
    offset: Integer | None,
    **filters: Any,
) -> Tensor:
    if check_nan and bool(logits.isnan().any()):
        raise ValueError("expected no NaN in the input, got one")
    if indices is not None:
        logits = logits[indices.long()]
    key, step = _random(generator, seed, offset)
    stream = torch.arange(logits.shape[0], device=logits.device)
    return ops.sample(logits, seed=key, step=step, stream=stream, **filters).to(torch.int32)


def _renormed(probs: Tensor, keep: Tensor) -> Tensor:
    kept = probs.float() * keep
    return (kept / kept.sum(-1, keepdim=True)).to(probs.dtype)
