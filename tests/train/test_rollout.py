"""Rollouts: what one seed writes is the same in every company, and comes from the weights of the moment."""

from __future__ import annotations

import copy

import pytest
import torch

from gptfast.kernels import reason_missing
from gptfast.train.lora import LoRAConfig, add_lora, lora_parameters, merge_lora
from gptfast.train.packing import pack
from gptfast.train.rollout import Rollout, inference_copy
from gptfast.train.sequences import completion_logprobs, pack_completions
from tests.train import tiny

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7], [20, 21]]


@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
@pytest.mark.parametrize("packed", [False, None], ids=["live", "packed"])
def test_batched_rollouts_are_those_of_one_by_one(llama: bool, packed: bool | None) -> None:
    rollout = Rollout(tiny.model(llama=llama), tiny.tokenizer(), packed=packed)
    together = rollout(PROMPTS, n=2, seed=3, step=4, max_new_tokens=20)
    assert len(together) == 10 and together.sources == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for i in range(10):
        alone = rollout([PROMPTS[i // 2]], seed=3, step=4, first=i, max_new_tokens=20)
        assert alone.responses == [together.responses[i]]
        assert alone.logprobs == [together.logprobs[i]]
    assert together.responses[0] != together.responses[1], "two answers to one prompt have two seeds"
    assert together.responses[0] != together.responses[6], "and so have two places of one prompt"


def test_every_step_and_seed_writes_something_else() -> None:
    rollout = Rollout(tiny.model(), tiny.tokenizer())
    found = [rollout(PROMPTS, seed=s, step=t, max_new_tokens=20).responses for s, t in ((0, 0), (0, 1), (1, 0))]
    assert found[0] != found[1] and found[0] != found[2] and found[1] != found[2]
    assert found[0] == rollout(PROMPTS, seed=0, step=0, max_new_tokens=20).responses


@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
def test_rollouts_follow_the_weights(llama: bool) -> None:
    """What was packed and recorded before a step of the optimiser is not used after it."""
    model = tiny.model(llama=llama)
    rollout = Rollout(model, tiny.tokenizer())
    before = rollout(PROMPTS, seed=1, max_new_tokens=24)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(5)) * 0.05)
    after = rollout(PROMPTS, seed=1, max_new_tokens=24)
    assert after.responses != before.responses
    assert after.responses == Rollout(model, tiny.tokenizer())(PROMPTS, seed=1, max_new_tokens=24).responses
    for p in model.parameters():  # elsewhere in memory
        p.data = p.detach().clone() + 0.01
    moved = rollout(PROMPTS, seed=1, max_new_tokens=24)
    assert moved.responses == Rollout(model, tiny.tokenizer())(PROMPTS, seed=1, max_new_tokens=24).responses


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_samplers_log_probs_are_the_training_forwards(temperature: float) -> None:
    model = tiny.model()
    made = Rollout(model, tiny.tokenizer())(PROMPTS, n=3, max_new_tokens=30, temperature=temperature)
    with torch.no_grad():
        packed = pack_completions(made.prompts, made.responses)
        mine = completion_logprobs(model, packed, temperature)
    sampled = torch.tensor([x for row in made.logprobs for x in row])
    torch.testing.assert_close(sampled, mine, atol=2e-5, rtol=0)


def test_a_model_stays_as_it_is() -> None:
    model = tiny.model(dropout=0.5).train()
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = Rollout(model)([[1, 2, 3]], max_new_tokens=10)
    assert model.training and first.texts == [""]
    assert all(torch.equal(p, state[name]) and p.requires_grad for name, p in model.named_parameters())
    assert first.responses == Rollout(model.eval())([[1, 2, 3]], max_new_tokens=10).responses, "no dropout"


def test_ends_and_lengths() -> None:
    tokens = tiny.tokenizer()
    made = Rollout(tiny.model(), tokens)(PROMPTS, n=40, max_new_tokens=60)
    for response, finish, ended, text in zip(made.responses, made.finishes, made.ended, made.texts):
        assert ended == (response[-1] == tokens.eos_id) == (finish == "stop")
        assert tokens.eos_id not in response[:-1] and (ended or len(response) == 60)
        assert text == tokens.decode(response)
    assert any(made.ended) and not all(made.ended)


def test_an_inference_copy_shares_what_it_does_not_pack() -> None:
    if (reason := reason_missing("cpu")) is not None:
        pytest.skip(reason)
    model = tiny.model()
    copy = inference_copy(model)
    assert copy.embedding.weight is model.embedding.weight
    assert copy.norm.weight is model.norm.weight
    ids = torch.randint(260, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(copy(ids), model.eval()(ids), atol=1e-5, rtol=1e-5)


def test_wrong_arguments_are_named() -> None:
    rollout = Rollout(tiny.model())
    with pytest.raises(ValueError, match="expected prompts and n >= 1"):
        rollout([], n=1)
    with pytest.raises(ValueError, match="expected as many completions as prompts"):
        pack_completions([[1]], [[]])
    assert pack([[1, 2]]).learnt == 1


@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
def test_rollouts_with_adapters(llama: bool) -> None:
    """They are those of the model that the adapters are merged into, today's each time."""
    model = add_lora(tiny.model(llama=llama), LoRAConfig(rank=2))
    rollout = Rollout(model, tiny.tokenizer())
    for seed in (1, 2):
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in lora_parameters(model).values():
                p.copy_(torch.randn(p.shape, generator=random) * 0.1)
        merged = merge_lora(copy.deepcopy(model))
        made = rollout(PROMPTS, seed=3, max_new_tokens=20)
        assert made.responses == Rollout(merged, tiny.tokenizer())(PROMPTS, seed=3, max_new_tokens=20).responses
        with torch.no_grad():
            mine = completion_logprobs(model, pack_completions(made.prompts, made.responses))
        sampled = torch.tensor([x for row in made.logprobs for x in row])
        torch.testing.assert_close(sampled, mine, atol=1e-4, rtol=0)
