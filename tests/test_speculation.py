"""Speculation: whatever is guessed, the text is the one that plain decoding writes, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from gptfast.generate import DraftModel, Generation, LanguageModel, PromptLookup, loop
from gptfast.generate.pace import Pace
from gptfast.generate.sampler import Sampler
from gptfast.generate.steps import SIZES, Steps
from gptfast.model import GPT, GPTConfig
from gptfast.quantize import QuantizedWeight

V = 97
SHAPE: dict[str, Any] = dict(vocab_size=V, n_layer=2, n_head=4, n_embd=64, context=160)
LLAMA: dict[str, Any] = dict(
    n_kv_head=2, ffn_dim=96, norm="rms_norm", positions="rope", activation="swiglu", qkv_bias=False, out_bias=False,
    mlp_bias=False,
)  # fmt: skip
PROMPT = [5, 6, 7, 8, 9, 5, 6, 7]


def model_of(name: str, kind: str = "q8_0", seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(name, **SHAPE | (LLAMA if name == "llama" else {}) | changes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    if kind.startswith("q"):
        for module in model.modules():
            if hasattr(module, "set_weight") and module is not model.positions:
                module.set_weight(QuantizedWeight.quantize(module.weight.detach(), kind))  # type: ignore[operator]
    return model


class Told:
    """Guesses a given text with some tokens wrong: what a drafter may do at its best and at its worst."""

    def __init__(self, text: Sequence[int], wrong: Sequence[int] = ()) -> None:
        self.text = [(t + 1) % V if i in wrong else t for i, t in enumerate(text)]

    def begin(self, vocabulary: int) -> Told:
        self.heard: list[int] = []
        return self

    def accept(self, tokens: Sequence[int]) -> None:
        self.heard += tokens

    def propose(self, most: int) -> list[int]:
        at = len(self.heard)
        return self.text[at : at + most]

    def close(self) -> None:
        pass


@pytest.fixture(params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(model_of(request.param))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is looked at, whether or not that pays."""
    monkeypatch.setattr(Pace, "wanted", lambda self, most: most)
    monkeypatch.setattr(Pace, "size", lambda self, most: max(s for s in SIZES if s <= most))


def same(one: Generation, other: Generation) -> bool:
    """In all that a caller sees but the times."""
    return {k: v for k, v in vars(one).items() if k != "stats"} == {
        k: v for k, v in vars(other).items() if k != "stats"
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=0.9, return_logprobs=True),
    "nucleus": dict(temperature=0.8, top_p=0.8, top_k=40, return_logprobs="processed"),
    "cold": dict(temperature=0.3, min_p=0.05, return_logprobs=True),
    "typical": dict(temperature=0.5, typical_p=0.7),
    "penalties": dict(
        **dict(temperature=0.4, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
        return_logprobs="processed",
    ),
    "greedy, penalised": dict(temperature=0, frequency_penalty=0.4, return_logprobs=True),
    "bias": dict(temperature=0.5, logit_bias={5: 3.0, 6: 2.0}),
    "bias of a row": dict(temperature=0.5, logit_bias=torch.linspace(-2, 2, V)[None]),
    "no end yet": dict(temperature=0.5, min_new_tokens=13, stop=list(range(0, V, 2)), return_logprobs=True),
    "no end yet, penalised": dict(temperature=0.5, min_new_tokens=7, stop=[3, 4, 5], repetition_penalty=1.1),
    "processor": dict(
        temperature=0.5,
        processors=(lambda history, logits: logits - 2.0 * (history[:, -1:] == torch.arange(V)),),
        return_logprobs=True,
    ),
    "processor, penalised": dict(
        temperature=0, processors=(lambda history, logits: logits + history.shape[1] % 3,), repetition_penalty=1.3
    ),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("drafter", ["prompt-lookup", "all right", "some wrong", "all wrong"])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_text_is_the_same(
    lm: LanguageModel, settings: dict[str, Any], drafter: str, seed: int, always: None
) -> None:
    options: dict[str, Any] = dict(max_new_tokens=60, seed=seed) | settings
    plain = lm.generate(PROMPT, **options)
    text = PROMPT + plain.token_ids
    wrong = {"some wrong": range(0, 200, 7), "all wrong": range(200)}.get(drafter, ())
    how = "prompt-lookup" if drafter == "prompt-lookup" else Told(text, wrong)
    found = lm.generate(PROMPT, speculation=how, **options)
    assert same(found, plain)
    if drafter == "all right" and len(plain.token_ids) > 20 and "min_new_tokens" not in settings:
        assert found.stats.accepted == found.stats.drafted > 40, "16 at once, 15 of them guesses"
    if drafter == "all wrong":
        assert found.stats.accepted == 0 and found.stats.drafted >= len(plain.token_ids) - 2


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "q4_1"])
@pytest.mark.parametrize("threads", [1, 2])
def test_weights_and_threads_do_not_matter(kind: str, threads: int, always: None) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        lm = LanguageModel(model_of("llama", kind).to(torch.bfloat16 if kind == "bfloat16" else torch.float32))
        options: dict[str, Any] = dict(max_new_tokens=100, temperature=0.6, seed=1, return_logprobs=True)
        plain = lm.generate(PROMPT, **options)
        found = lm.generate(PROMPT, speculation=Told(PROMPT + plain.token_ids, range(0, 200, 9)), **options)
        assert same(found, plain)
        assert {r.tokens for r in lm._replays._free} >= {1, 16}, "recorded"
    finally:
        torch.set_num_threads(before)


