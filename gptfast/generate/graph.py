"""Replay on a GPU: a decode step captured as a CUDA graph, which starts all of its kernels in one call.

Python takes tens of microseconds for each of the hundreds of launches of a step, a GPU a few. A graph works on the
memory it was captured with: a step's belongs to one cache, that of drawing to one sampler. A next call's cache mostly
lies where the last one's lay, and then its graph still serves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptfast.generate.cache import KVCache
from gptfast.generate.recording import NotReplayable, Recording, pointers
from gptfast.model import GPT

if TYPE_CHECKING:
    from gptfast.generate.sampler import Sampler


class Graph:
    """What a function starts on a GPU, captured: run() starts it again. `result` is what the function gave, whose
    memory each run overwrites.

    prepare: does once, uncaptured, what the function does, so that all kernels are compiled and loaded.

    Raises NotReplayable where the function does what can't be captured: waits for the GPU, for example.
    """

    def __init__(self, function: Callable[[], Any], prepare: Callable[[], Any], device: torch.device) -> None:
        current, aside = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            prepare()
            self._graph = torch.cuda.CUDAGraph()
            try:
                self._graph.capture_begin(capture_error_mode="thread_local")  # other threads may do what they like
                try:
                    self.result = function()
                except BaseException:
                    with suppress(RuntimeError):  # it only says again that the capture failed
                        self._graph.capture_end()
                    raise
                self._graph.capture_end()
            except RuntimeError as error:
                raise NotReplayable(f"a step can't be captured as a CUDA graph: {error}") from error
        current.wait_stream(aside)

    def run(self) -> None:
        """Starts the captured work on its device's current stream."""
        self._graph.replay()


class GraphReplay(Recording):
    """A decode step of one model as a CUDA graph, with the methods of gptfast.generate.replay.Replay.

    Raises NotReplayable where a step can't be captured.
    """

    def __init__(self, model: GPT, cache: KVCache, tokens: int = 1) -> None:
        super().__init__(model, cache, tokens)
        self.device = model.device
        self.ids = torch.zeros(cache.batch, tokens, dtype=torch.int64, device=self.device)
        self._steps = torch.arange(tokens, device=self.device)
        self.positions = cache.lengths[:, None] + self._steps
        self.running = torch.ones(cache.batch, dtype=torch.int32, device=self.device)
        self._running: list[bool] | None = None  # what it holds
        tables = model.rope_tables(cache.capacity, self.device) if model.config.positions == "rope" else None

        def logits() -> Tensor:
            return model.head_of(model.joined(*model.branches(self.ids, cache, self.positions))).flatten(0, 1)

        # A step like any other: what it writes behind the lengths is overwritten by the first that is replayed.
        self._step = Graph(logits, logits, self.device)
        self.logits: Tensor = self._step.result
        self._places, self._keep = pointers(cache), (model, tables)
        self._drawing: Graph | None = None
        self._drawn: tuple[Tensor, Tensor | None] | None = None  # tokens and log-probs, where the CPU reads them

    def serves(self, key: tuple[Any, ...], cache: KVCache) -> bool:
        return super().serves(key, cache) and self._places == pointers(cache)

    def unbind(self) -> None:
        self._drawing = self._drawn = None  # before the memory that it works on
        super().unbind()

    def step(self, tokens: Tensor) -> Tensor:
        """The logits (B T, V) fp32 after tokens (B, T) int64, each row's last ones; the next step overwrites them. The
        caller advances the cache."""
        assert self._cache is not None
        self.ids.copy_(tokens.view(self.ids.shape))
        torch.add(self._cache.lengths[:, None], self._steps, out=self.positions)
        self._step.run()
        return self.logits.float()

    def draw(
        self, sampler: Sampler, tokens: list[int], running: list[bool], step: int
    ) -> tuple[list[int], list[float] | None]:
        """A step and the tokens drawn from its logits, which advances the cache's running rows as well.

        tokens, running: of each row; step: the sampler's. Between one draw and the next only `running` is read, so
        nothing else may have touched the cache or the sampler: after anything that did, bind anew.

        Raises NotReplayable, with nothing done, where drawing can't be captured.
        """
        if self._drawing is None:
            self._begin(sampler, tokens, step)
        assert self._drawing is not None and self._drawn is not None
        if running != self._running:
            self._running = list(running)
            self.running.copy_(torch.tensor(running))
        self._step.run()
        self._drawing.run()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        ids, logprobs = self._drawn
        return ids.tolist(), None if logprobs is None else logprobs.tolist()

    @torch.no_grad()
    def _begin(self, sampler: Sampler, tokens: list[int], step: int) -> None:
        assert self._cache is not None
        rows, on_gpu = len(tokens), self.device.type == "cuda"
        state = [self.ids, self.positions, self._cache.lengths, sampler.steps]
        state += [] if sampler.history is None else [sampler.history]
        read = torch.empty(rows, dtype=torch.int64, pin_memory=on_gpu)
        read_logprobs = torch.empty(rows, pin_memory=on_gpu) if sampler.return_logprobs else None

        def draw(
            ids: Tensor, positions: Tensor, lengths: Tensor, steps: Tensor, history: Tensor | None = None
        ) -> tuple[Tensor, Tensor | None]:
            """Draws, and makes ready for the next step."""
            drawn, logprobs = sampler.draw(self.logits)
            if history is not None:
                sampler.write(history, drawn, steps)
            ids[:, 0] = drawn.clamp(min=0)  # a row without a choice ends the call, or has ended
            lengths += self.running
            positions[:, 0] = lengths
            steps += 1
            read.copy_(drawn, non_blocking=True)
            if logprobs is not None and read_logprobs is not None:
                read_logprobs.copy_(logprobs, non_blocking=True)
            return drawn, logprobs

        self._drawing = Graph(lambda: draw(*state), lambda: draw(*(t.clone() for t in state)), self.device)
        self._drawn = read, read_logprobs
        self.ids[:, 0], self.positions[:, 0] = torch.tensor(tokens, device=self.device), self._cache.lengths
        sampler.steps.fill_(step)
        self._running = None
