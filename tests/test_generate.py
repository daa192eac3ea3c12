"""The generation loop: what a row writes depends on that row alone, and every way to end, to stop and to fail."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gptfast
from gptfast.generate import Generation, LanguageModel, loop
from gptfast.generate.cache import CACHE_DTYPES, KVCache
from gptfast.generate.stop import Text
from gptfast.model import GPT, GPTConfig

V, END = 257, 256
TINY: dict[str, Any] = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=V, context=96, eos_ids=(END,))


class Bytes:
    """A tokenizer whose ids are bytes, and END."""

    eos_ids, special_ids, _strips_space = frozenset({END}), frozenset({END}), False

    def encode(self, text: str, parse_special: bool = False, add_bos: bool | None = None) -> list[int]:
        return list(text.encode())

    def token_bytes(self, id: int) -> bytes:
        return bytes([id])

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        ids = [b for m in messages for b in (*f"{m['role']}: {m['content']}".encode(), END)]
        return [*ids, *b"assistant: "]


class Script(nn.Module):
    """Writes a fixed text: the likeliest token at position p of any row is script[p]."""

    backend = activations = None
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, script: bytes | list[int], context: int = 96) -> None:
        super().__init__()
        self.config = GPTConfig("gpt2", **{**TINY, "context": context})
        self.script = torch.tensor(list(script))

    def forward(self, ids: Tensor, cache: loop.KVCache, *, last: Tensor | None = None) -> Tensor:
        positions = cache.lengths[:, None].long() + torch.arange(ids.shape[1]) + 1
        logits = nn.functional.one_hot(self.script[positions % len(self.script)], V).float() * 40
        return logits if last is None else logits[torch.arange(len(ids)), last]


def scripted(text: str, context: int = 96) -> LanguageModel:
    """A model that continues "?" (one token) with this text and then END."""
    return LanguageModel(Script([0, *text.encode(), END], context), Bytes())  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """A tiny model with random weights, whose texts don't end early."""
    torch.manual_seed(0)
    more: dict[str, Any] = {}
    if request.param == "llama":
        more = dict(norm="rms_norm", positions="rope", activation="swiglu", n_kv_head=2)
        more |= dict(qkv_bias=False, out_bias=False, mlp_bias=False)
    model = GPT(GPTConfig(request.param, **TINY, **more))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # the initial weights make nearly uniform distributions
    return LanguageModel(model.eval(), Bytes())  # type: ignore[arg-type]


def ids_of(found: Generation | list[Generation]) -> list[list[int]]:
    return [g.token_ids for g in (found if isinstance(found, list) else [found])]


RAGGED = ["a", "The quick brown fox jumps over", "Hi there", "The quick brown fox jumps over", "zz"]
SAMPLED: dict[str, Any] = dict(max_new_tokens=24, temperature=0.9, top_k=50, top_p=0.95, seed=7)


# One row, one meaning


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"repetition_penalty": 1.3, "presence_penalty": 0.4}])
def test_a_row_does_not_see_its_neighbours(lm: LanguageModel, changes: dict[str, float]) -> None:
    together = lm.generate(RAGGED, **(SAMPLED | changes))
    alone = [lm.generate(p, **(SAMPLED | changes)) for p in RAGGED]
    assert ids_of(together) == [g.token_ids for g in alone]
    assert together[1].text == together[3].text, "equal prompts and one seed give equal texts"


def test_rows_that_end_early_leave_without_a_trace(lm: LanguageModel) -> None:
    free = lm.generate(RAGGED, ignore_eos=True, **SAMPLED)
    stops = [free[0].token_ids[2], free[2].token_ids[5]]
    together = lm.generate(RAGGED, ignore_eos=True, stop=stops, **SAMPLED)
    assert min(len(g.token_ids) for g in together) <= 3
    for row, whole in zip(together, free):
        assert row.token_ids == whole.token_ids[: len(row.token_ids)]
        assert row.finish_reason == ("stop" if row.token_ids[-1] in stops else "length")