def test_without_recorded_steps(lm: LanguageModel, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = dict(max_new_tokens=50, temperature=0.6, seed=1, return_logprobs=True, top_k=20)
    plain = lm.generate(PROMPT, **options, frequency_penalty=0.2)
    monkeypatch.setattr("gptfast.generate.speculative.WORTH_RECORDING", 10**9)
    fresh = LanguageModel(lm.model)
    how = Told(PROMPT + plain.token_ids, range(0, 200, 9))
    assert same(fresh.generate(PROMPT, speculation=how, **options, frequency_penalty=0.2), plain)
    assert not fresh._replays._free
    monkeypatch.setenv("GPTFAST_BACKEND", "reference")
    options["temperature"] = 0
    plain = fresh.generate(PROMPT, **options)
    found = fresh.generate(PROMPT, speculation=Told(PROMPT + plain.token_ids, range(0, 200, 9)), **options)
    assert found.token_ids == plain.token_ids and found.stats.accepted > 20


# Ends


@pytest.mark.parametrize("most", [1, 2, 3, 9, 17, 18])
def test_max_new_tokens_in_the_middle_of_a_draft(lm: LanguageModel, most: int, always: None) -> None:
    plain = lm.generate(PROMPT, temperature=0, max_new_tokens=40)
    found = lm.generate(PROMPT, temperature=0, max_new_tokens=most, speculation=Told(PROMPT + plain.token_ids))
    assert found.token_ids == plain.token_ids[:most] and found.finish_reason == "length"


@pytest.mark.parametrize("prompt", [1, 128, 144, 145, 151, 158, 159])
def test_the_end_of_the_context(lm: LanguageModel, prompt: int, always: None) -> None:
    start = [(7 * i) % V for i in range(prompt)]
    plain = lm.generate(start, temperature=0.5, seed=2, max_new_tokens=None, repetition_penalty=1.1)
    how = Told(start + plain.token_ids)
    found = lm.generate(start, temperature=0.5, seed=2, max_new_tokens=None, repetition_penalty=1.1, speculation=how)
    assert same(found, plain) and found.finish_reason == "context"


@pytest.mark.parametrize("at", range(1, 20))
def test_an_end_token_in_the_middle_of_a_draft(lm: LanguageModel, at: int, always: None) -> None:
    plain = lm.generate(PROMPT, temperature=1.5, seed=4, max_new_tokens=40)
    stop = plain.token_ids[at]
    ended = lm.generate(PROMPT, temperature=1.5, seed=4, max_new_tokens=40, stop=stop)
    cache = lm.new_cache()
    told = Told(PROMPT + plain.token_ids)  # goes on behind the end
    found = lm.generate(PROMPT, temperature=1.5, seed=4, max_new_tokens=40, stop=stop, speculation=told, cache=cache)
    assert same(found, ended)
    # What was guessed behind the end is not in the cache.
    assert cache.tokens == [PROMPT + ended.token_ids]
    more = lm.generate([1, 2], temperature=0, max_new_tokens=9, cache=cache, speculation="prompt-lookup")
    assert more.token_ids == lm.generate(PROMPT + ended.token_ids + [1, 2], temperature=0, max_new_tokens=9).token_ids
    assert more.stats.prefill_tokens == 3


class Letters:
    """A tokenizer whose ids are letters."""

    eos_ids: frozenset[int] = frozenset()
    special_ids, _strips_space = eos_ids, False

    def encode(self, text: str, parse_special: bool = False, add_bos: bool | None = None) -> list[int]:
        return [b - 30 for b in text.encode()]

    def token_bytes(self, id: int) -> bytes:
        return bytes([id + 30])


def test_stop_strings_and_streams(always: None) -> None:
    lm = LanguageModel(model_of("llama"), Letters())  # type: ignore[arg-type]
    options: dict[str, Any] = dict(max_new_tokens=50, temperature=0.9, seed=6)
    whole = lm.generate("abcab", **options)
    for begin in range(0, 40, 3):
        options["stop"] = [whole.text[begin : begin + 3], "never"]
        plain = lm.generate("abcab", **options)
        found = lm.generate("abcab", speculation=Told(lm.tokenizer.encode("abcab") + whole.token_ids), **options)  # type: ignore[union-attr]
        assert same(found, plain)
        stream = lm.stream("abcab", speculation=Told(lm.tokenizer.encode("abcab") + whole.token_ids), **options)  # type: ignore[union-attr]
        assert "".join(stream) == plain.text and same(stream.generation, plain)


def test_a_stream_can_be_left_and_its_cache_goes_on(lm: LanguageModel, always: None) -> None:
    lm.tokenizer = Letters()  # type: ignore[assignment]
    cache = lm.new_cache()
    whole = lm.generate("abcab", temperature=0, max_new_tokens=40)
    told = Told(lm.tokenizer.encode("abcab") + whole.token_ids)  # type: ignore[union-attr]
    stream = lm.stream("abcab", temperature=0, max_new_tokens=40, cache=cache, speculation=told)
    pieces = next(stream) + next(stream)
    stream.close()
    assert whole.text.startswith(pieces) and len(pieces) == 17
    rest = lm.generate("", temperature=0, max_new_tokens=40 - len(pieces), cache=cache, speculation="prompt-lookup")
    assert pieces + rest.text == whole.text


@pytest.mark.parametrize("end", range(2, 30))
def test_ctrl_c_in_the_middle_of_a_draft(lm: LanguageModel, end: int, always: None) -> None:
    whole = lm.generate(PROMPT, temperature=0, max_new_tokens=40)

    def press(history: Tensor, logits: Tensor) -> Tensor:
        if history.shape[1] == len(PROMPT) + end:
            raise KeyboardInterrupt
        return logits

    cache = lm.new_cache()
    told = Told(PROMPT + whole.token_ids)
    found = lm.generate(PROMPT, temperature=0, max_new_tokens=40, processors=[press], cache=cache, speculation=told)
    assert (found.token_ids, found.finish_reason) == (whole.token_ids[:end], "interrupted")
    rest = lm.generate([], temperature=0, max_new_tokens=40 - end, cache=cache)
    assert found.token_ids + rest.token_ids == whole.token_ids


def test_nan_in_the_middle_of_a_draft(lm: LanguageModel, always: None) -> None:
    whole = lm.generate(PROMPT, temperature=0, max_new_tokens=40)

    def poison(history: Tensor, logits: Tensor) -> Tensor:
        return logits * float("nan") if history.shape[1] == len(PROMPT) + 5 else logits

    with pytest.raises(RuntimeError, match=r"row 0, step 5: .*NaN"):
        lm.generate(PROMPT, temperature=0, processors=[poison], speculation=Told(PROMPT + whole.token_ids))


def test_the_cache_grows_without_a_trace(lm: LanguageModel, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = dict(max_new_tokens=100, temperature=0.7, seed=3, presence_penalty=0.2)
    plain = lm.generate(PROMPT, **options)
    monkeypatch.setattr("gptfast.generate.language_model.BLOCK", 1)
    monkeypatch.setattr(loop, "BLOCK", 5)
    assert same(lm.generate(PROMPT, speculation=Told(PROMPT + plain.token_ids, [60]), **options), plain)


def test_several_texts_are_decoded_plainly(lm: LanguageModel) -> None:
    prompts = [PROMPT, [1, 2, 3], [9] * 20]
    options: dict[str, Any] = dict(max_new_tokens=30, temperature=0.7, seed=3)
    plain = lm.generate(prompts, **options)
    found = lm.generate(prompts, speculation="prompt-lookup", **options)
    assert all(map(same, found, plain)) and found[0].stats.drafted == 0
    for prompt, one in zip(prompts, plain):
        assert lm.generate(prompt, speculation="prompt-lookup", **options).token_ids == one.token_ids


# Prompt lookup


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 4), st.integers(1, 4), st.integers(1, 15))
@examples(max_examples=300, deadline=None)
def test_prompt_lookup_finds_the_last_place(text: list[int], least: int, more: int, most: int) -> None:
    """A place that was right is followed; else it's that of the longest common n-gram, the last of several."""
    how = PromptLookup(least + more - 1, max_draft=most, min_ngram=least)
    draft, place = how.begin(4), None
    for i, token in enumerate(text):
        draft.accept([token])
        place = place + 1 if place is not None and text[place] == token else None
        end = i + 1
        for n in range(least + more - 1, least - 1, -1):
            if place is None and n <= end:
                ends = [j for j in range(n, end) if text[j - n : j] == text[end - n : end]]
                place = ends[-1] if ends else None
        found = draft.propose(15)
        assert (found == []) == (place is None) and len(found) in (0, most)
        if place is not None:
            grown = text[:end]
            for _ in range(most):
                grown.append(grown[place + len(grown) - end])
            assert found == grown[end:]
            assert draft.propose(3) == found[:3], "asking changes nothing"


