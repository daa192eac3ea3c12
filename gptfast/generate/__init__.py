"""Generation: a prompt goes in by chunks, then tokens come out one step at a time for all rows at once."""

from __future__ import annotations

from gptfast.generate.cache import KVCache
from gptfast.generate.language_model import LanguageModel, Stream
from gptfast.generate.load import load
from gptfast.generate.prompt_cache import PromptCache
from gptfast.generate.results import Generation, Score, Stats
from gptfast.generate.speculative import Draft, Drafter, DraftModel, PromptLookup

__all__ = [
    "Draft",
    "DraftModel",
    "Drafter",
    "Generation",
    "KVCache",
    "LanguageModel",
    "PromptCache",
    "PromptLookup",
    "Score",
    "Stats",
    "Stream",
    "load",
]
