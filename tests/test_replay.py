"""Replay: a recorded step gives the bits of the step it was recorded from, whatever changes between two of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.generate import LanguageModel, loop
from gptfast.generate.arena import Arena
from gptfast.generate.cache import KVCache
from gptfast.generate.fuse import fused
from gptfast.generate.recording import NotReplayable
from gptfast.generate.replay import WORTH_A_PASS, Recorded, Replay, Replays, record, record_in_arena
from gptfast.kernels import reason_missing
from gptfast.layers import Embedding
from gptfast.model import GPT, GPTConfig
from gptfast.quantize import QuantizedWeight

if reason_missing("cpu") is not None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

LLAMA: dict[str, Any] = dict(
    n_kv_head=2, ffn_dim=96, norm="rms_norm", positions="rope", activation="swiglu", qkv_bias=False, out_bias=False,
    mlp_bias=False,
)  # fmt: skip
CONFIGS = {
    "gpt2": GPTConfig("gpt2", 97, 3, 4, 64, 512),
    "llama": GPTConfig("llama", 97, 3, 4, 64, 512, **LLAMA),
    "qk_norm": GPTConfig("llama", 97, 2, 4, 64, 512, **LLAMA, window=5, window_layers=(True, False), qk_norm=True),
}


def model_of(name: str, kind: str = "float32") -> GPT:
    torch.manual_seed(0)
    quantised, dtype = kind.startswith("q"), kind.removeprefix("packed-")
    model = GPT(CONFIGS[name], dtype=torch.float32 if quantised else getattr(torch, dtype)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape).to(p.dtype)
    if quantised:
        for module in model.modules():
            if hasattr(module, "set_weight") and module is not model.positions:
                module.set_weight(QuantizedWeight.quantize(module.weight.detach(), kind))  # type: ignore[operator]
    return model.pack() if kind.startswith("packed") else model


def prefilled(model: GPT, lengths: list[int], capacity: int, kept: torch.dtype | None = None) -> KVCache:
    """A cache of random tokens (and of dtype `kept`), rows of these lengths."""
    cache = KVCache(model.config, len(lengths), capacity, kept or model.dtype)
    ids = torch.randint(97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    model(ids, cache)
    cache.advance(torch.tensor(lengths, dtype=torch.int32))
    return cache


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [[3], [126], [130, 1, 60], [9, 250, 3, 127, 128, 129, 1, 40]], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed-float32", "packed-bfloat16", "q8_0", "q4_1"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_steps_are_bitwise_equal(name: str, kind: str, lengths: list[int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = model_of(name, kind)
        cache = prefilled(model, lengths, 300)
        other = cache.select(range(len(lengths)))
        replay = Replay(model, cache)
        replay.bind(cache)
        for step in range(6):
            tokens = torch.randint(97, (len(lengths),), generator=torch.Generator().manual_seed(step))
            expected = model(tokens[:, None], other)[:, -1]
            assert torch.equal(replay.step(tokens), expected), step
            cache.advance(1)
            other.advance(1)
        assert all(torch.equal(a, b) for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.int8], ids=str)
@torch.no_grad()
def test_a_step_with_a_smaller_cache(kept: torch.dtype) -> None:
    model = model_of("llama", "q4_1")
    cache, replays = prefilled(model, [130, 1, 60], 300, kept), Replays(model)
    other = cache.select(range(3))
    plain = replays.take(prefilled(model, [3, 4, 5], 300), record=True)
    assert plain is not None
    replays.give(plain)
    replay = replays.take(cache, record=True)
    assert replay is not None and replay is not plain
    for step in range(3):
        tokens = torch.tensor([step, 40, 96])
        assert torch.equal(replay.step(tokens), model(tokens[:, None], other)[:, -1]), step
        cache.advance(1)
        other.advance(1)
    assert all(torch.equal(a, b) for a, b in zip(cache.tensors(), other.tensors()))


@pytest.mark.parametrize("tokens", [2, 4, 16])
@pytest.mark.parametrize("lengths", [[3], [126], [130, 1, 60]], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed-float32", "packed-bfloat16", "q8_0", "q4_1"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_several_tokens_at_once_are_bitwise_equal_to_one_by_one(
    name: str, kind: str, lengths: list[int], tokens: int
) -> None:
    """Some of them counted, as after guesses that were partly right."""
    model = model_of(name, kind)
    cache = prefilled(model, lengths, 300)
    other = cache.select(range(len(lengths)))
    several, one = Replay(model, cache, tokens), Replay(model, other)
    several.bind(cache)
    one.bind(other)
    for kept in (1, tokens // 2, tokens):
        ids = torch.randint(97, (len(lengths), tokens), generator=torch.Generator().manual_seed(kept))
        found = several.step(ids).view(len(lengths), tokens, -1)
        for i in range(kept):
            assert torch.equal(found[:, i], one.step(ids[:, i])), i
            other.advance(1)
        cache.advance(kept)


@torch.no_grad()
def test_a_step_serves_other_caches_and_grown_ones_not() -> None:
    model = model_of("llama", "q4_1")
    first, second = prefilled(model, [5, 9], 128), prefilled(model, [40, 2], 128)
    replays = Replays(model)
    a = replays.take(first, record=True)
    assert a is not None and a.bound(first) and not a.bound(second)
    assert replays.take(second, record=False) is None  # it is out
    replays.give(a)
    b = replays.take(second, record=False)
    assert b is a and b is not None
    tokens = torch.tensor([1, 2])
    assert torch.equal(b.step(tokens), model(tokens[:, None], second.select([0, 1]))[:, -1])
    second.grow(256)
    assert not b.bound(second)
    replays.give(b)
    assert replays.take(second, record=False) is None


@torch.no_grad()
def test_norms_and_activations_join_the_linear_behind_them() -> None:
    model = model_of("llama", "q4_1")
    cache = prefilled(model, [5], 128)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    _, launches, made = record(lambda: model.logits(ids, cache))
    ops = [op for op, _, _ in fused(launches)]
    layer = ["linear_int8", "attention", "linear_int8", "linear_int8", "linear_int8"]
    assert ops == ["dequantize", *layer * 3, "linear_int8"]
    assert made


@torch.no_grad()
def test_a_norm_that_others_read_stays() -> None:
    x, norm, weight = torch.randn(2, 64), torch.ones(64), QuantizedWeight.quantize(torch.randn(8, 64), "q8_0")

    def twice() -> tuple[Tensor, Tensor]:
        y = ops.rms_norm(x, norm)
        return ops.linear(y, weight, activations="int8"), ops.linear(y, weight, activations="int8")

    _, launches, _ = record(twice)
    assert fused(launches) == launches


@torch.no_grad()
def test_what_a_plan_would_leave_out_is_refused() -> None:
    x = torch.randn(4, 64)
    weight = torch.ones(64)
    for outside in (lambda y: y + 1, lambda y: y.mul_(2), lambda y: torch.cat((y, y)), lambda y: y.t().contiguous()):
        with pytest.raises(NotReplayable):
            record(lambda outside=outside: outside(ops.rms_norm(x, weight)))
    assert len(record(lambda: ops.rms_norm(x.view(2, 2, 64)[0], weight))[1]) == 1


def test_a_recorded_call_reads_its_inputs_anew() -> None:
    x, weight = torch.randn(4, 64), torch.randn(64)
    recorded = Recorded(lambda: ops.rms_norm(x, weight))
    for _ in range(3):
        x.normal_()
        assert torch.equal(recorded.run(), ops.rms_norm(x, weight))


def test_a_model_that_isnt_made_of_kernels_decodes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    expected = LanguageModel(model).generate([1, 2, 3], max_new_tokens=20, temperature=0)
    monkeypatch.setenv("GPTFAST_BACKEND", "reference")
    lm = LanguageModel(model)
    assert lm.generate([1, 2, 3], max_new_tokens=20, temperature=0).token_ids == expected.token_ids
    assert not lm._replays._free


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "nucleus": dict(temperature=0.9, top_p=0.8, top_k=40, return_logprobs=True),
    "penalties": dict(repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=0.1, return_logprobs="processed"),
    "forced": dict(min_new_tokens=12, stop=list(range(0, 97, 2)), logit_bias={5: 3.0}),
    "by row": dict(temperature=[0.0, 0.5, 2.0], top_k=[1, 5, 0]),
    "processors": dict(processors=(lambda history, logits: logits - 2.0 * (history[:, -1:] == torch.arange(97)),)),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", CONFIGS)
def test_a_generation_is_the_same_without_replay(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end at different times among them, tokens and log-probs bit by bit."""
    lm = LanguageModel(model_of(name, "q8_0"))
    prompts = [[1, 2, 3], [7] * 40, [9, 8]]
    settings = {"stop": list(range(90, 97)), "max_new_tokens": 60, "seed": [3, 4, 5], **settings}
    replayed = [lm.generate(prompts, **settings) for _ in range(2)]
    monkeypatch.setattr(loop, "WORTH_RECORDING", 10**9)
    eager = LanguageModel(lm.model).generate(prompts, **settings)
    for one in replayed:
        assert [g.token_ids for g in one] == [g.token_ids for g in eager]
        assert [g.logprobs for g in one] == [g.logprobs for g in eager]
    assert max(len(g.token_ids) for g in eager) > 12
    assert lm._replays._free


