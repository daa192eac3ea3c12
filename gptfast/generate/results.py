"""What generation and scoring give back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stats:
    """How long one call took. All rows of a call share one Stats; the first new token counts as prefill."""

    prefill_s: float = 0.0  # from the first prompt token to the first new token of every row, seconds
    decode_s: float = 0.0  # from there to the end, seconds
    prefill_tokens: int = 0  # prompt tokens computed: equal prompts once, those in a cache not at all
    decode_tokens: int = 0  # new tokens of all rows without each row's first
    cache_bytes: int = 0  # of the KV cache at the end
    drafted: int = 0  # guesses that speculation had the model look at
    accepted: int = 0  # those that were right
    peak_memory_bytes: int = 0  # the process's peak so far: resident memory on CPU, allocated device memory on CUDA

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """All rows together; 0 where nothing was decoded after the first token."""
        return self.decode_tokens / self.decode_s if self.decode_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The fields and the two rates, for JSON."""
        rates = {"prefill_tokens_per_s": self.prefill_tokens_per_s, "decode_tokens_per_s": self.decode_tokens_per_s}
        return asdict(self) | rates


@dataclass(frozen=True)
class Generation:
    """One continuation of one prompt."""

    text: str  # without the end token or the stop string
    token_ids: list[int]  # the new ones, an end token included
    finish_reason: str  # "stop" (an end token, a stop id or a stop string), "length", "context" or "interrupted"
    prompt_tokens: int  # the whole context that was continued: what a cache held and what the template added count too
    seed: int  # the same prompt with this seed and the same settings gives this text again
    stats: Stats
    logprobs: list[float] | None = None  # natural log, one for each of token_ids, where they were asked for

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, with those of `stats` beside them."""
        fields = {k: v for k, v in vars(self).items() if k != "stats" and not (k == "logprobs" and v is None)}
        return fields | self.stats.to_dict()


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text. Logs are natural."""

    token_ids: list[int]  # with a leading BOS where the tokenizer adds one
    token_logprobs: list[float] = field(repr=False)  # of token_ids[1:]: the first token has nothing before it

    @property
    def tokens(self) -> int:
        """How many tokens were scored."""
        return len(self.token_logprobs)

    @property
    def nats(self) -> float:
        """-log p of all scored tokens together."""
        return -math.fsum(self.token_logprobs)

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); NaN where nothing was scored."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan
