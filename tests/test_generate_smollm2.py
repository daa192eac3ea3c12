"""The real model, from its file to its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptfast
from gptfast.generate import LanguageModel

GOLDEN = Path(__file__).parent / "data" / "smollm2_golden.npz"


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    try:
        return gptfast.load("smollm2", activations="exact")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.model
def test_smollm2_writes_what_transformers_writes(smollm2: LanguageModel) -> None:
    golden = np.load(GOLDEN)
    found = smollm2.generate(
        [golden["chat_ids"].tolist(), golden["raw_ids"].tolist()], max_new_tokens=64, temperature=0, ignore_eos=True
    )
    assert [g.token_ids for g in found] == [golden["chat_greedy"].tolist(), golden["raw_greedy"].tolist()]


@pytest.mark.model
def test_smollm2_chats(smollm2: LanguageModel) -> None:
    turns = [{"role": "user", "content": "What is the capital of France? Then name three things to see there."}]
    golden = np.load(GOLDEN)
    options: dict[str, Any] = dict(temperature=0, max_new_tokens=12)
    cache = smollm2.new_cache()
    stream = smollm2.stream_chat(turns, cache=cache, **options)
    text = "".join(stream)
    assert text == smollm2.decode(golden["chat_greedy"][:12].tolist())
    assert stream.generation.prompt_tokens == len(golden["chat_ids"])
    turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
    again = smollm2.chat(turns, cache=cache, **options)
    assert again.token_ids == smollm2.chat(turns, **options).token_ids
    assert again.stats.prefill_tokens < 25
