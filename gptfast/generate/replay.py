"""Replay: a decode step recorded once and then run in one call, without Python, dispatcher or allocation in between.

A decode step is the same kernels on the same memory each time; only the tokens, the lengths and what is computed from
them differ, and those the kernels read through pointers. So one step is run while every launch is written down with its
arguments, and the list becomes a native plan that a team of threads walks through by itself.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptfast.generate.arena import Arena
from gptfast.generate.cache import KVCache
from gptfast.generate.fuse import Launch, fused
from gptfast.generate.graph import GraphReplay
from gptfast.generate.recording import NotReplayable, Recording, places, pointers, weights
from gptfast.kernels import reason_missing
from gptfast.model import GPT

if TYPE_CHECKING:
    from gptfast.generate.sampler import Sampler

log = logging.getLogger("gptfast")
WORTH_A_PASS = 6  # passes over a prompt, the first of which is recorded: it takes twice as long, the others 0.8
KEPT = 4  # recorded passes of one number of tokens that wait for the next call

# Functions whose result is new memory and yet no part of the computation: fresh memory, and values read to be checked.
HARMLESS = {"empty", "new_empty", "min", "max", "aminmax", "all", "ge", "le", "eq", "__eq__", "__and__", "__or__"}
IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


class _Watch(TorchFunctionMode):
    """Keeps the memory of every tensor that a step makes, and refuses what a plan would leave out. With an arena, new
    memory is the arena's, which keeps it."""

    def __init__(self, arena: Arena | None = None) -> None:
        super().__init__()
        self.arena = arena
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.arena is not None and func is torch.empty and kwargs.keys() == {"dtype"}:
            shape = args[0] if args and not isinstance(args[0], int) else args
            return self.arena.empty(shape, kwargs["dtype"])
        result = func(*args, **kwargs)
        written = func.__name__ in IN_PLACE or (func.__name__.endswith("_") and not func.__name__.endswith("__"))
        if isinstance(result, Tensor):
            fresh = not isinstance(args[0], Tensor) or _memory(result) != _memory(args[0])
            written |= fresh and func.__name__ not in HARMLESS
            if self.arena is None or not self.arena.holds(_memory(result)):
                self.made.append(result)
        if written:
            raise NotReplayable(f"{func.__name__} ran between the kernels of a step")
        return result


def integers(n: int, dtype: torch.dtype = torch.int64) -> tuple[array[int], Tensor]:
    """n zeros, int64 or int32, and a tensor of the same memory. An element of an array is written in 0.05 us; of a
    tensor in 5, and where a model's weights have just passed through the caches in 140.
    """
    memory = array("q" if dtype == torch.int64 else "i", bytes(dtype.itemsize * n))
    return memory, torch.frombuffer(memory, dtype=dtype)


@dataclass(frozen=True)
class StepTrace:
    """The times of one replayed step, in nanoseconds of the steady clock; 0 where a thread was not there."""

    launches: list[Launch]
    begin: int
    end: int
    came: list[list[int]]  # [launch, and one more for the end][thread]
    waits: list[list[list[tuple[int, int]]]]  # [launch][thread]: from its last task to the end of everybody's


class Tracing:
    """The replayed steps since it began."""

    def __init__(self) -> None:
        self._taken: list[tuple[list[Launch], int, Any]] = []

    def run(self, plan: Any, launches: list[Launch]) -> None:
        threads = torch.get_num_threads()
        self._taken.append((launches, threads, plan.trace(threads)))  # read later: that takes as long as a step

    def steps(self) -> list[StepTrace]:
        return [_step_trace(*taken) for taken in self._taken]


_tracing: Tracing | None = None


@contextmanager
def tracing() -> Iterator[Tracing]:
    """Inside, the times of every replayed step are taken, which makes it a few percent longer."""
    global _tracing
    before, _tracing = _tracing, Tracing()
    try:
        yield _tracing
    finally:
        _tracing = before


def _step_trace(launches: list[Launch], threads: int, times: Any) -> StepTrace:
    n, wait, came = len(launches), times.wait, times.came
    each = len(wait) // n  # times of one launch: its phases, and in each the threads
    waits = [
        [[(a, b) for a, b in wait[i * each + t : (i + 1) * each : threads] if a] for t in range(threads)]
        for i in range(n)
    ]
    return StepTrace(
        launches, times.begin, times.end, [came[i : i + threads] for i in range(0, len(came), threads)], waits
    )


