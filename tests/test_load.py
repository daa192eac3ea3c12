"""What loading does beside making a model."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gptfast
from gptfast.model import GPT, GPTConfig


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_garbage_collection_rests_and_is_as_before(on: bool, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("gptfast.generate.load")
    seen: list[bool] = []
    real = module.open_model

    def watched(*args: Any) -> Any:
        seen.append(gc.isenabled())
        return real(*args)

    monkeypatch.setattr(module, "open_model", watched)
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


FIRST_TOKEN = """
import os, torch, gptfast
before = len(os.listdir("/proc/self/task"))
lm = gptfast.load("smollm2", kv_cache="fp32")
lm.generate(list(range(1000, 1016)), max_new_tokens=1, temperature=0)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux lists them")
def test_the_first_token_starts_no_threads_of_pytorchs_own() -> None:
    """They and ours would wait for one another: 0.8 s a call where a third process is busy."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", FIRST_TOKEN], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) <= 1, "expected one thread beside the caller: its team is two"
