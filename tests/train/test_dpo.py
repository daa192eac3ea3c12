"""DPO: losses against the papers' formulas, rewards, the reference's log-probs, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast.model import GPT
from gptfast.train.dpo import DPO, DPOConfig
from gptfast.train.lora import LoRAConfig, add_lora
from gptfast.train.trainer import Trainer, make_optimizer
from tests.train import oracles, tiny

QUIET: dict[str, Any] = dict(eval_every=0, save_every=0, warmup=0)


def sum_of_logprobs(model: GPT, prompt: list[int], answer: list[int]) -> float:
    """Without packing, by the whole vocabulary's logits."""
    ids = [*prompt, *answer]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, len(prompt) - 1 : -1]
    return float(oracles.logprobs(logits.numpy(), answer, 1.0)[0].sum())


@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [("sigmoid", 0.0), ("sigmoid", 0.2), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)],
)
@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
def test_the_loss_and_its_figures(kind: str, smoothing: float, llama: bool) -> None:
    model, reference = tiny.model(1, llama=llama), tiny.model(2, llama=llama)
    config = DPOConfig(batch_size=5, beta=0.3, kind=kind, label_smoothing=smoothing, lr=0.0, micro_tokens=80, **QUIET)
    stage = DPO(config, model, tiny.tokenizer(), tiny.pairs(5), reference=reference)
    rows = stage.order.batch(0, 5)
    p = stage.pairs
    sums = [
        [sum_of_logprobs(m, p.prompts[i], a) for m in (model, reference) for a in (p.chosen[i], p.rejected[i])]
        for i in rows
    ]
    losses = [oracles.dpo(kind, c, r, rc, rr, 0.3, smoothing) for c, r, rc, rr in sums]
    found = stage.step(0, make_optimizer(stage.modules, config))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=2e-5, abs=1e-5)
    chosen = np.mean([0.3 * (c - rc) for c, _, rc, _ in sums])
    rejected = np.mean([0.3 * (r - rr) for _, r, _, rr in sums])
    assert found["rewards/chosen"] == pytest.approx(chosen, abs=1e-4)
    assert found["rewards/rejected"] == pytest.approx(rejected, abs=1e-4)
    assert found["rewards/margin"] == pytest.approx(chosen - rejected, abs=1e-4)
    assert found["rewards/accuracy"] == pytest.approx(np.mean([c - rc > r - rr for c, r, rc, rr in sums]))
    assert found["logps/chosen"] == pytest.approx(np.mean([s[0] for s in sums]), abs=1e-3)


def test_the_first_loss_is_log_2() -> None:
    config = DPOConfig(batch_size=8, **QUIET)
    stage = DPO(config, tiny.model(), tiny.tokenizer(), tiny.pairs(8))
    found = stage.step(0, make_optimizer(stage.modules, config))
    assert found["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert found["rewards/margin"] == pytest.approx(0, abs=1e-6)


def test_it_tells_answers_apart(tmp_path: Path) -> None:
    config = DPOConfig(steps=30, lr=1e-3, batch_size=16, **QUIET)
    stage = DPO(config, tiny.model(), tiny.tokenizer(), tiny.pairs(160), tiny.pairs(40, seed=1))
    before = [p.clone() for p in stage.reference.model.parameters()]
    found = Trainer(stage, tmp_path, quiet=True).run().evaluation
    assert found["rewards/accuracy"] >= 0.95 and found["rewards/margin"] > 0.5
    assert found["rewards/accuracy_low"] <= found["rewards/accuracy"] <= found["rewards/accuracy_high"]
    assert all(torch.equal(a, b) for a, b in zip(before, stage.reference.model.parameters())), "the reference stays"


def test_the_reference_is_asked_once_or_each_time_with_one_result() -> None:
    traces = []
    for reference in ("once", "step"):
        config = DPOConfig(steps=4, lr=1e-3, batch_size=5, reference=reference, **QUIET)
        stage = DPO(config, tiny.model(), tiny.tokenizer(), tiny.pairs(7))
        asked = []
        hook = stage.reference.model.norm.register_forward_hook(lambda *_, asked=asked: asked.append(1))
        optimizer = make_optimizer(stage.modules, config)
        traces.append(([stage.step(i, optimizer)["loss"] for i in range(4)], len(asked)))
        hook.remove()
    assert traces[0][0] == traces[1][0]
    assert traces[0][1] < traces[1][1]


def test_what_is_packed_beside_a_pair_changes_nothing() -> None:
    stage = DPO(DPOConfig(**QUIET), tiny.model(), tiny.tokenizer(), tiny.pairs(6))
    together = stage.reference_sums(stage.pairs, range(6)).view(6, 2)
    other = DPO(DPOConfig(**QUIET), tiny.model(), tiny.tokenizer(), tiny.pairs(6))
    assert torch.equal(other.reference_sums(other.pairs, [4, 1]).view(2, 2), together[[4, 1]])


def test_label_smoothing_beside_a_loss_without_it() -> None:
    with pytest.raises(ValueError, match="expected label_smoothing 0 with ipo, got 0"):
        DPO(DPOConfig(kind="ipo", label_smoothing=0.1), tiny.model(), tiny.tokenizer(), tiny.pairs(2))


def test_adapters_are_their_own_reference() -> None:
    config = DPOConfig(batch_size=6, lr=1e-2, **QUIET)
    stage = DPO(config, add_lora(tiny.model(), LoRAConfig(rank=4)), tiny.tokenizer(), tiny.pairs(6))
    assert stage.reference.model is stage.model
    before = stage.reference_sums(stage.pairs, range(6))
    optimizer = make_optimizer(stage.modules, config)
    margins = [stage.step(i, optimizer)["rewards/margin"] for i in range(8)]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.1
    stage._known.clear()
    assert torch.equal(before, stage.reference_sums(stage.pairs, range(6))), "without its adapters it is what it was"