def _run(plan: Any, launches: list[Launch]) -> None:
    if _tracing is None:
        plan.run(torch.get_num_threads())
    else:
        _tracing.run(plan, launches)


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def record(function: Callable[[], Any]) -> tuple[Any, list[Launch], list[Tensor]]:
    """Runs a function and writes its launches down: (its result, the launches, the memory that they work on).

    Raises NotReplayable where it does more than launch kernels.
    """
    from gptfast.kernels.cpu import recording

    with recording() as launches, _Watch() as watch:
        return function(), launches, watch.made


def record_in_arena(function: Callable[[], Any]) -> tuple[Any, list[Launch], Any]:
    """record() and fused(), in as little memory as the tensors need that live at one time."""
    from gptfast.kernels.cpu import recording

    with recording() as launches, _Watch(Arena(launches)) as watch:
        result = function()
    assert watch.arena is not None
    return result, fused(launches, watch.arena.given), (watch.arena, watch.made)


class Recorded:
    """A function's launches, recorded as it ran once: run() repeats them and gives the same tensors as `result` again.

    Raises NotReplayable where it does more than launch kernels.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        from gptfast.kernels.cpu import Plan

        self.result, launches, self._made = record(function)
        self._plan = Plan(launches)

    def run(self) -> Any:
        """The result, computed anew from what its inputs hold now."""
        self._plan.run(torch.get_num_threads())
        return self.result


class Planned(Recording):
    """A pass recorded as a native plan, which bind(cache) lays out.

    Raises NotReplayable where a pass isn't made of kernels alone.
    """

    def __init__(self, model: GPT, cache: KVCache, tokens: int) -> None:
        super().__init__(model, cache, tokens)
        (self._ids, ids), (self._positions, positions) = integers(cache.batch * tokens), integers(cache.batch * tokens)
        self.ids, self.positions = ids.view(cache.batch, tokens), positions.view(cache.batch, tokens)
        self._launches: list[Launch] = []
        self._recorded = pointers(cache)
        self._plan: Any = None
        self._bound: list[Launch] = []

    def bind(self, cache: KVCache) -> None:
        from gptfast.kernels.cpu import Plan

        moved, layout = dict(zip(self._recorded, pointers(cache))), _layout(cache)

        def fits(name: str, value: Any) -> Any:
            return layout[name] if name in layout else moved.get(value, value) if isinstance(value, int) else value

        self._bound = [
            (op, threads, {name: fits(name, value) for name, value in fields.items()})
            for op, threads, fields in self._launches
        ]
        self._plan = Plan(self._bound)
        super().bind(cache)

    def unbind(self) -> None:
        self._plan = None
        super().unbind()


class Pass(Planned):
    """A recorded pass over so many tokens of a prompt, up to the head. What lies between its launches is as much as the
    tokens of one layer need. It serves smaller caches too."""

    def __init__(self, model: GPT, cache: KVCache, tokens: int) -> None:
        super().__init__(model, cache, tokens)
        self.capacity = cache.capacity
        self.positions.copy_(cache.lengths[:, None] + torch.arange(tokens))
        if model.config.positions == "rope":
            model.rope_tables(cache.capacity, model.device)  # made now: a plan could not repeat it
        # What it writes behind the lengths is overwritten by the first that is replayed.
        self._made, self._launches, memory = record_in_arena(lambda: model.branches(self.ids, cache, self.positions))
        self._keep = model, model._tables, memory

    @classmethod
    def key_of(cls, model: GPT, cache: KVCache, tokens: int) -> tuple[Any, ...]:
        kind, batch, _, *rest = super().key_of(model, cache, tokens)
        return kind, batch, *rest

    def serves(self, key: tuple[Any, ...], cache: KVCache) -> bool:
        # Its tables of angles, and its room for partial results, are for so many tokens.
        return self.key == key and cache.capacity <= self.capacity

    def run(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What model.branches gives for tokens (B, T) int64; the next pass overwrites it."""
        assert self._cache is not None
        self.ids.copy_(tokens)
        self.positions.copy_(self._cache.lengths[:, None] + torch.arange(self.tokens))
        self._plan.run(torch.get_num_threads())
        return self._made