def test_chunks_and_threads_do_not_matter(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    expected = lm.generate(RAGGED, return_logprobs=True, **SAMPLED)
    monkeypatch.setattr(loop, "CHUNK", 7)
    torch.set_num_threads(1)
    found = lm.generate(RAGGED, return_logprobs=True, **SAMPLED)
    assert ids_of(found) == ids_of(expected)
    assert [g.logprobs for g in found] == [g.logprobs for g in expected], "bit for bit"


def test_the_cache_grows_without_a_trace(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lm.generate("abc", **(SAMPLED | {"max_new_tokens": 60}))
    monkeypatch.setattr("gptfast.generate.language_model.BLOCK", 1)
    monkeypatch.setattr(loop, "BLOCK", 5)
    assert lm.generate("abc", **(SAMPLED | {"max_new_tokens": 60})).token_ids == expected.token_ids


def test_seeds(lm: LanguageModel) -> None:
    options: dict[str, Any] = dict(max_new_tokens=20, ignore_eos=True)
    three = lm.generate("abc", n=3, seed=5, **options)
    assert [g.seed for g in three] == [5, 6, 7]
    assert ids_of(three) == [lm.generate("abc", seed=s, **options).token_ids for s in (5, 6, 7)]
    assert len({tuple(g.token_ids) for g in three}) == 3
    each = lm.generate(["abc", "abc"], seed=[6, 5], **options)
    assert ids_of(each) == [three[1].token_ids, three[0].token_ids]
    drawn = lm.generate("abc", **options)
    assert lm.generate("abc", seed=drawn.seed, **options).token_ids == drawn.token_ids
    assert lm.generate("abc", n=3, seed=5, **options)[0].stats.prefill_tokens == 3, "n samples share a prefill"


def test_settings_may_differ_by_prompt(lm: LanguageModel) -> None:
    prompts, temperatures, ks = ["abc", "abc", "xyz"], [0.0, 1.2, 0.7], [0, 5, 3]
    found = lm.generate(prompts, temperature=temperatures, top_k=ks, seed=3, max_new_tokens=12)
    for p, t, k, g in zip(prompts, temperatures, ks, found):
        assert lm.generate(p, temperature=t, top_k=k, seed=3, max_new_tokens=12).token_ids == g.token_ids


# Scores


def test_logprobs_are_the_scores(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptfast.generate.language_model.SCORED_AT_ONCE", 5)
    found = lm.generate("Once", return_logprobs=True, ignore_eos=True, **SAMPLED)
    score = lm.score([*b"Once", *found.token_ids])
    # The logits are equal bit for bit; log-softmax sums V exponentials in an order of its own.
    bound = V * torch.finfo(torch.float32).eps
    np.testing.assert_allclose(found.logprobs, score.token_logprobs[3:], atol=bound, rtol=0)
    assert score.tokens == 3 + len(found.token_ids)
    assert score.perplexity == pytest.approx(np.exp(-np.mean(score.token_logprobs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", ["fp32", "bf16", "fp16", "int8"])
def test_a_cache_of_another_dtype_changes_no_row(lm: LanguageModel, dtype: torch.dtype, kept: str) -> None:
    """A 16-bit model's tokens one by one are its tokens together, whatever the cache holds."""
    model = copy.deepcopy(lm.model).to(dtype)
    ids = torch.randint(V, (1, 96), generator=torch.Generator().manual_seed(0))

    def fed(*sizes: int) -> Tensor:
        cache, found = KVCache(model.config, 1, 96, CACHE_DTYPES[kept]), []
        for tokens in ids.split(sizes, 1):
            found.append(model(tokens, cache=cache))
            cache.advance(tokens.shape[1])
        return torch.cat(found, 1)

    with torch.no_grad():
        assert torch.equal(fed(96), fed(40, *[1] * 56))


def test_scores_are_the_models_own(lm: LanguageModel) -> None:
    ids = torch.tensor([list(b"Some text to be scored.")])
    with torch.no_grad():
        exact = lm.model(ids)[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(lm.score(ids[0]).token_logprobs, exact, atol=V * torch.finfo(torch.float32).eps, rtol=0)


def test_processed_logprobs(lm: LanguageModel) -> None:
    found = lm.generate("Once", return_logprobs="processed", max_new_tokens=8, top_k=1, seed=1)
    assert found.logprobs == [0.0] * len(found.token_ids), "the only one left"


# Caches


@pytest.mark.parametrize("cut", [1, 5, 9])
def test_a_cache_continues(lm: LanguageModel, cut: int) -> None:
    options: dict[str, Any] = dict(temperature=0, ignore_eos=True)
    cache = lm.new_cache(capacity=4)
    first = lm.generate("Hello", cache=cache, max_new_tokens=cut, **options)
    second = lm.generate(" and so", cache=cache, max_new_tokens=10, **options)
    whole = lm.generate([*b"Hello", *first.token_ids, *b" and so"], max_new_tokens=10, **options)
    assert second.token_ids == whole.token_ids
    assert second.prompt_tokens == 5 + cut + 7
    assert second.stats.prefill_tokens == 1 + 7, "the last token was not computed yet"
    more = lm.generate("", cache=cache, max_new_tokens=4, **options)
    assert more.token_ids == lm.generate(cache.tokens[0][:-4], max_new_tokens=4, **options).token_ids


def test_a_cache_of_several_rows(lm: LanguageModel) -> None:
    options: dict[str, Any] = dict(temperature=0, ignore_eos=True, max_new_tokens=6)
    cache = lm.new_cache(3)
    starts, more = ["a", "The quick brown", "xy"], ["bcd", "e", "The lazy dog sleeps"]
    first = lm.generate(starts, cache=cache, **options)
    second = lm.generate(more, cache=cache, **options)
    for s, f, m, g in zip(starts, first, more, second):
        alone = lm.generate([*s.encode(), *f.token_ids, *m.encode()], **options)
        assert g.token_ids == alone.token_ids


def test_a_prompt_can_be_computed_ahead(lm: LanguageModel) -> None:
    cache = lm.new_cache()
    nothing = lm.generate("Hello", cache=cache, max_new_tokens=0)
    assert (nothing.token_ids, nothing.finish_reason) == ([], "length")
    ahead = lm.generate("", cache=cache, max_new_tokens=9, temperature=0)
    assert ahead.token_ids == lm.generate("Hello", max_new_tokens=9, temperature=0).token_ids
    assert ahead.stats.prefill_tokens == 1


def test_chat_keeps_what_the_turns_share(lm: LanguageModel) -> None:
    options: dict[str, Any] = dict(temperature=0, max_new_tokens=6, ignore_eos=True)
    cache = lm.new_cache()
    turns = [{"role": "user", "content": "hi"}]
    first = lm.chat(turns, cache=cache, **options)
    turns += [{"role": "assistant", "content": "other words"}, {"role": "user", "content": "go on"}]
    second = lm.chat(turns, cache=cache, **options)
    assert first.token_ids == lm.chat(turns[:1], **options).token_ids
    plain = lm.chat(turns, **options)
    assert second.token_ids == plain.token_ids
    assert second.stats.prefill_tokens < plain.stats.prefill_tokens
    assert "".join(lm.stream_chat(turns, **options)) == plain.text


# Ends


def test_stop_strings_cross_tokens() -> None:
    model = scripted("Hello, wonderful world. More")
    found = model.generate("?", stop=["world", "wonderful w"], temperature=0)
    assert (found.text, found.finish_reason) == ("Hello, ", "stop"), "complete first wins"
    assert bytes(found.token_ids) == b"Hello, wonderful w"
    late = model.generate("?", stop="o", min_new_tokens=6, temperature=0)
    assert late.text == "Hello, w"


def test_the_end_token_is_a_token_but_no_text() -> None:
    model = scripted("Bye")
    found = model.generate("?", temperature=0, max_new_tokens=9)
    assert (found.text, found.token_ids, found.finish_reason) == ("Bye", [*b"Bye", END], "stop")
    on = model.generate("?", temperature=0, max_new_tokens=6, ignore_eos=True)
    assert (len(on.token_ids), on.finish_reason) == (6, "length")
    assert END in on.token_ids
    longer = model.generate("?", temperature=0, max_new_tokens=9, min_new_tokens=5)
    assert END not in longer.token_ids[:5]
    assert model.generate("?", temperature=0, stop=[ord("y")]).text == "B"


def test_the_end_of_the_context() -> None:
    model = scripted("x" * 50, context=20)
    found = model.generate("?", temperature=0, max_new_tokens=None)
    assert (len(found.token_ids), found.finish_reason) == (19, "context")
    assert model.generate("?" * 19, temperature=0).finish_reason == "context"
    with pytest.raises(ValueError, match=r"fewer prompt tokens than the context of 20.*got 20"):
        model.generate("?" * 20)
    pair = model.generate(["?" * 15, "?"], temperature=0, max_new_tokens=12, processors=[lambda h, l: l])
    assert [(len(g.token_ids), g.finish_reason) for g in pair] == [(5, "context"), (12, "length")]


@pytest.mark.parametrize("end", [KeyboardInterrupt, None])
def test_what_is_there_comes_back(end: type[BaseException] | None) -> None:
    model, cache = scripted("Hello, world"), scripted("").new_cache()
    calls = []

    def press(history: Tensor, logits: Tensor) -> Tensor:
        calls.append(history.shape[1])
        if len(calls) == 6 and end is not None:
            raise end
        return logits

    found = model.generate("?", temperature=0, processors=[press], cache=cache, stop=["o, universe"])
    if end is None:
        assert found.text == "Hello, world"
    else:
        assert (found.text, found.finish_reason) == ("Hello", "interrupted"), "what was held back is there"
        assert cache.tokens == [[*b"?Hello"]]
        assert model.generate("", temperature=0, cache=cache).text == ", world", "the cache is whole"


# Streams

TEXTS = ["你好，世界！", "naïve 🙂👨‍👩‍👧 done", "plain", "半"]


@pytest.mark.parametrize("text", TEXTS)
def test_streams_never_split_characters(text: str) -> None:
    model = scripted(text)
    stream = model.stream("?", temperature=0)
    pieces = list(stream)
    assert "".join(pieces) == text == stream.generation.text == model.generate("?", temperature=0).text
    assert not any("�" in piece for piece in pieces)
    cut = model.generate("?", temperature=0, max_new_tokens=len(text.encode()) - 1)
    if len(text[-1].encode()) > 1:
        assert cut.text == text[:-1] + "�", "half a character at the very end"


def test_streams_hold_back_what_may_be_a_stop_string() -> None:
    seen = list(scripted("one ENDless END two").stream("?", temperature=0, stop=["END "]))
    assert "".join(seen) == "one ENDless "
    assert "END" not in seen and "E" not in seen


def test_a_stream_can_be_left() -> None:
    model = scripted("Hello, world")
    cache = model.new_cache()
    stream = model.stream("?", temperature=0, cache=cache)
    assert [next(stream) for _ in range(3)] == ["H", "e", "l"]
    with pytest.raises(RuntimeError, match="in use by another call"):
        model.generate("?", cache=cache)
    stream.close()
    assert (stream.generation.text, stream.generation.finish_reason) == ("Hel", "interrupted")
    assert model.generate("", temperature=0, cache=cache).text == "lo, world"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_stops_do_not_depend_on_boundaries(text: str, stops: list[str], data: st.DataObject) -> None:
    class Pieces:
        def __init__(self, pieces: list[str]) -> None:
            self.pieces = pieces

        def push(self, token: int) -> str:
            return self.pieces[token]

        def flush(self) -> str:
            return ""

    def read(pieces: list[str]) -> tuple[str, bool]:
        found = Text(Pieces(pieces), stops)
        for i in range(len(pieces)):
            found.push(i)
            if found.stopped:
                break
            shown = str(found)
            assert not any(stop in shown for stop in stops)
        found.flush()
        return str(found), found.stopped

    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    ends = [i for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    if ends:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        assert read(pieces) == read(list(text)) == (text[: ends[0] - longest], True)
    else:
        assert read(pieces) == (text, False)


# Processors, bias and failure


def test_processors_and_bias_decide() -> None:
    model = scripted("aaaa")
    seen: list[list[int]] = []

    def no_a(history: Tensor, logits: Tensor) -> Tensor:
        seen.append(history[0].tolist())
        logits[:, ord("a")] = float("-inf")
        logits[:, ord("b")] = 1.0
        return logits

    found = model.generate("?", temperature=0, processors=[no_a], max_new_tokens=3, return_logprobs=True)
    assert found.text == "bbb"
    assert seen == [[*b"?"], [*b"?b"], [*b"?bb"]]
    # log-probs are the model's own: 40 for "a", 0 for the others
    assert found.logprobs == pytest.approx([-40.0] * 3)
    biased = model.generate("?", temperature=0, logit_bias={ord("c"): 50.0}, max_new_tokens=3)
    assert biased.text == "ccc"


def test_nan_is_named(lm: LanguageModel) -> None:
    def poison(history: Tensor, logits: Tensor) -> Tensor:
        if history.shape[1] == 1 + 2:
            logits[1, 3] = float("nan")
        return logits

    with pytest.raises(RuntimeError, match=r"row 1, step 2: .*NaN"):
        lm.generate(["a", "b"], processors=[poison], max_new_tokens=5, ignore_eos=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompt=""), "at least one prompt token, got none"),
        (dict(prompt=[]), "at least one prompt token, got none"),
        (dict(prompt=[1, V]), f"token ids from 0 to {V - 1}, got {V}"),
        (dict(prompt=[-1]), "got -1"),
        (dict(prompt=[1.5]), "whole token ids"),
        (dict(prompt="a", max_new_tokens=-1), "max_new_tokens a whole number of at least 0, got -1"),
        (dict(prompt="a", n=0), "n a whole number of at least 1, got 0"),
        (dict(prompt="a", seed=-1), "seed a whole number from 0"),
        (dict(prompt=["a", "b"], seed=[1]), "one for each of 2 prompts, got 1"),
        (dict(prompt=["a", "b"], temperature=[1.0]), "one temperature, or one for each of 2 prompts, got 1"),
        (dict(prompt="a", stop=""), "strings that aren't empty"),
        (dict(prompt="a", stop=[-1], min_new_tokens=2), f"token ids from 0 to {V - 1}, got -1"),  # no last token
        (dict(prompt="a", stop=[V], min_new_tokens=2), f"token ids from 0 to {V - 1}, got {V}"),
        (dict(prompt="a", stop=1.5), "stop to hold strings .*got 1.5"),
        (dict(prompt="a", stop=None), "stop to hold strings .*got None"),
        (dict(prompt=None), "a prompt of text or of token ids, or a list of them, got None"),
        (dict(prompt={"role": "user"}), "a prompt of text or of token ids, or a list of them, got {'role'"),
        (dict(prompt="a", seed=1.5), "seed a whole number from 0 .*got 1.5"),
        (dict(prompt="a", temperature="hot"), "temperature a number, or a list of them, got 'hot'"),
        (dict(prompt=["a", "b"], top_k=[1.5, 2]), "top_k a whole number, or a list of them, got 1.5"),
        (dict(prompt="a", logit_bias={"a": 1.0}), "logit_bias {token id: bias} or a tensor"),
        (dict(prompt="a", logit_bias=[1.0]), "logit_bias {token id: bias} or a tensor"),
        (dict(prompt="a", temperature=-1.0), "temperature"),
        (dict(prompt="a", top_k=1.5), "top_k a whole number"),
        (dict(prompt="a", top_p=1.5), "top_p between 0 and 1, got 1.5"),
        (dict(prompt="a", return_logprobs="all"), "'raw' or 'processed', got 'all'"),
        (dict(prompt="a", logit_bias={V: 1.0}), "token ids from 0"),
        (dict(prompt="a", processors=[lambda history, logits: logits[0]]), "a processor must return logits"),
    ],
)
def test_wrong_arguments_get_one_sentence(lm: LanguageModel, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        lm.generate(**arguments)
    assert "\n" not in str(caught.value)


def test_more_wrong_arguments(lm: LanguageModel) -> None:
    with pytest.raises(TypeError, match="no setting 'temperatur'"):
        lm.generate("a", temperatur=1.0)
    with pytest.raises(ValueError, match="cache of 2 rows, one for each text, got one of 1"):
        lm.generate(["a", "b"], cache=lm.new_cache())
    deeper = GPT(GPTConfig(lm.model.config.family, **{**TINY, "n_layer": 3}))
    with pytest.raises(ValueError, match="a cache made by this model's new_cache, got one of another model"):
        lm.generate("a", cache=LanguageModel(deeper).new_cache())
    with pytest.raises(ValueError, match="expected one prompt and n=1"):
        lm.stream("a", n=2)
    with pytest.raises(ValueError, match=r"at most 96 tokens.*got 97"):
        lm.score("a" * 97)
    bare = LanguageModel(lm.model)
    assert bare.generate([1, 2], max_new_tokens=3, seed=1).text == ""
    with pytest.raises(ValueError, match="has no tokenizer: expected token ids"):
        bare.generate("a")


def test_an_end_token_that_the_model_does_not_have(lm: LanguageModel) -> None:
    """A tokenizer may have more tokens than the model."""
    other = LanguageModel(lm.model)
    other.eos_ids = (V + 5,)
    assert len(other.generate([1, 2], min_new_tokens=2, max_new_tokens=3, seed=1).token_ids) == 3


@pytest.mark.parametrize("name", ["nope", "/nowhere/model.gguf"])
def test_a_model_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a \.gguf file, a Hugging Face folder, or one of smollm2"):
        gptfast.load(name)


KEPT = (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), ("int8", torch.int8))


def test_a_model_as_it_stands(lm: LanguageModel, tmp_path: Path) -> None:
    again = gptfast.load(lm.model, tokenizer=lm.tokenizer)
    assert again.generate("ab", seed=1).token_ids == lm.generate("ab", seed=1).token_ids
    for name, dtype in KEPT:
        kept = gptfast.load(lm.model, tokenizer=lm.tokenizer, kv_cache=name)
        assert kept.new_cache().kv.dtype == dtype
        together = kept.generate(["ab", "b"], seed=1, max_new_tokens=20)
        assert [g.token_ids for g in together] == [
            kept.generate(p, seed=1, max_new_tokens=20).token_ids for p in ("ab", "b")
        ]
    with pytest.raises(ValueError, match="kv_cache None or one of fp32, bf16, fp16, int8, got 'int3'"):
        gptfast.load(lm.model, kv_cache="int3")
    for device in ("nonsense", "meta", *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(ValueError, match=f"expected a device that this PyTorch can use, got '{device}'"):
            gptfast.load(lm.model, device=device)
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected a \.gguf file or a folder with config\.json"):
        gptfast.load(tmp_path / "x.txt")


# Threads, forks, imports


def in_threads(work: list[Callable[[], object]]) -> list[object]:
    found: list[object] = [None] * len(work)

    def run(i: int) -> None:
        found[i] = work[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_models_in_several_threads(lm: LanguageModel) -> None:
    torch.manual_seed(1)
    other = LanguageModel(GPT(GPTConfig("gpt2", **TINY)).eval(), Bytes())  # type: ignore[arg-type]
    jobs = [(model, prompt) for prompt in ("Hello", "abc", "The quick brown") for model in (lm, other)]
    expected = [model.generate(prompt, **SAMPLED).token_ids for model, prompt in jobs]
    found = in_threads([lambda j=job: j[0].generate(j[1], **SAMPLED).token_ids for job in jobs])
    assert found == expected


FORK = """
import os, sys, torch
from gptfast.generate import LanguageModel
from gptfast.model import GPT, GPTConfig
torch.set_num_threads(2)
torch.manual_seed(0)
lm = LanguageModel(GPT(GPTConfig("gpt2", 500, 2, 4, 64, 128)).eval())
big = torch.randn(600, 600); (big @ big).log_softmax(-1)  # PyTorch's own threads are there before the fork
expected = lm.generate([1, 2, 3], max_new_tokens=20, seed=1).token_ids
child = os.fork()
if child == 0:
    same = lm.generate([1, 2, 3], max_new_tokens=20, seed=1).token_ids == expected
    (big @ big).log_softmax(-1)
    os._exit(0 if same else 3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_after_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_gptfast_needs_torch_alone() -> None:
    check = (
        "import sys, gptfast; assert 'load' in gptfast.__all__; "
        "extras = ('tokenizers', 'safetensors', 'jinja2', 'rich', 'typer', 'transformers'); "
        "print([m for m in extras if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
