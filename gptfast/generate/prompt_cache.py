"""What calls that continue one another have in common: the tokens so far, with their keys and values."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from gptfast.generate.cache import KVCache


class PromptCache:
    """Made by `LanguageModel.new_cache`, given to calls as `cache=`; one call at a time.

    tokens  for each row every token so far, prompts and continuations alike; the keys and values of the last ones may
            still be missing and are computed by the next call
    kv      the keys and values
    """

    def __init__(self, kv: KVCache) -> None:
        self.kv = kv
        self.tokens: list[list[int]] = [[] for _ in range(kv.lengths.numel())]
        self._busy = threading.Lock()

    def __len__(self) -> int:
        """The tokens of the longest row."""
        return max(map(len, self.tokens))

    @property
    def batch(self) -> int:
        return len(self.tokens)

    def reset(self) -> None:
        """Forgets everything."""
        self.rewind([0] * self.batch)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forgets each row's tokens from this place on."""
        with torch.no_grad():
            self.kv.truncate(torch.tensor(list(lengths), dtype=torch.int32, device=self.kv.lengths.device))
        self.tokens = [t[:n] for t, n in zip(self.tokens, lengths)]

    def match(self, ids: Sequence[int]) -> list[int]:
        """Of the only row, forgets what differs from `ids`; the rest of `ids`, to be given as the next prompt."""
        held, common = self.tokens[0], 0
        for mine, theirs in zip(held, ids):
            if mine != theirs:
                break
            common += 1
        self.rewind([common])
        return list(ids[common:])

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Raises RuntimeError where another call uses this cache at the moment."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("this cache is in use by another call: give each thread a cache of its own")
        try:
            yield
        finally:
            self._busy.release()
