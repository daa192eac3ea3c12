"""Prompts with their completions, packed in one row: what a model thinks of the completions' tokens.

A token's log-probability, value or score depends on its own sequence alone, bit for bit, whatever is packed beside it
and in which order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gptfast.model import GPT
from gptfast.train.packing import IGNORED, Packed, pack
from gptfast.train.parallel import World


def pack_completions(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Packed:
    """One row of these sequences, whose targets are the completions' tokens. Raises ValueError for an empty prompt or
    completion."""
    if len(prompts) != len(completions) or not all(map(len, prompts)) or not all(map(len, completions)):
        raise ValueError(
            f"expected as many completions as prompts, each of at least one token, got {len(prompts)} prompts "
            f"({min(map(len, prompts), default=0)} tokens at least) and {len(completions)} completions "
            f"({min(map(len, completions), default=0)})"
        )
    masks = [[False] * len(p) + [True] * len(c) for p, c in zip(prompts, completions)]
    return pack([[*p, *c] for p, c in zip(prompts, completions)], masks)


def completion_logprobs(model: GPT, packed: Packed, temperature: float = 1.0) -> Tensor:
    """log p of each completion token at this temperature, (M,) fp32: all sequences' in their order."""
    found = model.logprobs(
        packed.ids[None], packed.targets[None], cu_seqlens=packed.cu_seqlens, temperature=temperature
    )
    assert isinstance(found, Tensor)
    return found[0][packed.targets != IGNORED]


def completion_logprobs_and_entropy(model: GPT, packed: Packed, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """completion_logprobs, and the entropy of the distribution that each token was drawn from, (M,) fp32, in nats."""
    options = {"cu_seqlens": packed.cu_seqlens, "temperature": temperature, "return_entropy": True}
    logprobs, entropy = model.logprobs(packed.ids[None], packed.targets[None], **options)
    learnt = packed.targets != IGNORED
    return logprobs[0][learnt], entropy[0][learnt]


def mask_of(lengths: Sequence[int]) -> Tensor:
    """Which places of (n, longest) hold a token, bool: row i its first lengths[i]."""
    return torch.arange(max(lengths, default=0)) < torch.tensor(list(lengths))[:, None]


def padded(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as (n, longest), 0 behind a row's end."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def row_sums(flat: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum of each row's tokens, (n,), which lie side by side in `flat`."""
    return torch.stack([row.sum() for row in flat.split(list(lengths))])


def row_parts(lengths: Sequence[int], most: int, world: World) -> list[range]:
    """This process's rows of a batch, in as many pieces as every other process has, of about `most` tokens.

    lengths: of the rows, in tokens. Raises ValueError where there are fewer rows than processes.
    """
    n = len(lengths)
    if n < world.size:
        raise ValueError(f"expected at least one sequence for each of {world.size} processes, got {n} in a batch")
    pieces = max(1, min(-(-sum(lengths) // (world.size * most)), n // world.size))
    parts = world.size * pieces
    bounds = [n * i // parts for i in range(parts + 1)]
    mine = range(world.rank * pieces, (world.rank + 1) * pieces)
    return [range(bounds[i], bounds[i + 1]) for i in mine]


class Means:
    """Means over several groups, each counting with its own weight, in all processes."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}

    def add(self, weight: float, values: Mapping[str, float | Tensor]) -> None:
        for name, value in {**values, "": 1.0}.items():
            self._sums[name] = self._sums.get(name, 0.0) + weight * float(value)

    def read(self, world: World) -> dict[str, float]:
        sums = world.sum(self._sums)
        weight = sums.pop("", 0.0)
        return {name: value / weight for name, value in sums.items()} if weight else sums
