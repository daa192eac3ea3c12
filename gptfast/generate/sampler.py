"""Which token comes next: the rows' own parameters, seeds and history, handed to gptfast.ops.sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gptfast import ops
from gptfast.generate.recording import NotReplayable
from gptfast.generate.replay import Recorded, recordable

Processor = Callable[[Tensor, Tensor], Tensor]

# What each parameter of sampling is when it does nothing (temperature: when it is plain).
NEUTRAL: dict[str, float] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Sampler:
    """Chooses one token for each row.

    parameters: each of NEUTRAL's names with a number for all rows or a list of one number a row.
    logit_bias: (V,) fp32 added to every row's logits, or None. forbidden_first: ids that may not come among the first
    `min_new` tokens. history: the prompts' tokens, needed by penalties and processors only. longest: tokens that the
    longest row can reach.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        parameters: dict[str, Any],
        prompts: Sequence[list[int]],
        *,
        longest: int,
        vocabulary: int,
        device: torch.device,
        logit_bias: Tensor | None = None,
        forbidden_first: Sequence[int] = (),
        min_new: int = 0,
        processors: Sequence[Processor] = (),
        return_logprobs: bool | Literal["raw", "processed"] = False,
        backend: str | None = None,
    ) -> None:
        self.seeds = torch.tensor(list(seeds), dtype=torch.int64, device=device)
        self.steps = torch.zeros_like(self.seeds)
        # Whether a step is one call of ops.sample and nothing else, which can be recorded.
        self.steady = not processors and recordable(backend, device)
        self._place: tuple[Any, ...] | None = None  # of the last logits
        self._recorded: Recorded | None = None
        self.arguments = {name: _by_row(name, value, device) for name, value in parameters.items()}
        self.arguments = {k: v for k, v in self.arguments.items() if isinstance(v, Tensor) or v != NEUTRAL[k]}
        self.logit_bias, self.processors, self.backend = logit_bias, tuple(processors), backend
        self.return_logprobs: bool | Literal["raw", "processed"] = return_logprobs
        self.min_new = min_new
        self.mask: Tensor | None = None
        if min_new and forbidden_first:
            self.mask = torch.ones(vocabulary, dtype=torch.bool, device=device)
            self.mask[list(forbidden_first)] = False
        self.history: Tensor | None = None
        self.penalised = any(name in self.arguments for name in PENALTIES)
        if self.penalised or self.processors:
            lengths = [len(p) for p in prompts]
            self.history = torch.full((len(prompts), longest), -1, dtype=torch.int64, device=device)
            for row, prompt in zip(self.history, prompts):
                row[: len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
            self.prompt_lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
            self.longest_prompt, self.row_numbers = max(lengths), torch.arange(len(prompts), device=device)

    def draw(self, logits: Tensor, masked: bool = False) -> tuple[Tensor, Tensor | None]:
        """ops.sample with these rows' settings, for the steps that `steps` holds."""
        result = ops.sample(
            logits,
            **self.arguments,
            **({"history": self.history, "prompt_lengths": self.prompt_lengths} if self.penalised else {}),
            logit_bias=self.logit_bias,
            mask=self.mask if masked else None,
            seed=self.seeds,
            step=self.steps,
            return_logprobs=self.return_logprobs,
            backend=self.backend,
        )
        return result if self.return_logprobs else (result, None)

    def _sample(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """ops.sample with these rows' settings; recorded where the logits lie where they lay the last time."""
        masked = step < self.min_new
        place = logits.data_ptr(), len(logits), masked
        self.steps.fill_(step)
        if self._recorded is not None and self._place == place:
            return self._recorded.run()

        again, self._place, self._recorded = self._place == place, place, None
        if again and self.steady and logits.is_cpu:
            try:
                self._recorded = Recorded(lambda: self.draw(logits, masked))
                return self._recorded.result
            except NotReplayable:
                self.steady = False
        return self.draw(logits, masked)

    def write(self, history: Tensor, ids: Tensor, steps: Tensor | int) -> None:
        """Puts the tokens of these steps, one number or (B,), into a history of these rows."""
        # A finished row beside running ones may be past the end; what it writes there is never read.
        at = (self.prompt_lengths + steps).clamp(max=history.shape[1] - 1)
        history[self.row_numbers, at] = ids

    def spread(self, steps: Tensor, history: Tensor | None) -> Sampler:
        """The only row's settings for several of its tokens at once, each a row of `draw`: those of these numbers.

        history: (tokens, longest), where penalties need it
        """
        wide, tokens = copy.copy(self), len(steps)
        wide.seeds, wide.steps = self.seeds.repeat(tokens), steps
        if self.logit_bias is not None:
            wide.logit_bias = self.logit_bias.view(-1)
        if history is not None:
            wide.history, wide.prompt_lengths = history, self.prompt_lengths.repeat(tokens)
        return wide

    def select(self, keep: list[int]) -> None:
        """Keeps these rows only."""
        index = torch.tensor(keep, device=self.seeds.device)
        self._place = self._recorded = None
        self.seeds, self.steps = self.seeds[index], self.steps[index]
        self.arguments = {k: v[index] if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        if self.history is not None:
            self.history, self.prompt_lengths = self.history[index], self.prompt_lengths[index]
            self.row_numbers = self.row_numbers[: len(keep)]

    def __call__(self, logits: Tensor, step: int) -> tuple[list[int], list[float] | None]:
        """The tokens number `step` after the prompts, from fp32 logits (B, V), and their log-probs where asked for.

        A row without a choice (NaN, or everything forbidden) gives -1.
        """
        raw = logits
        if self.processors:
            assert self.history is not None
            history = self.history[:, : self.longest_prompt + step]
            logits = raw.clone()  # a processor may write in place
            for processor in self.processors:
                logits = processor(history, logits)
                if not isinstance(logits, Tensor) or logits.shape != raw.shape:
                    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                    raise ValueError(f"a processor must return logits {tuple(raw.shape)}, got {got}")
        ids, logprobs = self._sample(logits, step)
        if self.processors and self.return_logprobs in (True, "raw"):
            logprobs = raw.log_softmax(-1).gather(1, ids.clamp(min=0)[:, None])[:, 0]
        if self.history is not None:
            self.write(self.history, ids, step)
        return ids.tolist(), None if logprobs is None else logprobs.tolist()


def _by_row(name: str, value: Any, device: torch.device) -> float | Tensor:
    if not isinstance(value, list):
        return value
    if all(v == value[0] for v in value):
        return value[0]
    return torch.tensor(value, dtype=torch.int64 if name == "top_k" else torch.float32, device=device)
