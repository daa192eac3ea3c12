"""Speculative sampling: which of a draft's tokens the target model keeps, and the token that it puts behind them.

    kept_i    floor(r_i Q / 2^64) < P,  P and Q those of the draft's token at place i: with probability min(1, P / Q)
    emitted   how many are kept before the first that isn't
    next      e = emitted, w = max(P_e - Q_e, 0); P_e where e = n or where that leaves nothing. The lowest id whose mass
              up to and with itself, in the order of ids, is > floor(r_n total / 2^64), total the sum of w
    P, Q      trunc(2^32 min(p, 1)) of the target's and the draft's probabilities as fp32; 0 where not p > 0: of NaN too
    r_i       word0 | word1 << 32 of Philox4x32-10 with key seed, index step, stream (n + 1) stream + i (philox.py)

Leviathan, Kalman and Matias (arXiv:2211.17192), algorithm 1; Chen et al. (arXiv:2302.01318). The tokens are distributed
as the target's own, whatever the draft is, if the draft's were drawn from draft_probs. All that decides is integers:
the same probabilities and seed give the same tokens on every backend.

draft_probs   (B, n, V)      float32, bfloat16 or float16 (float64 on the reference, rounded); n >= 0, V < 2^22
draft_ids     (B, n)         int64 or int32: the tokens drawn from them; one that is no token, as -1, isn't kept
target_probs  (B, n + 1, V)  like draft_probs: the target's at the draft's places and behind the last
seed, step, stream           integers, or (B,) of them, as in sample (sampling.py)

Returns ids (B, n + 1) int64: the tokens that were kept, the one behind them (-1 where the target's row has no mass),
then -1; accepted (B) int64: how many would be kept each by itself; emitted (B) int64.

A call's own generation loop needs none of this: it draws each place with its own random number as plain decoding does
and keeps a guess that equals what was drawn (gptfast/generate/speculative.py), which keeps the text, not only its
distribution. This is for drafts that are sampled, and what flashinfer's chain_speculative_sampling is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptfast.ops import dispatch
from gptfast.ops.dispatch import require, shape
from gptfast.ops.sampling import Integer, integer
from gptfast.ops.sampling_math import uniform_below
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes


class SpeculativeSample(NamedTuple):
    """speculative_sampling's results."""

    ids: Tensor  # (B, n + 1)
    accepted: Tensor  # (B)
    emitted: Tensor  # (B)


def reference(
    draft_probs: Tensor,
    draft_ids: Tensor,
    target_probs: Tensor,
    *,
    seed: Integer = 0,
    step: Integer = 0,
    stream: Integer = 0,
) -> SpeculativeSample:
    """The meaning of speculative_sampling, in plain PyTorch."""
    B, n, V = draft_probs.shape
    P, Q = _masses(target_probs), _masses(draft_probs)
    row, at = torch.arange(B, device=P.device), torch.arange(n + 1, device=P.device)
    seed, step, stream = (torch.as_tensor(x, device=P.device).reshape(-1, 1) for x in (seed, step, stream))
    streams = stream * (n + 1) + at
    known = (draft_ids >= 0) & (draft_ids < V)
    chosen = torch.where(known, draft_ids, 0).long()[..., None]
    p, q = (torch.where(known, m[:, :n].gather(-1, chosen)[..., 0], 0) for m in (P, Q))
    keep = uniform_below(q, seed, step, streams[:, :n]) < p
    emitted = keep.long().cumprod(-1).sum(-1)
    last = P[row, emitted]
    draft = torch.cat([Q, torch.zeros_like(Q[:, :1]) if n else torch.zeros_like(P)], 1)[row, emitted]
    rest = (last - draft).clamp(min=0)
    mass = torch.where(rest.sum(-1, keepdim=True) > 0, rest, last).cumsum(-1)
    total = mass[:, -1:]
    following = (mass <= uniform_below(total, seed, step, streams[:, n:])).sum(-1)
    following = torch.where(total[:, 0] > 0, following, -1)
    ids = torch.where(at[:n] < emitted[:, None], draft_ids, -1)
    ids = torch.cat([ids.long(), torch.full_like(emitted, -1)[:, None]], 1)
    ids[row, emitted] = following
    return SpeculativeSample(ids, keep.sum(-1), emitted)


def _masses(probs: Tensor) -> Tensor:
    p = probs.float()
    return (torch.where(p > 0, p, 0.0).clamp(max=1.0) * 2.0**32).long()


def baseline(draft_probs: Tensor, draft_ids: Tensor, target_probs: Tensor, **_: Any) -> SpeculativeSample:
    """What one writes with PyTorch: floats, its generator, multinomial."""
    B, n, _V = draft_probs.shape
    row = torch.arange(B, device=draft_probs.device)
    chosen = draft_ids.clamp(min=0).long()[..., None]
    p, q = target_probs[:, :n].gather(-1, chosen)[..., 0], draft_probs.gather(-1, chosen)[..., 0]
    keep = torch.rand_like(p, dtype=torch.float32) * q < p
    emitted = keep.long().cumprod(-1).sum(-1)
    last = target_probs[row, emitted].float()
    rest = (last - torch.cat([draft_probs, torch.zeros_like(target_probs[:, :1])], 1)[row, emitted]).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, last)
    ids = torch.cat([draft_ids.long(), torch.full_like(emitted, -1)[:, None]], 1)
    ids = torch.where(torch.arange(n + 1, device=row.device) < emitted[:, None], ids, -1)
    ids[row, emitted] = rest.multinomial(1)[:, 0]
    return SpeculativeSample(ids, keep.sum(-1), emitted)