def test_prompt_lookup_pays_on_a_text_that_repeats() -> None:
    lm = LanguageModel(model_of("llama"))
    options: dict[str, Any] = dict(temperature=0, seed=0, max_new_tokens=120)
    plain = lm.generate(PROMPT, **options)
    found = lm.generate(PROMPT, speculation=PromptLookup(max_draft=7), **options)
    assert same(found, plain)
    assert 0 < found.stats.accepted <= found.stats.drafted
    assert found.stats.to_dict()["accepted"] == found.stats.accepted


# A draft model


@pytest.mark.parametrize("small", ["itself", "another", "of a shorter context"])
@pytest.mark.parametrize("settings", [SETTINGS[s] for s in ("greedy", "nucleus", "penalties", "processor")])
def test_a_draft_model(lm: LanguageModel, small: str, settings: dict[str, Any], always: None) -> None:
    other = model_of("llama", seed=1, n_layer=1, context=40 if small == "of a shorter context" else 160)
    how = DraftModel(lm if small == "itself" else other, max_draft=6)
    options: dict[str, Any] = dict(max_new_tokens=60, seed=5) | settings
    plain = lm.generate(PROMPT, **options)
    assert same(lm.generate(PROMPT, speculation=how, **options), plain)
    found = lm.generate(PROMPT, speculation=how, **options)
    assert same(found, plain), "a drafter serves any number of texts"
    if small == "itself" and settings == SETTINGS["greedy"]:
        assert found.stats.accepted == found.stats.drafted >= 40, "it guesses what it writes"