class Replay(Planned):
    """A recorded decode step.

    After bind(cache), step(tokens) gives the logits (B T, V) fp32 that model(ids, cache) would, a row for each token.
    The caller advances the cache; the logits are overwritten by the next step.
    """

    def __init__(self, model: GPT, cache: KVCache, tokens: int = 1) -> None:
        super().__init__(model, cache, tokens)
        self.running = torch.ones(cache.batch, dtype=torch.int32)
        self._running: list[bool] | None = None  # what it holds
        tables = model.rope_tables(cache.capacity, model.device) if model.config.positions == "rope" else None
        # A step like any other: what it writes behind the lengths is overwritten by the first that is replayed.
        self.logits, launches, made = record(
            lambda: model.logits(self.ids, cache, positions=self.positions).view(self.ids.numel(), -1)
        )
        self._launches, self._keep = fused(launches), (model, tables, made)
        self._drawn: list[Launch] = []  # the launches of `draw`
        self._drawing: tuple[Any, Tensor, Tensor | None] | None = None  # a plan, its tokens and their log-probs
        self._masked: bool | None = None  # how the plan of `draws` draws; None: there is none

    def unbind(self) -> None:
        """Lets go of the cache."""
        self._drawing = self._masked = None  # before the memory that they point to
        super().unbind()

    def step(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) int64, each row's last ones; T = 1 may be left out."""
        assert self._cache is not None
        self.ids.copy_(tokens.view(self.ids.shape))
        self.positions.copy_(self._cache.lengths[:, None] + torch.arange(self.tokens))
        self._plan.run(torch.get_num_threads())
        return self.logits.float()

    def draws(
        self, sampler: Sampler, tokens: list[int], length: int, masked: bool
    ) -> tuple[list[int], list[float] | None]:
        """A step of the cache's only row, which holds `length` tokens, and a token drawn after each of its T, in one
        call; the caller advances the cache. sampler: one row for each of the tokens, the same until this is bound anew.

        Raises NotReplayable, with nothing done, where the sampler does more than launch a kernel.
        """
        from gptfast.kernels.cpu import Plan

        if self._masked != masked:
            (ids, logprobs), launches, self._drawn_with = record(lambda: sampler.draw(self.logits, masked))
            self._drawn = [*self._bound, *launches]
            self._drawing, self._masked = (Plan(self._drawn), ids, logprobs), masked
            self._drew = _arrays(ids, logprobs)
        assert self._drawing is not None
        for i, token in enumerate(tokens):
            self._ids[i], self._positions[i] = token, length + i
        _run(self._drawing[0], self._drawn)
        ids, logprobs = self._drew
        return list(ids), None if logprobs is None else list(logprobs)

    def took(self, seconds: float) -> None:
        """What `draws` took just now. `seconds` follows by a tenth at most: an interrupted step says little of it."""
        before = self.seconds or seconds
        self.seconds = min(max(seconds, 0.9 * before), 1.1 * before)

    def draw(
        self, sampler: Sampler, tokens: list[int], running: list[bool], step: int
    ) -> tuple[list[int], list[float] | None]:
        """A step and the tokens drawn from its logits, in one call that advances the cache's running rows as well.

        tokens, running: of each row; step: the sampler's. Between one draw and the next only `running` is read, so
        nothing else may have touched the cache or the sampler: after anything that did, bind anew.

        Raises NotReplayable, with nothing done, where the sampler does more than launch a kernel.
        """
        if self._drawing is None:
            self._begin(sampler, tokens, step)
        assert self._drawing is not None
        if running != self._running:
            self._running = list(running)
            self.running.copy_(torch.tensor(running))
        _run(self._drawing[0], self._drawn)
        ids, logprobs = self._drew
        return list(ids), None if logprobs is None else list(logprobs)

    @torch.no_grad()
    def _begin(self, sampler: Sampler, tokens: list[int], step: int) -> None:
        from gptfast.kernels.cpu import Plan

        assert self._cache is not None
        lengths, history = self._cache.lengths, sampler.history
        (ids, logprobs), launches, made = record(lambda: sampler.draw(self.logits))
        move: dict[str, Any] = {
            **dict(ids=self.ids, positions=self.positions, steps=sampler.steps, lengths=lengths, drawn=ids),
            **dict(running=self.running, history=history),
            **dict(prompt_lengths=None if history is None else sampler.prompt_lengths),
        }
        fields = {name: 0 if t is None else t.data_ptr() for name, t in move.items()}
        fields |= {"rows": len(ids), "history_cols": 0 if history is None else history.shape[1]}
        self._drawn = [*self._bound, *launches, ("advance", 1, fields)]
        self._drawing = Plan(self._drawn), ids, logprobs
        self._drew = _arrays(ids, logprobs)
        self._drawn_with = made, move
        self.ids[:, 0], self.positions[:, 0] = torch.tensor(tokens), lengths
        sampler.steps.fill_(step)
        self._running = None