def cost(draft_probs: Tensor, draft_ids: Tensor, target_probs: Tensor, **_: Any) -> Cost:
    """Of the rows of V numbers two are read for each sequence, one of them where the whole draft is kept."""
    B, n, V = draft_probs.shape
    read = V * (draft_probs.element_size() * bool(n) + target_probs.element_size())
    return Cost(flops=6 * B * V, bytes=B * read + nbytes(draft_ids) + 8 * B * (n + 3))


def cases() -> list[Case]:
    return [
        _case("3x37", 7, 3, 37),
        _case("1x1", 2, 1, 1),
        _case("0x130", 5, 0, 130),
        _case("4x1000-near", 9, 4, 1000, apart=0.05, stream=3),
        _case("5x3000-seeds", 6, 5, 3000, apart=0.3, rows=True),
        _case("2x300-broken", 12, 2, 300, broken=True),
        Case("0x2x10", lambda i: _arguments(i, 0, 2, 10)),
        _case("3x50257", 8, 3, 50257, apart=0.3, tags="bench"),
        _case("7x128256", 8, 7, 128256, apart=0.3, tags="bench big"),
    ]


def _case(name: str, B: int, n: int, V: int, tags: str = "", **more: Any) -> Case:
    return Case(name, lambda i: _arguments(i, B, n, V, **more), frozenset(tags.split()))


def _arguments(
    i: Inputs, B: int, n: int, V: int, apart: float = 1.0, rows: bool = False, broken: bool = False, stream: int = 0
) -> dict[str, Any]:
    """A draft's distributions and the target's, which are `apart`, and tokens of the draft's."""
    logits, more = (torch.randn(B, n + 1, V, generator=i.generator) for _ in range(2))
    draft, target = (3.0 * logits[:, :n]).softmax(-1), (3.0 * logits + apart * more).softmax(-1)
    ids = draft.flatten(0, 1).multinomial(1, generator=i.generator) if B * n else torch.zeros(0, dtype=torch.int64)
    draft, target, ids = draft.to(i.dtype), target.to(i.dtype), ids.view(B, n)
    if broken:
        draft[0, 0, :7] = torch.tensor([torch.nan, -1.0, torch.inf, 2.0, 0.0, 1e-12, 0.5])
        target[1] = 0.0  # nothing to draw from
        target[2] = draft[2, 0]  # nothing is left of it
        ids[3, 0], ids[4, 1], ids[5, 0] = -1, V, 2**40
        target[6] = torch.nan
        draft[7, 0, ids[7, 0]] = 0.0
    seeds = i.randint(-(2**62), 2**62, (B,)) if rows else 11
    random = {"seed": seeds, "step": i.randint(0, 99, (B,)) if rows else 2**40, "stream": stream}
    probs = {"draft_probs": draft, "draft_ids": ids, "target_probs": target}
    return {name: x.to(i.device) for name, x in probs.items()} | random


def speculative_sampling(
    draft_probs: Tensor,
    draft_ids: Tensor,
    target_probs: Tensor,
    *,
    seed: Integer = 0,
    step: Integer = 0,
    stream: Integer = 0,
    backend: str | None = None,
) -> Any:
    """SpeculativeSample(ids, accepted, emitted). Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit; BackendError where `backend` can't serve the call.
    """
    floats = draft_probs.dim() == 3 and draft_probs.is_floating_point() and 0 < draft_probs.shape[2] < 2**22
    require(
        floats,
        lambda: f"speculative_sampling: expected draft_probs (B, n, V) of floats, V < 2^22, got {shape(draft_probs)}",
    )
    B, n, V = draft_probs.shape
    require(
        draft_ids.shape == (B, n) and draft_ids.dtype in (torch.int64, torch.int32),
        lambda: f"speculative_sampling: expected draft_ids {(B, n)} of integers, got {shape(draft_ids)}",
    )
    require(
        target_probs.shape == (B, n + 1, V) and target_probs.is_floating_point(),
        lambda: f"speculative_sampling: expected target_probs {(B, n + 1, V)} of floats, got {shape(target_probs)}",
    )
    random = {
        name: integer(name, x, B, draft_probs.device, "speculative_sampling")
        for name, x in (("seed", seed), ("step", step), ("stream", stream))
    }
    arguments = dict(draft_probs=draft_probs.detach(), draft_ids=draft_ids, target_probs=target_probs.detach())
    name = "speculative_sampling.speculative_sampling"
    found = dispatch.run(name, backend, reference, draft_probs, **arguments, **random)
    return found if isinstance(found, dispatch.Choice) else SpeculativeSample(*found)


def _take(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    return {name: x[b : b + 1] if isinstance(x, Tensor) else x for name, x in arguments.items()}


OP = Op(
    "speculative_sampling", speculative_sampling, reference, cost, cases, baseline,
    plain=reference, exact=True, kernels=("triton",), take=_take,
)  # fmt: skip
