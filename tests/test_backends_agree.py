"""Whole models on Triton's kernels, beside the reference and the CPU's: the same tokens, and losses within tolerance.

In the session where kernels are interpreted, and on a GPU; small enough for the first, where a decode step of two
layers takes half a second.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gptfast.generate import LanguageModel
from gptfast.kernels import reason_missing
from gptfast.layers import Linear
from gptfast.model import GPT, GPTConfig
from gptfast.ops.spec import tolerance
from gptfast.quantize import GROUP, QuantizedWeight
from gptfast.train.optim import AdamW
from tests import where

V, PROMPT = 64, [1, 5, 9, 33]
LLAMA: dict[str, Any] = dict(norm="rms_norm", positions="rope", activation="swiglu", n_kv_head=1)
LLAMA |= dict(qkv_bias=False, out_bias=False, mlp_bias=False)
FAMILIES: dict[str, dict[str, Any]] = {"gpt2": {}, "llama": LLAMA}
pytestmark = pytest.mark.skipif("triton" not in where.backends(), reason="Triton's kernels don't run in this session")


def model(family: str, layers: int) -> GPT:
    torch.manual_seed(0)
    made = GPT(GPTConfig(family, n_layer=layers, n_head=2, n_embd=32, vocab_size=V, context=48, **FAMILIES[family]))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(4)  # the initial weights make nearly uniform distributions
    return made


def on(backend: str, made: GPT) -> GPT:
    """A copy whose every op is this backend's."""
    mine = copy.deepcopy(made).to(where.device if backend == "triton" else "cpu")
    mine.backend = backend
    return mine


def backends() -> list[str]:
    return ["triton"] if reason_missing("cpu") is not None else ["triton", "cpu"]


def check_tokens(made: GPT, prompts: list[list[int]], **settings: Any) -> None:
    """Each backend writes the reference's tokens, and of the first text its logits are within the tolerance that the
    reference's own rounding gives (but for int8 activations, which round what differs in its last bit otherwise)."""
    made = made.eval()
    wanted = LanguageModel(on("reference", made)).generate(prompts, **settings)
    assert len({token for g in wanted for token in g.token_ids}) > 3, "a model that writes one token shows little"
    text = torch.tensor([prompts[0] + wanted[0].token_ids])
    quantised = any(isinstance(getattr(module, "weight", None), QuantizedWeight) for module in made.modules())
    with torch.no_grad():
        plain = on("reference", made)(text)
        exact = None if quantised else on("reference", made).double().logits(text)
    for backend in backends():
        mine = on(backend, made)
        found = LanguageModel(mine).generate(prompts, **settings)
        assert [g.token_ids for g in found] == [g.token_ids for g in wanted], backend
        if exact is not None:
            with torch.no_grad():
                logits = mine(text.to(mine.device)).cpu()
            assert (logits.double() - exact).abs().max().item() <= tolerance(plain, exact), backend


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_greedy_tokens(family: str) -> None:
    check_tokens(model(family, 2), [PROMPT], max_new_tokens=32, temperature=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_sampled_tokens_for_fifty_seeds(family: str) -> None:
    check_tokens(model(family, 2), [PROMPT] * 50, max_new_tokens=3, temperature=0.9, seed=list(range(50)))


@pytest.mark.parametrize("kind", ["q8_0", "q4_1"])
def test_quantised_weights_give_the_same_tokens(kind: str) -> None:
    """With activations rounded to int8, as they are unless asked otherwise."""
    made = model("llama", 1)
    for module in made.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, Linear) and isinstance(weight, torch.Tensor) and module.in_features % GROUP == 0:
            module.set_weight(QuantizedWeight.quantize(weight.detach(), kind))
    check_tokens(made, [PROMPT], max_new_tokens=10, temperature=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_training_steps_give_the_same_losses(family: str) -> None:
    made = model(family, 1)
    g = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, V, (2, 8), generator=g) for _ in range(10)]

    def losses(mine: GPT) -> torch.Tensor:
        optimizer = AdamW(mine.parameters(), lr=1e-2, max_norm=1.0, backend=mine.backend)
        found = []
        for batch in batches:
            ids = batch.to(mine.device)
            loss = mine.loss(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach().cpu())
        return torch.stack(found)

    plain, exact = losses(on("reference", made)), losses(on("reference", made).double())
    assert exact[-1] != exact[0]
    for backend in backends():
        worst = (losses(on(backend, made)).double() - exact).abs().max().item()
        assert worst <= tolerance(plain, exact), f"{backend}: {worst:.3g} from the losses in fp64"
