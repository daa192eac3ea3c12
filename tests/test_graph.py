"""Replay on a GPU: a captured step gives the bits of a step that is not, whatever changes between two of them.

On a GPU (pytest --device cuda) graphs are graphs. Elsewhere one is played by a function that is called again, which
shows that what surrounds it is right: whose memory a graph works on, and what moves between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gptfast import ops
from gptfast.generate import LanguageModel, graph, replay
from gptfast.generate.recording import NotReplayable
from gptfast.generate.speculative import PromptLookup
from gptfast.kernels import reason_missing
from gptfast.model import GPT, GPTConfig
from tests import where

if where.INTERPRETED or (where.on_the_cpu() and reason_missing("cpu") is not None):
    pytest.skip("replay needs the CPU's kernels, built, or a GPU", allow_module_level=True)

LLAMA: dict[str, Any] = dict(n_kv_head=2, norm="rms_norm", positions="rope", activation="swiglu", qkv_bias=False)
CONFIGS = {"gpt2": GPTConfig("gpt2", 97, 2, 4, 64, 640), "llama": GPTConfig("llama", 97, 2, 4, 64, 640, **LLAMA)}
PROMPTS = [[1, 5, 9, 33, 2, 4], [7], [3, 3, 8, 90, 14, 22, 61, 5, 5], [40, 41]]


class Again:
    """A graph for where there are none: calls the function again, and keeps its first result's memory."""

    made = 0

    def __init__(self, function: Callable[[], Any], prepare: Callable[[], Any], device: torch.device) -> None:
        Again.made += 1
        self._function, self.result = function, prepare()

    @torch.no_grad()
    def run(self) -> None:
        found = self._function()
        if isinstance(found, torch.Tensor):
            self.result.copy_(found)


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    if where.on_the_cpu():
        monkeypatch.setattr(graph, "Graph", Again)
        monkeypatch.setattr(replay, "Replay", graph.GraphReplay)


def model(name: str, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    made = GPT(CONFIGS[name], dtype=dtype).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape).to(p.dtype)
    return made.to(where.device)


