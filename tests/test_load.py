"""What loading does beside making a model."""

from __future__ import annotations

import gc
import importlib
from typing import Any

import pytest

import gptfast
from gptfast.model import GPT, GPTConfig


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_garbage_collection_rests_and_is_as_before(on: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("gptfast.generate.load")
    seen: list[bool] = []
    real = module._open

    def watched(*args: Any) -> Any:
        seen.append(gc.isenabled())
        return real(*args)

    monkeypatch.setattr(module, "_open", watched)
    config = GPTConfig("gpt2", vocab_size=32, n_layer=1, n_head=1, n_embd=32, context=8)
    source: Any = "no such model" if fails else GPT(config)
    try:
        gc.enable() if on else gc.disable()
        if fails:
            with pytest.raises(FileNotFoundError, match="no model at"):
                gptfast.load(source)
        else:
            gptfast.load(source)
        assert seen == [False] and gc.isenabled() == on
    finally:
        gc.enable()
