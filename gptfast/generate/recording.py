"""What every recorded pass of a model has, wherever it is replayed."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from gptfast.generate.cache import KVCache
from gptfast.model import GPT
from gptfast.quantize import PackedWeight, QuantizedWeight


class NotReplayable(RuntimeError):
    """A step computes something outside of gptfast's own kernels, or waits for what they computed."""


class Recording:
    """A recorded pass of one model for caches of one batch and capacity, and so many tokens of each row. It works on
    one cache at a time, which the caller advances."""

    def __init__(self, model: GPT, cache: KVCache, tokens: int) -> None:
        self.key = self.key_of(model, cache, tokens)
        self.tokens = tokens
        self.seconds: float | None = None  # what a step that draws takes, where that is known
        self.weights: list[Tensor] = []  # those it works on while it is in use: they keep their memory
        self.places: list[Any] = []  # where they lie
        self._cache: KVCache | None = None
        self._keys: Tensor | None = None  # its first layer's

    @classmethod
    def key_of(cls, model: GPT, cache: KVCache, tokens: int) -> tuple[Any, ...]:
        """What a recorded pass is good for."""
        settings = model.activations, model.backend, os.environ.get("GPTFAST_BACKEND")
        return cls, cache.batch, cache.capacity, tokens, cache.dtype, *settings

    def serves(self, key: tuple[Any, ...], cache: KVCache) -> bool:
        """Whether it was recorded for such a key and can work on this cache."""
        return self.key == key

    def bind(self, cache: KVCache) -> None:
        """Makes what follows work on this cache."""
        self._cache, self._keys = cache, cache.k[0]

    def unbind(self) -> None:
        """Lets go of the cache and of the weights."""
        self._cache = self._keys = None
        self.weights = []

    def bound(self, cache: KVCache) -> bool:
        """Whether the next pass would work on this cache as it is now."""
        return self._cache is cache and self._keys is cache.k[0]  # a cache that has grown has others


def pointers(cache: KVCache) -> list[int]:
    """Where a cache's tensors lie in memory."""
    return [t.data_ptr() for t in (*cache.tensors(), cache.lengths)]


def weights(model: nn.Module) -> list[Tensor]:
    """A model's weights as they are now, quantised and packed ones too, in memory that these tensors keep."""
    found: list[Tensor] = []
    pending: list[nn.Module | None] = [model]
    while pending:  # modules() takes five times as long
        if (module := pending.pop()) is None:
            continue
        pending += module._modules.values()
        found += [p.detach() for p in module._parameters.values() if p is not None]
        weight = module.__dict__.get("weight")
        if isinstance(weight, QuantizedWeight | PackedWeight):
            found.append(weight.packed)
    return found


def places(tensors: list[Tensor]) -> list[Any]:
    """Where tensors lie in memory, and as what."""
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
