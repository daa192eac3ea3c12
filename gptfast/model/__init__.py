"""GPT models: the architecture as data (GPTConfig), the model (GPT), and known sizes by name."""

from __future__ import annotations

from gptfast.model.config import GPTConfig
from gptfast.model.gpt import GPT
from gptfast.model.presets import PRESETS, preset

__all__ = ["GPT", "PRESETS", "GPTConfig", "preset"]
