"""The loop: prompts in by chunks, then one token a step for all rows at once.

A row's tokens depend on its own prompt, seed and settings alone: not on the rows beside it, the size of the chunks or
the number of threads. So rows may be fed together or one by one and may leave when they are done, whatever is fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gptfast.generate.cache import KVCache
from gptfast.generate.graph import GraphReplay
from gptfast.generate.recording import NotReplayable
from gptfast.generate.replay import Replay, Replays
from gptfast.generate.sampler import Sampler
from gptfast.generate.stop import Text

if TYPE_CHECKING:
    from gptfast.generate.speculative import Speculation

CHUNK = 512  # prompt tokens of all rows in one forward pass: many for each weight read, few enough for caches
PASSES = 512, 128  # of them in a recorded pass
WORTH_RECORDING = 8  # decode steps
BLOCK = 256  # tokens by which a KV cache grows
GPU_BLOCK = 4096  # the same on a GPU, where a step for another cache is another graph

WORTH_SHARING = 64  # prompt tokens not computed again: about what one more pass over the weights costs

Progress = Callable[[int, int], None]


@dataclass
class Row:
    """One continuation on its way."""

    index: int  # among the call's rows
    prompt_tokens: int
    seed: int
    text: Text
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    fresh: str = ""  # the text that the last step released
    finish: str | None = None

    def interrupt(self) -> None:
        """Ends a row that is still running, with what it has."""
        if self.finish is None:
            self.finish, self.fresh = "interrupted", self.text.flush()


@dataclass(frozen=True)
class Limits:
    """Where a row ends."""

    context: int
    max_new: int
    min_new: int = 0
    stop_ids: frozenset[int] = frozenset()


class Loop:
    """The rows of one call. `kept`: the cache is the caller's, so that no row may leave it."""

    def __init__(
        self, model: nn.Module, cache: KVCache, limits: Limits, *, kept: bool = False, replays: Replays | None = None
    ) -> None:
        self.model, self.cache, self.limits, self.kept, self.replays = model, cache, limits, kept, replays
        self.speculation: Speculation | None = None  # of the only row
        self._replay: Replay | GraphReplay | None = None
        self.rows: list[Row] = []
        self.steps = self.prefill_tokens = 0
        self._keys: Tensor | None = None  # the cache's first layer's when its capacity was asked for
        self._capacity = 0
        self.logits: Tensor | None = None

    @torch.no_grad()
    def prefill(self, contexts: Sequence[list[int]], progress: Progress | None = None) -> None:
        """Feeds what the cache doesn't hold yet of each row's tokens; at least the last, whose logits are needed."""
        held = self.cache.lengths.tolist()
        keep = [min(h, len(c) - 1) for h, c in zip(held, contexts)]
        if keep != held:
            self.cache.truncate(torch.tensor(keep, dtype=torch.int32, device=self.cache.lengths.device))
        self._reserve(max(map(len, contexts)))
        shared, done = _shared(contexts, keep), 0
        total = sum(map(len, contexts)) - sum(keep) - shared * (len(keep) - 1)

        def report(tokens: int) -> None:
            if progress is not None:
                progress(done + tokens, total)

        if shared:
            begin, end = keep[0], keep[0] + shared
            self._feed(self.cache.row(0), [contexts[0][begin:end]], report)
            self.cache.share(begin, end)
            keep, done = [end] * len(keep), shared
        todo = [c[k:] for c, k in zip(contexts, keep)]
        self.prefill_tokens = total
        found = []
        for group in _groups(list(map(len, todo)), keep):
            cache = self.cache if len(group) == len(todo) else self.cache.rows(group.start, group.stop)
            rows = todo[group.start : group.stop]
            found.append(self._feed(cache, rows, report))
            done += sum(map(len, rows))
        self.logits = torch.cat(found) if len(found) > 1 else found[0]

    def _feed(self, cache: KVCache, todo: list[list[int]], report: Callable[[int], None]) -> Tensor:
        """Feeds right-padded chunks; the logits (B, V) after each row's last token."""
        lengths, device = [len(t) for t in todo], cache.lengths.device
        width, logits, done = max(1, CHUNK // len(todo)), None, 0
        if len(todo) == 1 and self.replays is not None:
            logits, done = self._replayed(cache, todo[0], report)
        for start in range(done, max(lengths), width):
            parts = [t[start : start + width] for t in todo]
            T = max(map(len, parts))
            ids = torch.tensor([p + [0] * (T - len(p)) for p in parts], dtype=torch.int64, device=device)
            last = torch.tensor([max(len(p) - 1, 0) for p in parts], dtype=torch.int64, device=device)
            chunk = self.model(ids, cache=cache, last=last)
            cache.advance(torch.tensor([len(p) for p in parts], dtype=torch.int32, device=device))
            if logits is None:
                logits = chunk
            else:
                ends = torch.tensor([len(p) > 0 for p in parts], device=device)
                logits[ends] = chunk[ends]
            done += sum(map(len, parts))
            report(done)
        assert logits is not None
        return logits

    def _replayed(self, cache: KVCache, todo: list[int], report: Callable[[int], None]) -> tuple[Tensor | None, int]:
        """Feeds as many tokens of one row as recorded passes take: the logits (1, V) if the last was the row's, and how
        many. Recording takes as long as one more pass, so one is recorded for what has come before or comes often."""
        assert self.replays is not None
        done, logits = 0, None
        for tokens in PASSES:
            end = done + (len(todo) - done) // tokens * tokens
            recorded = self.replays.take_pass(cache, tokens, (end - done) // tokens) if end > done else None
            if recorded is None:
                continue
            try:
                for start in range(done, end, tokens):
                    branch, stream = recorded.run(torch.tensor([todo[start : start + tokens]], dtype=torch.int64))
                    cache.advance(tokens)
                    if start + tokens == len(todo):
                        model = self.replays.model
                        logits = model.head_of(model.joined(branch[:, -1], stream[:, -1])).float()
                    report(start + tokens)
            finally:
                self.replays.give(recorded)
            done = end
        return logits, done

    @torch.no_grad()
    def begin(self, rows: list[Row], sources: list[int], sampler: Sampler) -> None:
        """Starts these rows, each from the prefilled prompt that `sources` names."""
        assert self.logits is not None
        if sources != list(range(len(self.logits))):
            self.cache = self.cache.select(sources)
            self.logits = self.logits[torch.tensor(sources, device=self.logits.device)]
        self.rows, self.sampler = rows, sampler
        if self.limits.max_new == 0:
            for row in rows:
                row.finish = "length"

    @property
    def running(self) -> bool:
        return any(row.finish is None for row in self.rows)

    def step(self) -> None:
        """One new token for every running row; with speculation perhaps several."""
        for row in self.rows:
            row.fresh = ""
        if self.logits is not None:
            with torch.no_grad():
                ids, logprobs = self.sampler(self.logits, self.steps)
            self.logits = None
        elif self.speculation is not None:
            with torch.no_grad():
                return self._speculate(self.speculation)
        else:
            self._leave()
            ids, logprobs = self._next()
        self.steps += 1
        for i, (row, token) in enumerate(zip(self.rows, ids)):
            if row.finish is None:
                self._accept(row, token, None if logprobs is None else logprobs[i])

    def _speculate(self, speculation: Speculation) -> None:
        row, limits = self.rows[0], self.limits
        length = row.prompt_tokens + len(row.tokens)
        left = min(limits.max_new - len(row.tokens), limits.context - length)
        self._reserve(length + min(left, speculation.most) - 1)

        def take(token: int, logprob: float | None) -> bool:
            self.steps += 1
            self._accept(row, token, logprob)
            return row.finish is None

        speculation.step(self.cache, row.tokens, left, take)

    def _accept(self, row: Row, token: int, logprob: float | None) -> None:
        if token < 0:
            raise RuntimeError(
                f"row {row.index}, step {self.steps - 1}: there is no token to choose, "
                "because the logits hold NaN or everything is masked"
            )
        if logprob is not None:
            row.logprobs.append(logprob)
        row.tokens.append(token)
        n, limits = len(row.tokens), self.limits
        if token in limits.stop_ids:
            row.finish = "stop"
        else:
            row.fresh += row.text.push(token, match=n >= limits.min_new)
            if row.text.stopped:
                row.finish = "stop"
            elif n >= limits.max_new:
                row.finish = "length"
            elif row.prompt_tokens + n >= limits.context:
                row.finish = "context"
        if row.finish is not None:
            row.fresh += row.text.flush()

    def _leave(self) -> None:
        """Drops finished rows when half of the batch or more is done: a copy of the others' keys and values, seldom."""
        alive = [i for i, row in enumerate(self.rows) if row.finish is None]
        if self.kept or self.sampler.processors or 2 * len(alive) > len(self.rows):
            return
        self.cache = self.cache.select(alive)
        self.sampler.select(alive)
        self.rows = [self.rows[i] for i in alive]

    def _next(self) -> tuple[list[int], list[float] | None]:
        """Feeds each row's last token and draws the next; a finished row's goes where nothing is kept.

        Between two replayed steps nothing asks PyTorch: after a model's weights have passed through the caches its
        calls take tens of microseconds each.
        """
        self._reserve(max(row.prompt_tokens + len(row.tokens) for row in self.rows))
        last = [row.tokens[-1] for row in self.rows]
        running = [row.finish is None for row in self.rows]
        replay = self._recorded()
        if replay is not None and self.sampler.steady and self.steps >= self.limits.min_new:
            try:
                return replay.draw(self.sampler, last, running, self.steps)
            except NotReplayable:
                self.sampler.steady = False
        with torch.no_grad():
            device = self.cache.lengths.device
            tokens = torch.tensor(last, dtype=torch.int64, device=device)
            logits = self.model(tokens[:, None], cache=self.cache)[:, -1] if replay is None else replay.step(tokens)
            self.cache.advance(torch.tensor(running, dtype=torch.int32, device=device))
            return self.sampler(logits, self.steps)

    def _recorded(self) -> Replay | GraphReplay | None:
        """The recorded step for the present cache."""
        if self.replays is None or (self._replay is not None and self._replay.bound(self.cache)):
            return self._replay
        self.close()
        # Recording takes about as long as two steps that are not replayed.
        left = self.limits.max_new - min(len(row.tokens) for row in self.rows)
        with torch.no_grad():
            self._replay = self.replays.take(self.cache, record=left >= WORTH_RECORDING)
        return self._replay

    def close(self) -> None:
        """Gives back what other calls may use."""
        if self.speculation is not None:
            self.speculation.close()
        if self._replay is not None and self.replays is not None:
            self.replays.give(self._replay)
            self._replay = None

    def _reserve(self, tokens: int) -> None:
        if self._keys is not self.cache.k[0]:  # asking a tensor for its shape takes longer
            self._keys, self._capacity = self.cache.k[0], self.cache.capacity
        if tokens > self._capacity:
            self.cache.grow(room(tokens, self.limits.context, self.cache.lengths.device))


def room(tokens: int, most: int, device: torch.device) -> int:
    """The capacity of a cache for so many tokens that doesn't grow with each; `most` is enough for ever."""
    block = BLOCK if device.type == "cpu" else GPU_BLOCK
    return min(-(-tokens // block) * block, most)


def _shared(contexts: Sequence[list[int]], keep: Sequence[int]) -> int:
    """How many tokens behind the first `keep` of each row are the same in all rows and worth computing in one of them
    alone; each row keeps one at least for itself, whose logits are needed."""
    if len(contexts) < 2 or len(set(keep)) > 1:
        return 0
    low, high, most = min(contexts), max(contexts), min(map(len, contexts)) - 1
    common = next((i for i in range(most) if low[i] != high[i]), most)
    shared = max(0, common - keep[0])
    return shared if shared * (len(contexts) - 1) >= WORTH_SHARING else 0


def _groups(lengths: Sequence[int], keep: Sequence[int]) -> list[range]:
    """Rows beside each other that are fed together: all, or runs of about one length.

    Padding costs as much as tokens do, and rows that begin at different places would be padded past the cache.
    """

    def fits(total: int, rows: int, longest: int) -> bool:
        return 4 * total >= 3 * rows * longest

    if len(set(keep)) == 1 and fits(sum(lengths), len(lengths), max(lengths)):
        return [range(len(lengths))]
    groups, first, total, longest = list[range](), 0, 0, 0
    for i, length in enumerate(lengths):
        if i > first and not (keep[i] == keep[first] and fits(total + length, i - first + 1, max(longest, length))):
            groups.append(range(first, i))
            first, total, longest = i, 0, 0
        total, longest = total + length, max(longest, length)
    return [*groups, range(first, len(lengths))]