def both(made: GPT, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> LanguageModel:
    """Generates twice with graphs and once without, and compares."""
    with monkeypatch.context() as patch:
        patch.setattr(replay, "_replayable", lambda model, cache: False)
        wanted = LanguageModel(made).generate(prompts, ignore_eos=True, **settings)
    lm = LanguageModel(made)
    for _ in range(2):
        found = lm.generate(prompts, ignore_eos=True, **settings)
        assert [g.token_ids for g in found] == [g.token_ids for g in wanted]
        assert [g.logprobs for g in found] == [g.logprobs for g in wanted]
    assert len({token for g in wanted for token in g.token_ids}) > 5, "a model that writes one token shows little"
    return lm


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": dict(temperature=0),
    "sampled": dict(temperature=0.9, top_k=20, top_p=0.95, seed=[3, 4, 5, 6]),
    "penalties": dict(temperature=[0.0, 0.7, 0.8, 1.0], repetition_penalty=[1.0, 1.2, 1.3, 1.5], seed=1),
    "logprobs": dict(temperature=0.8, seed=2, return_logprobs="processed", presence_penalty=0.5),
    "least": dict(temperature=0.8, seed=2, min_new_tokens=7, return_logprobs=True),
    "bias": dict(temperature=2.0, seed=2, logit_bias={5: 3.0, 6: -100.0}, min_p=0.01),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_from_a_graph_gives_the_same_tokens(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = both(model(name), PROMPTS, monkeypatch, max_new_tokens=24, **settings)
    assert any(isinstance(r, graph.GraphReplay) for r in lm._replays._free)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_sixteen_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    both(model("llama", dtype), PROMPTS, monkeypatch, max_new_tokens=16, temperature=0.8, seed=1)


def test_a_cache_that_grows_and_rows_that_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache's memory is another then, and so is the graph."""
    made, first = model("llama"), [1, 5, 9, 33] * 62
    both(made, [first, [4, 9]], monkeypatch, max_new_tokens=40, temperature=0)  # beyond a block of the cache
    lm, stop = LanguageModel(made), LanguageModel(made).generate([7, 8], max_new_tokens=9, temperature=0).token_ids[-1]
    found = lm.generate([[7, 8], [3, 3, 8], [1]], max_new_tokens=30, temperature=0, stop=stop)
    for prompt, one in zip(([7, 8], [3, 3, 8], [1]), found):
        alone = LanguageModel(made).generate(prompt, max_new_tokens=30, temperature=0, stop=stop)
        assert one.token_ids == alone.token_ids
    assert len({len(one.token_ids) for one in found}) > 1


def test_speculation_with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    made, prompt = model("gpt2"), [1, 5, 9, 33, 2, 4] * 6
    plain = LanguageModel(made).generate(prompt, max_new_tokens=40, temperature=0, return_logprobs=True)
    settings: dict[str, Any] = dict(repetition_penalty=1.1, temperature=0, return_logprobs=True, max_new_tokens=40)
    found = LanguageModel(made).generate(prompt, **settings | {"repetition_penalty": 1.0}, speculation=PromptLookup())
    assert (found.token_ids, found.logprobs) == (plain.token_ids, plain.logprobs)
    plain = LanguageModel(made).generate(prompt, **settings)
    found = LanguageModel(made).generate(prompt, **settings, speculation=PromptLookup())
    assert (found.token_ids, found.logprobs) == (plain.token_ids, plain.logprobs)


def test_a_conversation_goes_on_in_its_cache() -> None:
    lm, plain = LanguageModel(model("llama")), LanguageModel(model("llama"))
    cache, text = lm.new_cache(capacity=300), [1, 5, 9]
    for more in (text, [2, 2], [60]):
        text = text + more if len(cache) else more
        found = lm.generate(more, cache=cache, max_new_tokens=12, temperature=0)
        assert found.token_ids == plain.generate(text, max_new_tokens=12, temperature=0).token_ids
        text = text + found.token_ids


@pytest.mark.skipif(where.on_the_cpu(), reason="needs a GPU")
def test_the_next_call_mostly_finds_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was given back is handed out again."""
    captured: list[Any] = []
    real = graph.GraphReplay.__init__
    monkeypatch.setattr(graph.GraphReplay, "__init__", lambda self, *a: (captured.append(a[2]), real(self, *a))[1])
    lm = LanguageModel(model("llama"))
    for seed in range(6):
        lm.generate([1, 2, 3], max_new_tokens=20, seed=seed, ignore_eos=True)
    assert 1 <= len(captured) <= 3


@pytest.mark.skipif(where.on_the_cpu(), reason="needs a GPU")
def test_what_waits_for_the_gpu_is_not_captured() -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(NotReplayable, match="CUDA graph"):
        graph.Graph(lambda: x.sum().item(), lambda: None, x.device)
    again = graph.Graph(lambda: x * 2, lambda: None, x.device)  # a capture that failed leaves nothing behind
    x.fill_(4)
    again.run()
    assert again.result.tolist() == [8, 8, 8]


@pytest.mark.skipif(where.on_the_cpu(), reason="captures a real CUDA graph, which needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_of_training_as_a_graph(name: str) -> None:
    """Loss and gradients of a replay are bit for bit those of a step that wasn't captured, whatever the batch."""
    made, generator = model(name, torch.bfloat16).train(), torch.Generator().manual_seed(3)
    batches = [torch.randint(97, (2, 3, 40), generator=generator).cuda() for _ in range(3)]
    ids, targets = batches[0].clone().unbind()

    def step(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        made.zero_grad()
        loss = made.loss(ids, targets)
        loss.backward()
        return loss.detach()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step(ids, targets)
    torch.cuda.current_stream().wait_stream(aside)
    made.zero_grad()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = step(ids, targets)
    grads = [p.grad for p in made.parameters()]
    for batch in batches:
        ids.copy_(batch[0])
        targets.copy_(batch[1])
        captured.replay()
        found = [loss.clone(), *(g.clone() for g in grads if g is not None)]
        wanted = step(*batch)
        own = [p.grad for p in made.parameters()]
        assert len(found) == len(own) + 1
        assert all(torch.equal(a, b) for a, b in zip(found, [wanted, *own]) if b is not None)


@pytest.mark.skipif(where.on_the_cpu(), reason="captures a real CUDA graph, which needs a GPU")
def test_ignored_targets_and_dropout_in_a_captured_loss() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(90, 64, device="cuda"), torch.randn(97, 64, device="cuda", requires_grad=True)
    target = torch.randint(97, (90,), device="cuda")
    target[::3] = -100
    x[::3] = torch.nan

    def loss() -> torch.Tensor:
        return ops.linear_cross_entropy(x, weight, target)

    [wanted] = torch.autograd.grad(loss(), weight)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        value = loss()
        [found] = torch.autograd.grad(value, weight)
    captured.replay()
    assert torch.allclose(value, loss(), rtol=1e-6)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)  # the sums over rows have other blocks
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum()
        with pytest.raises(RuntimeError, match="each replay would drop the same"):
            ops.layer_norm(x, weight[0], dropout_p=0.5, seed=1)