def test_a_draft_models_cache_holds_the_text(always: None) -> None:
    """After right and wrong guesses its next ones are those of a fresh cache."""
    model = model_of("gpt2")
    how, text = DraftModel(model, max_draft=5), [3, 1, 4, 1, 5]
    draft = how.begin(V)
    draft.accept(text)
    for right, extra in ((5, [7]), (3, [9]), (0, [2]), (5, []), (2, []), (1, [8] * 30), (4, [6])):
        guesses = draft.propose(5)
        fresh = how.begin(V)
        fresh.accept(text)
        assert (
            guesses
            == fresh.propose(5)
            == LanguageModel(model).generate(text, temperature=0, max_new_tokens=5, ignore_eos=True).token_ids
        )
        fresh.close()
        draft.accept(guesses[:right] + extra)
        text += guesses[:right] + extra
    draft.close()


def test_a_draft_model_that_stays_behind_catches_up(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(1000))
    monkeypatch.setattr(Pace, "wanted", lambda self, most: most if next(turns) % 25 == 0 else 0)
    options: dict[str, Any] = dict(temperature=0, seed=0, max_new_tokens=140)
    assert same(lm.generate(PROMPT, speculation=DraftModel(lm), **options), lm.generate(PROMPT, **options))


# Pace


def paced(costs: dict[int, float]) -> Pace:
    return Pace(SIZES, costs.get)


