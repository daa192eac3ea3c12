"""Sequences of different lengths side by side in one row, so that no token is padding, and the order they come in.

Which sequences a step trains on is a function of the seed and the step alone. A run that goes on from a checkpoint
therefore sees what it would have seen, and nothing of the order needs to be stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Packed(NamedTuple):
    """n sequences in one row of T tokens.

    ids         (T,) int64
    targets     (T,) int64: the token that follows each, or -100 where nothing is to be learnt
    cu_seqlens  (n + 1,) int32: sequence i is tokens cu_seqlens[i] .. cu_seqlens[i + 1] - 1
    """

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    @property
    def learnt(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    @property
    def last(self) -> Tensor:
        """(n,) int64: where each sequence's last token stands."""
        return self.cu_seqlens[1:].long() - 1


def pack(sequences: Sequence[Sequence[int] | Tensor], masks: Sequence[Sequence[bool] | Tensor] | None = None) -> Packed:
    """One row of these sequences. Every token but a sequence's last has the next one as its target.

    masks  for each sequence, as long as it: True where the token is to be learnt (as a target); None = all
    """
    rows = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
    targets = []
    for i, row in enumerate(rows):
        following = torch.full_like(row, IGNORED)
        following[:-1] = row[1:]
        if masks is not None:
            mask = torch.as_tensor(masks[i], dtype=torch.bool)
            if mask.shape != row.shape:
                raise ValueError(f"pack: expected a mask of {len(row)} tokens, got {len(mask)}")
            following[:-1].masked_fill_(~mask[1:], IGNORED)
        targets.append(following)
    return Packed(torch.cat(rows), torch.cat(targets), offsets([len(r) for r in rows]))


def offsets(lengths: Sequence[int]) -> Tensor:
    """cu_seqlens (n + 1,) int32 of sequences with these lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).int()


def seed_of(*parts: Any) -> int:
    """A seed below 2^62 that is a function of these values alone: the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def generator(*parts: Any) -> torch.Generator:
    """A generator seeded by `seed_of`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def shuffled(n: int, *parts: Any) -> list[int]:
    """0 .. n-1 in an order that is a function of the parts."""
    return torch.randperm(n, generator=generator(*parts)).tolist()


class Order:
    """An endless order of n examples: each epoch has all of them, in an order of its own."""

    def __init__(self, n: int, seed: int, name: str) -> None:
        if n < 1:
            raise ValueError(f"{name}: expected at least one example, got none")
        self.n, self.seed, self.name = n, seed, name
        self._epoch, self._permutation = -1, []

    def __getitem__(self, i: int) -> int:
        """The example at place i of the endless order."""
        epoch, place = divmod(i, self.n)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, shuffled(self.n, self.name, self.seed, epoch)
        return self._permutation[place]

    def batch(self, step: int, size: int) -> list[int]:
        """The examples of a step."""
        return [self[i] for i in range(step * size, (step + 1) * size)]


class Corpus:
    """Tokenised documents, cut into batches of exactly T tokens for next-token prediction.

    In each epoch the documents stand in a new order, end to end. A batch is the next T tokens: pieces of at most
    `context` tokens that each belong to one document. Where a batch begins differs from epoch to epoch, so that
    the cuts do too.

    tokens   (N,) int32: all documents, each beginning with its start token
    starts   (documents + 1,) int64: where each begins
    """

    def __init__(self, tokens: Tensor, starts: Tensor, context: int, batch_tokens: int, seed: int) -> None:
        if len(tokens) < batch_tokens + 1:
            raise ValueError(f"expected text of more than {batch_tokens} tokens (one step), got {len(tokens)}")
        self.tokens, self.starts = tokens, starts
        self.context, self.batch_tokens, self.seed = context, batch_tokens, seed
        self.steps_per_epoch = (len(tokens) - 1) // batch_tokens
        self._epoch = -1
        self._order = self._ends = torch.empty(0, dtype=torch.int64)
        self._shift = 0

    def _enter(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        g = generator("corpus", self.seed, epoch)
        self._order = torch.randperm(len(self.starts) - 1, generator=g)
        lengths = self.starts.diff()[self._order]
        self._ends = lengths.cumsum(0)
        rest = len(self.tokens) - 1 - self.steps_per_epoch * self.batch_tokens
        self._shift = int(torch.randint(rest + 1, (), generator=g))
        self._epoch = epoch

    def pieces(self, step: int) -> Iterator[tuple[int, int]]:
        """(first, last + 1) in `tokens` of the pieces of a step: T tokens in all, none longer than the context."""
        epoch, place = divmod(step, self.steps_per_epoch)
        self._enter(epoch)
        at = self._shift + place * self.batch_tokens
        end = at + self.batch_tokens
        document = int(torch.searchsorted(self._ends, at, right=True))
        while at < end:
            stop = min(int(self._ends[document]), end)
            which = int(self._order[document])
            offset = int(self.starts[which + 1]) - int(self._ends[document])
            while at < stop:
                last = min(at + self.context, stop)
                yield at + offset, last + offset
                at = last
            document += 1

    def batch(self, step: int) -> Packed:
        """A step's tokens; a piece's last token has a target too, where its document goes on."""
        ids, targets, lengths = [], [], []
        for first, last in self.pieces(step):
            ids.append(self.tokens[first:last])
            following = torch.full((last - first,), IGNORED, dtype=torch.int64)
            document_end = int(self.starts[torch.searchsorted(self.starts, first, right=True)])
            known = min(last + 1, document_end) - first - 1
            following[:known] = self.tokens[first + 1 : first + 1 + known].long()
            targets.append(following)
            lengths.append(last - first)
        return Packed(torch.cat(ids).long(), torch.cat(targets), offsets(lengths))


def split(packed: Packed, most: int) -> list[Packed]:
    """The same sequences in rows of about `most` tokens: micro-batches. A sequence is never cut."""
    cuts = packed.cu_seqlens.tolist()
    groups: list[list[int]] = [[]]
    for i in range(len(cuts) - 1):
        if groups[-1] and cuts[i + 1] - cuts[groups[-1][0]] > most:
            groups.append([])
        groups[-1].append(i)
    return [_part(packed, cuts, group[0], group[-1] + 1) for group in groups if group]


def share(packed: Packed, rank: int, size: int) -> Packed:
    """The sequences that process `rank` of `size` has: a run of them with about its part of the tokens, maybe none."""
    if size == 1:
        return packed
    cuts = packed.cu_seqlens.tolist()
    bounds = [min(range(len(cuts)), key=lambda i: (abs(cuts[i] * size - cuts[-1] * r), i)) for r in (rank, rank + 1)]
    return _part(packed, cuts, *bounds)


def _part(packed: Packed, cuts: list[int], first: int, end: int) -> Packed:
    inside = slice(cuts[first], cuts[end])
    return Packed(packed.ids[inside], packed.targets[inside], packed.cu_seqlens[first : end + 1] - cuts[first])