PROMPT = torch.randint(97, (1100,), generator=torch.Generator().manual_seed(8)).tolist()


def _swap_parameters(model: GPT, others: GPT) -> None:
    for module, other in zip(model.modules(), others.modules()):
        for name, parameter in other._parameters.items():
            setattr(module, name, parameter)


def _swap_data(model: GPT, others: GPT) -> None:
    for parameter, other in zip(model.parameters(), others.parameters()):
        parameter.data = other.data.clone()


SWAPS = {
    "parameters": _swap_parameters,
    "data": _swap_data,
    "assign": lambda model, others: model.load_state_dict(others.state_dict(), assign=True),
    "dtype": lambda model, _: model.bfloat16(),
    "pack": lambda model, _: model.pack(),
}


@pytest.mark.parametrize("speculation", [None, "prompt-lookup"], ids=str)
@pytest.mark.parametrize("swap", SWAPS.values(), ids=list(SWAPS))
def test_weights_that_are_put_in_after_a_call(swap: Any, speculation: str | None) -> None:
    """What was recorded holds pointers, and the memory of the weights before is somebody else's by now."""
    lm = LanguageModel(model_of("llama"), kv_cache="fp32")
    settings: dict[str, Any] = dict(max_new_tokens=24, temperature=0.0, speculation=speculation)
    lm.generate(PROMPT[:9], **settings)
    others = GPT(lm.model.config).eval()
    with torch.no_grad():
        for p in others.parameters():
            p.copy_(torch.randn(p.shape))
    swap(lm.model, others)
    kept = [torch.full((n,), torch.nan) for n in (64, 96 * 64, 64 * 64) for _ in range(50)]  # where the weights were
    got = lm.generate(PROMPT[:9], **settings)
    del kept
    assert got.token_ids == LanguageModel(lm.model, kv_cache="fp32").generate(PROMPT[:9], **settings).token_ids
    assert all(not r.weights for r in lm._replays._free), "no call, no memory kept"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed-float32", "q8_0", "q4_1", "q4_1 int8"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_prompt_in_recorded_passes_is_bitwise_equal(name: str, kind: str, threads: int) -> None:
    """Passes of both sizes, rests, behind tokens that the cache holds, in a smaller cache and in a larger one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kind, _, kept = kind.partition(" ")
        model = model_of(name, kind)
        model.config = replace(model.config, context=2048)
        if model.positions is not None:
            model.positions = Embedding(2048, 64, dtype=model.dtype).eval()
        replays, counts, large = Replays(model), [], loop.PASSES[0]
        for capacity, ends in ((1000, (128, 131, 131 + large, 900)), (300, (256, 300)), (1100, (large + 128, 1100))):
            dtype = torch.int8 if kept else model.dtype
            cache, other = (KVCache(model.config, 1, capacity, dtype) for _ in range(2))
            for end in ends:
                fed = loop.Loop(model, cache, loop.Limits(2048, 1), replays=replays)
                whole = loop.Loop(model, other, loop.Limits(2048, 1))
                for each in (fed, whole):
                    each.prefill([PROMPT[:end]], lambda done, total: counts.append((done, total)))
                assert fed.logits is not None and whole.logits is not None
                assert torch.equal(fed.logits, whole.logits), (capacity, end)
                assert torch.equal(cache.lengths, other.lengths)
                for a, b in zip(cache.tensors(), other.tensors()):
                    assert torch.equal(a[:, :end], b[:, :end])
        assert all(done <= total for done, total in counts) and counts[-1][0] == counts[-1][1]
        assert sorted(r.tokens for r in replays._free) == sorted(loop.PASSES), "one of each size, for the largest cache"
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_pass_is_recorded_where_it_pays() -> None:
    model = model_of("llama")
    replays = Replays(model)
    small, large = KVCache(model.config, 1, 300), KVCache(model.config, 1, 400)
    assert replays.take_pass(small, 128, 1) is None, "once is not often"
    first = replays.take_pass(small, 128, 1)
    assert first is not None and replays.take_pass(small, 512, 1) is None
    replays.give(first)
    second = replays.take_pass(large, 128, 1)
    assert second is not None and second is not first, "the first has no room for so many"
    replays.give(second)
    assert replays.take_pass(small, 128, 1) is second
    assert Replays(model).take_pass(small, 32, WORTH_A_PASS) is not None


@torch.no_grad()
def test_a_recorded_pass_needs_little_memory_and_fuses_as_before() -> None:
    model = model_of("llama", "q4_1")
    cache = KVCache(model.config, 1, 300)
    ids, positions = torch.tensor([PROMPT[:128]]), torch.arange(128)[None]
    model.rope_tables(300, model.device)
    wanted, launches, made = record(lambda: model.branches(ids, cache, positions))
    (branch, stream), small, (arena, _) = record_in_arena(lambda: model.branches(ids, cache, positions))
    assert torch.equal(branch, wanted[0]) and torch.equal(stream, wanted[1])
    assert [op for op, *_ in small] == [op for op, *_ in fused(launches)]
    everything = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in made}
    assert arena.nbytes < sum(everything.values()) / 2


def test_memory_of_an_arena_is_taken_again_after_one_launch() -> None:
    launches = [1]
    arena = Arena(launches)
    first = arena.empty((4, 6), torch.float32)
    address, view = first.data_ptr(), first[1:, 2]
    del first
    launches.append(2)
    assert arena.empty((24,), torch.float32).data_ptr() != address, "a view is left"
    del view
    assert arena.empty((24,), torch.float32).data_ptr() != address, "the launch may be made part of the next"
    launches.append(3)
    again = arena.empty((3, 5), torch.bfloat16)
    assert again.data_ptr() == address and again.shape == (3, 5) and again.dtype == torch.bfloat16
    assert arena.given[address] == [1, 3] and arena.holds(address)
    assert arena.empty((0, 3), torch.float32).shape == (0, 3)
