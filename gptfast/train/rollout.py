"""Rollouts: sampled answers of the very model that is in training, by the generation loop.

On the CPU the matrices are packed for the kernels first, into the same memory each time, so that a decode step that was
recorded once works on the new weights; everything else of the model is shared. Measured in LOG.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.formats.tokenizer import Tokenizer
from gptfast.generate import LanguageModel
from gptfast.kernels import reason_missing
from gptfast.layers import Embedding, Linear, Weight, set_weight
from gptfast.model import GPT
from gptfast.quantize import PackedWeight
from gptfast.train.lora import LoRALinear
from gptfast.train.packing import seed_of

ROWS_AT_ONCE = 128  # answers written side by side


@dataclass(frozen=True)
class Samples:
    """N answers, those of one prompt beside each other."""

    prompts: list[list[int]]  # token ids, once for each answer
    responses: list[list[int]]  # an end token included
    texts: list[str]  # without the end token; "" where there is no tokenizer
    finishes: list[str]  # "stop", "length" or "context"
    logprobs: list[list[float]]  # of the distribution that was sampled, as the generation loop's kernels have them
    sources: list[int]  # which of the given prompts

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def ended(self) -> list[bool]:
        """Whether each answer ended by itself."""
        return [finish == "stop" for finish in self.finishes]


class Rollout:
    """Samples answers from a model whose weights change between the calls.

    model      float weights; it stays as it is, in its training mode
    tokenizer  for texts and its end tokens, or None: the model's own end tokens alone
    packed     whether the matrices are packed first, adapters merged into them: None = where the CPU's kernels run;
               else the live weights are read
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer | None = None, *, packed: bool | None = None) -> None:
        self.model, self.tokenizer, self._wanted = model, tokenizer, packed
        self._lm: LanguageModel | None = None
        self._places: list[int] = []
        self._settings: tuple[Any, ...] = ()

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        n: int = 1,
        seed: int = 0,
        step: int = 0,
        first: int = 0,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
    ) -> Samples:
        """n answers to each prompt (token ids), sampled from the whole distribution at this temperature.

        There is no top-k and no top-p: the training forward would have to know which tokens they left.

        Answer number i, counted from `first`, is drawn with a seed made of (seed, step, i): it is the same whatever
        runs beside it.
        Raises ValueError for prompts that don't fit the model.
        """
        if n < 1 or not prompts:
            raise ValueError(f"Rollout: expected prompts and n >= 1, got {len(prompts)} prompts and n {n}")
        rows = [list(prompt) for prompt in prompts for _ in range(n)]
        # Prompts of about one length are computed together.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i], i))
        settings: dict[str, Any] = dict(
            max_new_tokens=max_new_tokens, temperature=temperature, return_logprobs="processed"
        )
        found: dict[int, Any] = {}
        with self._ready() as lm:
            for start in range(0, len(order), ROWS_AT_ONCE):
                part = order[start : start + ROWS_AT_ONCE]
                seeds = [seed_of("rollout", seed, step, first + i) for i in part]
                written = lm.generate([rows[i] for i in part], seed=seeds, **settings)
                found.update(zip(part, written))
        made = [found[i] for i in range(len(rows))]
        if any(g.finish_reason == "interrupted" for g in made):
            raise KeyboardInterrupt  # the loop ends what it does in good order; what called this wants to stop too
        return Samples(
            rows,
            [g.token_ids for g in made],
            [g.text for g in made],
            [g.finish_reason for g in made],
            [g.logprobs for g in made],
            [i // n for i in range(len(rows))],
        )

    @contextmanager
    def _ready(self) -> Iterator[LanguageModel]:
        """The language model with today's weights."""
        training = self.model.training
        try:
            self.model.eval()
            with torch.no_grad():
                yield self._refreshed()
        finally:
            self.model.train(training)

    def _refreshed(self) -> LanguageModel:
        """What was recorded holds pointers: where a weight has moved, everything is made anew."""
        packed = self._packs()
        places = [p.data_ptr() for p in self.model.parameters()]
        settings = (packed, self.model.backend, self.model.activations)
        if self._lm is None or places != self._places or settings != self._settings:
            model = inference_copy(self.model) if packed else self.model
            self._lm, self._places, self._settings = LanguageModel(model, self.tokenizer), places, settings
        elif packed:
            repack(self.model, self._lm.model)
        return self._lm

    def _packs(self) -> bool:
        if self._wanted is not None:
            return self._wanted
        model = self.model
        kernels = model.device.type == "cpu" and model.backend in (None, "cpu") and reason_missing("cpu") is None
        return kernels and all(_plain(module) for module in model.modules())


def _plain(module: nn.Module) -> bool:
    """Whether inference_copy knows all of a module's parameters."""
    return isinstance(module, LoRALinear) or type(module).__module__ in (
        "gptfast.layers", "gptfast.model.gpt", "torch.nn.modules.container"
    )  # fmt: skip


def inference_copy(model: GPT) -> GPT:
    """The same model with its float matrices packed for the CPU's kernels, adapters merged into them, and an embedding
    that is the head too among them; everything else is shared with it, the embedding included. See `repack`."""
    copy = GPT(model.config, device="meta")
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            made = copy.get_submodule(name)
            assert isinstance(made, Linear)
            set_weight(made, _packed(module))
            made.bias = module.bias
        else:
            for end, parameter in module.named_parameters(recurse=False):
                copy.get_submodule(name).register_parameter(end, parameter)
            if isinstance(module, Embedding) and not isinstance(module.weight, Tensor):
                set_weight(copy.get_submodule(name), module.weight)
    if model.head is None and isinstance(model.embedding.weight, Tensor):
        copy.head = Linear(model.config.n_embd, model.config.vocab_size, False, device="meta")
        set_weight(copy.head, PackedWeight.pack(model.embedding.weight.detach()))
    copy.backend, copy.activations = model.backend, model.activations
    return copy.eval()


def repack(model: GPT, copy: GPT) -> None:
    """Gives an inference_copy the model's present weights, where the old ones are."""
    for name, module in copy.named_modules():
        if isinstance(module, Linear) and isinstance(module.weight, PackedWeight):
            tied = name == "head" and model.head is None
            source = PackedWeight.pack(_matrix(model.embedding)) if tied else _packed(model.get_submodule(name))
            assert isinstance(source, PackedWeight)
            if source is not module.weight:
                module.weight.packed.copy_(source.packed)


def _packed(module: nn.Module) -> Weight:
    """A layer's matrix to generate with: packed, but for blocks that no adapter belongs to."""
    assert isinstance(module, Linear)
    weight = module.merged() if isinstance(module, LoRALinear) else module.weight
    return PackedWeight.pack(weight.detach()) if isinstance(weight, Tensor) else weight


def _matrix(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
