"""Generation: a prompt goes in by chunks, then tokens come out one step at a time for all rows at once."""

from __future__ import annotations

from gptfast.generate.cache import KVCache
from gptfast.generate.language_model import LanguageModel, Stream
from gptfast.generate.load import load
from gptfast.generate.prompt_cache import PromptCache
from gptfast.generate.results import Generation, Score, Stats

__all__ = ["Generation", "KVCache", "LanguageModel", "PromptCache", "Score", "Stats", "Stream", "load"]
