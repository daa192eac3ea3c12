"""Prompts and their completions, packed in one row for the model, and what it thinks of the completions' tokens.

Sequences lie side by side without padding (`cu_seqlens`, see GPT.hidden). A token's log-probability, value or score
depends on its own sequence alone, bit for bit, whatever lies beside it and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gptfast import ops
from gptfast.model import GPT
from gptfast.train.optim import AdamW

TOKENS_AT_ONCE = 16384  # in one row: what a forward and backward pass keeps of them is in memory together

Messages = Sequence[Mapping[str, str]]
Prompt = str | Sequence[int] | Messages


class Completions(NamedTuple):
    """n prompts with their completions: T tokens in all, M of them the completions'."""

    ids: Tensor  # (T,) int64; with `whole` each sequence's last token too, which nothing is predicted from
    cu_seqlens: Tensor  # (n + 1,) int32
    at: Tensor  # (M,) int64: the places that predict a completion's token
    targets: Tensor  # (M,) int64: those tokens
    lengths: Tensor  # (n,) int64: tokens of each completion


class Stepper(Protocol):
    """What a stage needs of its optimiser: gptfast.train.AdamW, or what behaves like it."""

    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...


def pack(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device | str = "cpu",
    *,
    whole: bool = False,
) -> Completions:
    """Packs sequences in this order. Raises ValueError for an empty prompt or completion.

    whole: the last token of each completion is there as well, for what is read off it; without it there is one token
    less to compute
    """
    if len(prompts) != len(completions) or not all(prompts) or not all(completions):
        raise ValueError(
            f"expected as many completions as prompts, each of at least one token, got {len(prompts)} prompts "
            f"({min(map(len, prompts), default=0)} tokens at least) and {len(completions)} completions "
            f"({min(map(len, completions), default=0)})"
        )
    ids, at, targets, ends = list[int](), list[int](), list[int](), [0]
    for prompt, completion in zip(prompts, completions):
        first = len(ids) + len(prompt) - 1
        ids += [*prompt, *(completion if whole else completion[:-1])]
        at += range(first, first + len(completion))
        targets += completion
        ends.append(len(ids))
    long = {"dtype": torch.int64, "device": device}
    return Completions(
        torch.tensor(ids, **long),
        torch.tensor(ends, dtype=torch.int32, device=device),
        torch.tensor(at, **long),
        torch.tensor(targets, **long),
        torch.tensor([len(c) for c in completions], **long),
    )


def hidden(model: GPT, packed: Completions) -> Tensor:
    """The final hidden states of all tokens, (T, C)."""
    return model.hidden(packed.ids[None], cu_seqlens=packed.cu_seqlens)[0]


def token_logprobs(model: GPT, packed: Completions, temperature: float = 1.0) -> Tensor:
    """log p of each completion token at this temperature, (M,) float32; with gradients where they are on."""
    found = _token_logprobs(model, packed, temperature, False)
    assert isinstance(found, Tensor)
    return found


def token_logprobs_and_entropy(
    model: GPT, packed: Completions, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """token_logprobs and the entropy of each token's distribution, (M,) float32 each, in nats."""
    found = _token_logprobs(model, packed, temperature, True)
    assert not isinstance(found, Tensor)
    return found


def _token_logprobs(
    model: GPT, packed: Completions, temperature: float, entropy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    head = model.embedding if model.head is None else model.head
    if not isinstance(head.weight, Tensor):
        raise ValueError("expected a model whose head is a float matrix, got a quantised or packed one")
    x = hidden(model, packed).index_select(0, packed.at)
    bias = None if model.head is None else model.head.bias
    options: dict[str, Any] = dict(temperature=temperature, return_entropy=entropy, backend=model.backend)
    return ops.token_logprobs(x, head.weight, packed.targets, bias=bias, **options)


def mask_of(lengths: Tensor) -> Tensor:
    """Which places of (n, longest) hold a token, bool: row i its first lengths[i]."""
    longest = int(lengths.max()) if lengths.numel() else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def padded(flat: Tensor, lengths: Tensor) -> Tensor:
    """(M,) as rows (n, longest), 0 behind a row's end; differentiable."""
    mask = mask_of(lengths)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def row_sums(flat: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each row's tokens, (n,); a row's is the same whatever rows are beside it."""
    parts = flat.split(lengths.tolist())
    return torch.stack([part.sum() for part in parts]) if parts else flat.new_zeros(0)


def groups(lengths: Sequence[int], limit: int = TOKENS_AT_ONCE) -> list[list[int]]:
    """The places 0 .. n - 1 in order, cut so that a group has at most `limit` tokens (a longer sequence is alone)."""
    found: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not found or length > room:
            found.append([])
            room = limit
        found[-1].append(i)
        room -= length
    return found


def update(optimizer: Stepper) -> dict[str, float]:
    """One step of the optimiser over the gradients that are there, which are gone afterwards."""
    optimizer.step()
    optimizer.zero_grad()
    norm = optimizer.grad_norm if isinstance(optimizer, AdamW) else None
    return {} if norm is None else {"grad_norm": float(norm)}


class Weighted:
    """Means over several groups of tokens, each with its own weight."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, weight: float, values: Mapping[str, float | Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * float(value)
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def means(self) -> dict[str, float]:
        return {name: total / max(self._weights[name], 1e-30) for name, total in self._sums.items()}
