"""Prompts of one call that begin alike: what they share is computed once, and nobody can tell from the results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptfast
from gptfast.generate import KVCache, LanguageModel, cache, loop
from gptfast.model import GPT, GPTConfig

SYSTEM = list(range(3, 48))
PROMPTS = [[*SYSTEM, *end] for end in ([7], [7, 8, 9], [], [1] * 20, [250, 2])]
SETTINGS: dict[str, Any] = dict(max_new_tokens=8, temperature=0.9, top_p=0.95, seed=3, return_logprobs=True)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=257, context=96)
    kind: dict[str, Any] = dict(norm="rms_norm", positions="rope", activation="swiglu")
    model = GPT(GPTConfig("llama", **shape, **kind, qkv_bias=False, out_bias=False, mlp_bias=False))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    return LanguageModel(model.eval())


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each row that the model is given to read."""
    rows: list[int] = []
    feed = loop.Loop._feed

    def watched(self: loop.Loop, kv: KVCache, todo: list[list[int]], report: Any) -> Any:
        rows.extend(map(len, todo))
        return feed(self, kv, todo, report)

    monkeypatch.setattr(loop.Loop, "_feed", watched)
    return rows


def texts(lm: LanguageModel, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], Any]]:
    return [(g.token_ids, g.logprobs) for g in lm.generate(prompts, **(SETTINGS | options))]


def unshared(lm: LanguageModel, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "WORTH_SHARING", 1 << 60)
        return texts(lm, prompts, **options)


@pytest.mark.parametrize("chunk", [512, 7])
@pytest.mark.parametrize("n", [1, 2])
def test_a_shared_prefix_is_read_once_and_changes_nothing(
    lm: LanguageModel, fed: list[int], chunk: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHUNK", chunk)
    expected = unshared(lm, PROMPTS, n=n)
    assert sum(fed) == sum(map(len, PROMPTS))
    fed.clear()
    assert texts(lm, PROMPTS, n=n) == expected, "bit for bit"
    shared = len(SYSTEM) - 1  # the shortest prompt keeps a token for itself
    assert fed == [shared, *(len(p) - shared for p in PROMPTS)]


def test_progress_and_stats_count_what_is_read(lm: LanguageModel) -> None:
    seen: list[tuple[int, int]] = []
    found = lm.generate(PROMPTS, max_new_tokens=1, progress=lambda done, total: seen.append((done, total)))
    total = sum(map(len, PROMPTS)) - 4 * (len(SYSTEM) - 1)
    assert found[0].stats.prefill_tokens == total
    assert seen[0] == (len(SYSTEM) - 1, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_little_is_not_shared(lm: LanguageModel, fed: list[int]) -> None:
    least = loop.WORTH_SHARING
    for common, rows, read in (
        (least - 1, 2, [least] * 2),
        (least // 2 - 1, 3, [least // 2] * 3),
        (least, 2, [least, 1, 1]),
        (least // 2, 3, [least // 2, 1, 1, 1]),
    ):
        fed.clear()
        prompts = [[5] * common + [10 + i] for i in range(rows)]
        found = texts(lm, prompts)
        assert fed == read
        assert found == unshared(lm, prompts)


def test_kept_caches_share_what_a_call_adds(lm: LanguageModel, fed: list[int]) -> None:
    def two_calls() -> list[Any]:
        kept = lm.new_cache(batch=3)
        first = [[*SYSTEM, i] for i in range(3)]
        found = [(g.token_ids, g.logprobs) for g in lm.generate(first, cache=kept, **SETTINGS)]
        kept.rewind([10] * 3)
        again = [[*SYSTEM[10:], i, i] for i in range(3)]
        return found + [(g.token_ids, g.logprobs) for g in lm.generate(again, cache=kept, **SETTINGS)]

    found = two_calls()
    assert fed == [45, 1, 1, 1, 35, 2, 2, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "WORTH_SHARING", 1 << 60)
        assert two_calls() == found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=2, max_size=5), st.integers(1, 9))
def test_any_prompts(lm: LanguageModel, prompts: list[list[int]], worth: int) -> None:
    options: dict[str, Any] = dict(max_new_tokens=2)
    expected = unshared(lm, prompts, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "WORTH_SHARING", worth)
        assert texts(lm, prompts, **options) == expected


@pytest.mark.parametrize("alone", [1, 100, 1 << 15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_sharing_copies_the_places_asked_for(
    lm: LanguageModel, dtype: torch.dtype, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "ALONE", alone)
    kv = KVCache(lm.model.config, 3, 40, dtype=dtype)
    before = [t.copy_(100 * torch.randn(t.shape)).clone() for t in kv.tensors()]
    assert len(before) == (4 if dtype == torch.float32 else 8)
    kv.share(5, 32)
    assert kv.lengths.tolist() == [32] * 3
    for t, old in zip(kv.tensors(), before):
        assert torch.equal(t[:, 5:32], old[:1, 5:32].expand(3, *old[0, 5:32].shape)) and torch.equal(t[0], old[0])
        assert torch.equal(t[:, :5], old[:, :5]) and torch.equal(t[:, 32:], old[:, 32:])


@pytest.mark.model
def test_the_real_model_shares_its_system_prompt(fed: list[int]) -> None:
    lm = gptfast.load("smollm2")
    system, questions = (
        "You answer in one short sentence, always in plain words. " * 6,
        ("Who?", "And why?", "Where to?"),
    )
    assert lm.tokenizer is not None
    messages = [[{"role": "system", "content": system}, {"role": "user", "content": q}] for q in questions]
    prompts = [lm.tokenizer.apply_chat_template(m) for m in messages]
    expected = unshared(lm, prompts)
    fed.clear()
    assert texts(lm, prompts) == expected and fed[0] > 70 and max(fed[1:]) < 20
