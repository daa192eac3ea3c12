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
    return _draw(_log(probs), indices, generator, check_nan, seed, offset)


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
    return _draw(_log(probs), indices, generator, check_nan, seed, offset, top_p=top_p)


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
    return _draw(_log(probs), indices, generator, check_nan, seed, offset, top_k=top_k)


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
    return _draw(_log(probs), indices, generator, check_nan, seed, offset, min_p=min_p)


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
    return top_k_top_p_sampling_from_logits(_log(probs), top_k, top_p, *rest)


def top_p_renorm_probs(probs: Tensor, top_p: Real) -> Tensor:
    """probs with what top_p cuts set to 0, summing to 1."""
    return _renormed(probs, survivors(_log(probs), top_p=top_p))


def top_k_renorm_probs(probs: Tensor, top_k: Integer) -> Tensor:
    """probs with what top_k cuts set to 0, summing to 1."""
    return _renormed(probs, survivors(_log(probs), top_k=top_k))


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

    draft_probs (B, n, V), draft_token_ids (B, n), target_probs (B, n + 1, V). Returns ids (B, n + 1) int32, -1 behind
    the last; how many draft tokens would be kept each by itself, and how many were, (B,) int32, added to the tensors
    given for them. Which, says the page gptfast/ops/speculative_sampling.py.
    """
    key, step = _random(generator, seed, offset)
    stream = torch.arange(draft_probs.shape[0], device=draft_probs.device)
    ids, *found = ops.speculative_sampling(
        draft_probs, draft_token_ids, target_probs, seed=key, step=step, stream=stream
    )
    given = maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num
    accepted, emitted = (c.to(torch.int32) if g is None else g.add_(c) for g, c in zip(given, found))
    return ids.to(torch.int32), accepted, emitted


def _log(probs: Tensor) -> Tensor:
    """In fp32: a 16-bit logarithm would move a small probability by up to 3%."""
    return probs.float().log()


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