def test_pace_grows_with_right_guesses_and_backs_off() -> None:
    pace = paced({1: 1.0, 2: 1.3, 4: 1.9, 8: 3.1, 16: 5.5})
    assert pace.size(16) == 1, "nothing is known yet"
    sizes = []
    for _ in range(12):
        size = pace.size(16)
        sizes.append(size)
        assert pace.learn([7] * 16, [7] * size, 0.0) == size
    assert sizes == sorted(sizes) and sizes[-1] == 16
    for _ in range(10):
        pace.learn([7] * 16, [8], 0.0)
    assert pace.size(16) == 1
    assert pace.size(1) == 1


def test_pace_minds_the_cost() -> None:
    dear, cheap = paced({n: float(n) for n in SIZES}), paced({n: 1.0 + 0.01 * n for n in SIZES})
    for pace in (dear, cheap):
        for _ in range(50):
            pace.learn([7] * 16, [7], 0.0)
    assert dear.size(16) == 1, "8 steps at the price of 8"
    assert cheap.size(16) == 16


def test_pace_asks_a_dear_drafter_seldom() -> None:
    pace, asked = paced(dict.fromkeys(SIZES, 1.0)), 0
    pace.learn([7], [8], 0.5)
    for _ in range(1000):
        if wanted := pace.wanted(15):
            asked += 1
            pace.learn([7] * wanted, [8], 0.5 * wanted)
        else:
            pace.learn([], [8], 0.0)
    assert 10 < asked < 40
    for _ in range(300):
        wanted = pace.wanted(15)
        pace.learn([7] * wanted, [7] * wanted, 0.01 * wanted)
    assert pace.wanted(15) > 1, "it has become cheap and good"


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 40))
@examples(max_examples=100, deadline=None)
def test_pace_gives_sizes_that_there_are(hits: list[bool], most: int) -> None:
    pace = paced({})
    for hit in hits:
        size = pace.size(most)
        assert size in SIZES and size <= most
        pace.learn([1] * size, [1] * (size - 1) + [1 if hit else 2], 1e-6)


# Steps


def test_steps_fit_the_room_and_the_mask() -> None:
    model = model_of("gpt2")
    alone: dict[str, Any] = dict(longest=100, vocabulary=V, device=model.device)
    sampler = Sampler([0], {}, [[1]], min_new=6, forbidden_first=[3], **alone)
    steps, cache = Steps(model, sampler, None), loop.KVCache(model.config, 1, 20)
    assert [steps.largest(n, cache, 10) for n in (1, 2, 3, 7, 8, 100)] == [1, 2, 2, 4, 8, 16]
    assert [steps.largest(16, cache, step) for step in (0, 1, 2, 4, 5, 6)] == [4, 4, 4, 2, 1, 16]
    cache.advance(15)
    assert steps.largest(16, cache, 10) == 4


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "n-grams", r"expected speculation None, 'prompt-lookup' or a Drafter.*got 'n-grams'"),
        (lambda: 3, "got 3"),
        (lambda: PromptLookup(0), "1 <= min_ngram <= max_ngram, got 2 and 0"),
        (lambda: PromptLookup(max_draft=16), "max_draft a whole number from 1 to 15, got 16"),
        (lambda: DraftModel(model_of("gpt2", vocab_size=50)), "a draft model of 97 tokens.*got one of 50"),
        (lambda: Told([V] * 200), f"drafts of tokens from 0 to {V - 1}, got {V}"),
        (lambda: Told([-1] * 200), "got -1"),
    ],
)
def test_wrong_drafters_get_one_sentence(lm: LanguageModel, make: Any, message: str, always: None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        how = make()
        if isinstance(how, Told):
            how.text = [t if t < 0 else V for t in how.text]
        lm.generate(PROMPT, speculation=how, max_new_tokens=5)
    assert "\n" not in str(caught.value)