def _arrays(ids: Tensor, logprobs: Tensor | None) -> tuple[Any, Any]:
    """The memory of drawn tokens (int64) and their log-probs (fp32): a tensor's own methods take some 100 us where a
    model's weights have just passed through the caches."""
    n = len(ids)
    reals = None if logprobs is None else (ctypes.c_float * n).from_address(logprobs.data_ptr())
    return (ctypes.c_int64 * n).from_address(ids.data_ptr()), reals


R = TypeVar("R", bound=Recording)


class Replays:
    """The recorded passes of one model: calls take one and give it back. Safe to use from several threads."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._passes: dict[int, int] = {}  # how many were wanted, by their tokens
        self._free: list[Recording] = []  # the last one used at the end
        self._refused: set[tuple[Any, ...]] = set()
        self._places: list[Any] = []  # where the weights lie that these were recorded with
        self._lock = threading.Lock()

    def take(self, cache: KVCache, record: bool, tokens: int = 1) -> Replay | GraphReplay | None:
        """A step bound to this cache, recorded now if there is none and `record` says so; None where there can't be.

        tokens: of each row, for which the cache has room
        """
        return self._take(GraphReplay if cache.lengths.is_cuda else Replay, cache, record, tokens)

    def take_pass(self, cache: KVCache, tokens: int, times: int) -> Pass | None:
        """The same for so many tokens of a prompt: recorded where as many passes are wanted now, or were before, as pay
        for it. On a GPU, which is busy for longer than Python then, there is none."""
        if cache.lengths.is_cuda:
            return None
        with self._lock:
            before = self._passes.get(tokens, 0)
            self._passes[tokens] = before + times
        return self._take(Pass, cache, before > 0 or times >= WORTH_A_PASS, tokens)

    def _take(self, kind: type[R], cache: KVCache, record: bool, tokens: int) -> R | None:
        key = kind.key_of(self.model, cache, tokens) if isinstance(self.model, GPT) else ()
        with self._lock:
            found = next((r for r in self._free if isinstance(r, kind) and r.serves(key, cache)), None)
            if found is None and (not record or key in self._refused or not _replayable(self.model, cache)):
                return None
            held = weights(self.model)
            if (lie := places(held)) != self._places:  # what was recorded works on weights that the model had before
                self._places, self._free = lie, []
                self._refused.clear()
                if found is not None and not (record and _replayable(self.model, cache)):
                    return None
                found = None
            elif found is not None:
                self._free.remove(found)
        try:
            found = found or kind(self.model, cache, tokens)
        except NotReplayable as reason:
            log.debug("a pass is not replayed: %s", reason)
            self._refused.add(key)
            return None
        found.bind(cache)
        found.weights, found.places = held, lie
        return found

    def give(self, recording: Recording) -> None:
        """Takes one back, for the next call."""
        recording.unbind()
        with self._lock:
            if recording.places != self._places:
                return
            if isinstance(recording, Pass):  # that for the largest caches serves all
                same = [r for r in self._free if isinstance(r, Pass) and r.key == recording.key]
                recording = max(*same, recording, key=lambda r: r.capacity) if same else recording
                self._free = [r for r in self._free if r not in same]
            alike = [r for r in self._free if type(r) is type(recording) and r.tokens == recording.tokens]
            self._free = [r for r in self._free if r not in alike[: 1 - KEPT]] + [recording]


def _replayable(model: GPT, cache: KVCache) -> bool:
    if not isinstance(model, GPT) or model.training or not recordable(model.backend, model.device):
        return False
    scaling = model.config.rope_scaling or {}
    long = scaling.get("rope_type") == "longrope"  # its tables change where the text becomes long
    return not long or cache.capacity <= scaling.get("original_max_position_embeddings", model.config.context)


def recordable(backend: str | None, device: torch.device) -> bool:
    """Whether ops on this device's tensors, asked of this backend, can be replayed. On the CPU, the CPU's kernels alone
    write their launches down: those of an interpreted backend would be missing from a plan. On a GPU, a graph holds
    whatever doesn't wait; the reference does."""
    asked = backend or os.environ.get("GPTFAST_BACKEND")
    if device.type == "cuda":
        return asked != "reference" and reason_missing("triton") is None
    return device.type == "cpu" and asked in (None, "", "cpu") and reason_missing("cpu") is None


def _layout(cache: KVCache) -> dict[str, Any]:
    """The fields of attention's launches that say how a cache of this capacity lies in memory."""
    named = {"k": cache.k[0], "v": cache.v[0]}
    if cache.k_scale is not None and cache.v_scale is not None:
        named |= {"k_scale": cache.k_scale[0], "v_scale": cache.v_scale[0]}
    return {"Sk": cache.capacity} | {f"{name}_strides": t.stride()[:3] for name, t in named.items()}
