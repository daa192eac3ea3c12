"""Steps that feed one row several tokens at once and draw what follows each of them, recorded where that can be."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptfast.generate.cache import KVCache
from gptfast.generate.graph import GraphReplay
from gptfast.generate.recording import NotReplayable
from gptfast.generate.replay import Replay, Replays, integers
from gptfast.generate.sampler import Sampler

SIZES = (1, 2, 4, 8, 16)  # tokens fed at once. Each is recorded when it is first wanted.


class Steps:
    """The steps of one text: `sampler` has one row, and so have the caches."""

    def __init__(self, model: Any, sampler: Sampler, replays: Replays | None) -> None:
        self.model, self.sampler, self.replays = model, sampler, replays
        self._taken: dict[int, Replay | GraphReplay] = {}  # by the tokens they feed
        self._wide: dict[int, Sampler] = {}
        self._numbers, self._steps = integers(SIZES[-1])
        self._lengths: Tensor | None = None  # of the cache; its memory is self._count
        self._keys: Tensor | None = None  # the cache's first layer's when its capacity was asked for
        self._capacity = 0
        self._history: Tensor | None = None  # (SIZES[-1], longest): row i is the text up to the step's token i
        self._behind: tuple[int, list[int], int] | None = None  # of the last step: number, tokens drawn and fed

    def largest(self, most: int, cache: KVCache, step: int) -> int:
        """The largest step of at most so many tokens that the cache has room for. All of its tokens are drawn with the
        end tokens forbidden, or none."""
        if step < self.sampler.min_new:
            most = min(most, self.sampler.min_new - step)
        if self._keys is not cache.k[0]:  # asking a tensor takes longer
            self._keys, self._capacity = cache.k[0], cache.capacity
        most = min(most, self._capacity - self._length(cache))
        return max(size for size in SIZES if size <= max(most, 1))

    def draw(
        self, cache: KVCache, tokens: list[int], step: int, record: bool = True
    ) -> Iterable[tuple[int, float | None]]:
        """Feeds these tokens behind what the cache holds; gives the token drawn after each, and its log-prob.

        What is drawn after tokens[i] has number step + i, and means something only where tokens[:i + 1] is the text:
        ask no further than that. The caller advances the cache. record: whether a step may be recorded now.
        """
        if cache.lengths is not self._lengths and cache.lengths.device.type == "cpu":
            self._count, lengths = integers(1, torch.int32)
            cache.lengths = self._lengths = lengths.copy_(cache.lengths)
        replay = self._recorded(cache, len(tokens), record)
        if isinstance(replay, Replay) and self.sampler.steady:
            try:
                sampler = self._sampler(tokens, step)
                begin = perf_counter()
                ids, logprobs = replay.draws(sampler, tokens, self._length(cache), step < self.sampler.min_new)
                replay.took(perf_counter() - begin)
                self._behind = step, ids, len(tokens)
                return zip(ids, logprobs or [None] * len(ids))
            except NotReplayable:
                self.sampler.steady = False
        return self._one_by_one(cache, tokens, step, replay)

    def _length(self, cache: KVCache) -> int:
        return self._count[0] if cache.lengths is self._lengths else int(cache.lengths.item())

    def advance(self, cache: KVCache, tokens: int) -> None:
        """Counts so many of the tokens that were fed."""
        if cache.lengths is self._lengths:
            self._count[0] += tokens
        else:
            cache.advance(tokens)

    def seconds(self, size: int) -> float | None:
        """What a step of so many tokens takes, where that is known."""
        return self._taken[size].seconds if size in self._taken else None

    def close(self) -> None:
        """Gives back what other texts may use."""
        for replay in self._taken.values():
            assert self.replays is not None
            self.replays.give(replay)
        self._taken.clear()

    def _one_by_one(
        self, cache: KVCache, tokens: list[int], step: int, replay: Replay | GraphReplay | None
    ) -> Iterator[tuple[int, float | None]]:
        """Each token is drawn when it is asked for: a processor sees what it would without the tokens behind."""
        if self._history is not None:
            self._write_history(tokens, step)
        ids = torch.tensor([tokens], dtype=torch.int64, device=cache.lengths.device)
        logits = self.model(ids, cache=cache)[0] if replay is None else replay.step(ids)
        drawn: list[int] = []
        self._behind = step, drawn, len(tokens)
        for i in range(len(tokens)):
            (token,), logprobs = self.sampler(logits[i : i + 1], step + i)
            drawn.append(token)
            yield token, None if logprobs is None else logprobs[0]

    def _recorded(self, cache: KVCache, size: int, record: bool) -> Replay | GraphReplay | None:
        found = self._taken.get(size)
        if self.replays is None or (found is not None and found.bound(cache)):
            return found
        if found is not None:
            self.replays.give(self._taken.pop(size))
        found = self.replays.take(cache, record, size)
        if found is not None:
            self._taken[size] = found
        return found

    def _sampler(self, tokens: list[int], step: int) -> Sampler:
        """The sampler of all of a step's tokens at once."""
        size, own = len(tokens), self.sampler
        if own.penalised:
            self._write_history(tokens, step)
        if size not in self._wide:
            history = None if self._history is None else self._history[:size]
            self._wide[size] = own.spread(self._steps[:size], history)
        for i in range(size):
            self._numbers[i] = step + i
        return self._wide[size]

    def _write_history(self, tokens: list[int], step: int) -> None:
        """Row i of the history becomes the text up to tokens[i], the first of which every row has already."""
        own = self.sampler
        assert own.history is not None
        if self._history is None:
            self._memory, history = integers(SIZES[-1] * own.history.shape[1])
            self._history = history.view(SIZES[-1], -1)
            self._history.copy_(own.history)
            own.history = self._history[:1]  # what it draws by itself is written there
        # From the last step's number on, rows may hold guesses.
        before, drawn, fed = self._behind or (step, [], 1)
        text, end = drawn[: step - before], max(step + len(tokens), before + fed) - 1
        width, place = end - before, int(own.prompt_lengths.item()) + before
        for i in range(SIZES[-1]):
            row = text + tokens[1 : i + 1] if i < len(tokens) else text
            self._memory[place : place + width] = array("q", row + [-1] * (width - len(row)))
            place += self._history.shape[1]
