"""The losses beside those of TRL's trainers, where TRL is installed (`pip install trl`; written against 1.16).

TRL has its formulas inside of trainers' methods. Each is called here on a stand-in that has what the method reads, and
on a model that answers with given log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from importlib import import_module as module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.ops.advantages import GROUP_KINDS
from tests.train import oracles

trl: Any = pytest.importorskip("trl", minversion="1.16")

WIDTHS = (7, 3, 5, 1, 6)  # tokens of each completion
PROMPT = 2
random = torch.Generator().manual_seed(5)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=random) * scale


class OneProcess:
    """What a loss asks of an Accelerator, where there is one process."""

    device, num_processes, sync_gradients, parallelism_config = torch.device("cpu"), 1, True, None

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)

    def gather(self, x: Tensor) -> Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: Tensor, reduction: str) -> Tensor:
        return x


class Trainer(SimpleNamespace):
    """A trainer's fields; those that are not given are off."""

    def __init__(self, **fields: Any) -> None:
        args = fields.pop("args", {})
        common = dict(
            accelerator=OneProcess(), model=SimpleNamespace(training=False), aux_loss_enabled=False, _tp_size=1,
            _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, _total_train_tokens=0,
            args=SimpleNamespace(gradient_checkpointing_kwargs=None, **args),
        )  # fmt: skip
        super().__init__(**(common | fields))


def rows(n: int = len(WIDTHS), scale: float = 0.5) -> tuple[Tensor, Tensor]:
    """Log-probabilities of n completions side by side, 0 beyond each one's end, and which are its tokens."""
    width = max(WIDTHS)
    keep = torch.arange(width) < torch.tensor([WIDTHS[i % len(WIDTHS)] for i in range(n)])[:, None]
    return torch.where(keep, -normal(n, width).abs() - 0.1, 0.0) * scale, keep


def answers(logprobs: Tensor) -> SimpleNamespace:
    """A forward pass of a model of TRL's, which gives these log-probabilities to the last tokens."""
    whole = torch.cat([logprobs.new_zeros(len(logprobs), PROMPT - 1), logprobs], 1)
    empty = torch.zeros_like(whole)
    return SimpleNamespace(
        log_probs=whole, entropy=empty, mean_logits=empty, is_top1=empty.bool(), log_sum_sq_probs=empty
    )


def inputs_of(keep: Tensor) -> dict[str, Tensor]:
    completion = torch.cat([keep.new_zeros(len(keep), PROMPT), keep], 1).long()
    ones = torch.ones_like(completion)
    return {"input_ids": ones, "attention_mask": ones, "completion_mask": completion}


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("kind", "smoothing"), [("sigmoid", 0.0), ("robust", 0.2), ("ipo", 0.0), ("hinge", 0.0)])
def test_dpo(kind: str, smoothing: float) -> None:
    n = len(WIDTHS)
    (ours, keep), (reference, _) = rows(2 * n), rows(2 * n)
    leaf = ours.clone().requires_grad_()
    trainer = Trainer(
        beta=0.3, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
        loss_weights=[1.0], label_smoothing=smoothing, use_weighting=False,
    )  # fmt: skip
    sums = reference.sum(1)
    given = inputs_of(keep) | {"ref_chosen_logps": sums[:n], "ref_rejected_logps": sums[n:]}
    theirs = trl.DPOTrainer._compute_loss(trainer, lambda **_: answers(leaf), given, False)
    (their_gradient,) = torch.autograd.grad(theirs, leaf)

    a, b = (leaf.sum(1), sums) if kind != "ipo" else (leaf.sum(1) / keep.sum(1), sums / keep.sum(1))
    mine, chosen, rejected = ops.dpo_loss(a[:n], a[n:], b[:n], b[n:], beta=0.3, kind=kind, label_smoothing=smoothing)
    (my_gradient,) = torch.autograd.grad(mine, leaf)
    same(mine, theirs)
    same(my_gradient, their_gradient)
    if kind != "ipo":  # whose rewards TRL logs of sums
        figures = trainer._metrics["eval"]
        same(chosen.mean(), torch.tensor(figures["rewards/chosen"][0]))
        same(rejected.mean(), torch.tensor(figures["rewards/rejected"][0]))
    pairs = zip(a[:n].tolist(), a[n:].tolist(), b[:n].tolist(), b[n:].tolist())
    oracle = [oracles.dpo(kind, c, r, rc, rr, 0.3, smoothing) for c, r, rc, rr in pairs]
    assert sum(oracle) / n == pytest.approx(theirs.item(), abs=2e-6)


@pytest.mark.parametrize("margin", [False, True], ids=["", "margin"])
@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_reward(margin: bool, centring: float) -> None:
    scores, apart = normal(2 * 9, 1, scale=2).requires_grad_(), normal(9).abs()
    trainer = Trainer(args={"center_rewards_coefficient": centring or None})
    given = {"input_ids": torch.ones(18, 4), "attention_mask": torch.ones(18, 4)}
    given |= {"margin": apart} if margin else {}
    theirs = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), given)
    flat = scores[:, 0]
    mine = ops.reward_loss(flat[:9], flat[9:], margin=apart if margin else None, centring=centring)
    same(mine, theirs)
    same(*(torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (mine, theirs)))
    pairs = zip(flat[:9].tolist(), flat[9:].tolist(), apart.tolist())
    oracle = [oracles.bradley_terry(c, r, m if margin else 0.0, centring) for c, r, m in pairs]
    assert sum(oracle) / 9 == pytest.approx(theirs.item(), abs=2e-6)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo"])
def test_policy(kind: str, beta: float) -> None:
    """TRL's "bnpo" is a mean over the batch's tokens, its "grpo" one over answers of each answer's mean."""
    new, keep = rows()
    old, reference = (torch.where(keep, new + normal(*new.shape, scale=0.3), 0.0) for _ in range(2))
    A, leaf, longest = normal(len(WIDTHS)), new.clone().requires_grad_(), 11
    trainer = Trainer(
        beta=beta, epsilon_low=0.2, epsilon_high=0.28, loss_type=kind, importance_sampling_level="token",
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, max_completion_length=longest,
        current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        args={"delta": None, "use_bias_correction_kl": False},
        _get_per_token_logps_and_entropies=lambda *_, **__: (leaf, torch.zeros_like(leaf), None),
    )  # fmt: skip
    ids = torch.ones(len(WIDTHS), PROMPT, dtype=torch.long)
    given = dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=keep.long(), completion_mask=keep.long(), advantages=A,
        old_per_token_logps=old, ref_per_token_logps=reference,
    )  # fmt: skip
    theirs = trl.GRPOTrainer._compute_loss(trainer, None, given)
    mine = ops.policy_loss(
        leaf, old, A, keep, clip=0.2, clip_high=0.28, reference_logprobs=reference, beta=beta,
        normalise="sequences" if kind == "grpo" else "tokens",
        denominator=float(len(WIDTHS) * longest) if kind == "dr_grpo" else None,
    )  # fmt: skip
    same(mine.loss, theirs)
    same(*(torch.autograd.grad(loss, leaf)[0] for loss in (mine.loss, theirs)))
    figures = trainer._metrics["eval"]
    same(mine.clip_fraction, torch.tensor(figures["clip_ratio/region_mean"][0]))
    assert mine.clip_fraction > 0
    if beta:
        same(mine.kl, torch.tensor(figures["kl"][0]))
    if kind == "bnpo":
        each = []
        for i, n in enumerate(WIDTHS):
            token, before, base = (x[i, :n].double().numpy() for x in (new, old, reference))
            clipped, _ = oracles.policy_loss(token, before, A[i].item(), 0.2, 0.28)
            each.append(clipped + beta * oracles.kl("k3", token, base))
        assert sum(e.sum() for e in each) / sum(WIDTHS) == pytest.approx(theirs.item(), abs=2e-6)


def test_kto() -> None:
    ours, keep = rows()
    reference, other, other_reference = (rows()[0] for _ in range(3))
    leaf, good = ours.clone().requires_grad_(), torch.tensor([True, False, False, True, False])
    trainer = Trainer(
        beta=0.2, precompute_ref_logps=True, calculate_KL=True, loss_type="kto", desirable_weight=1.3,
        undesirable_weight=0.7, _compute_kl_logps=lambda *_: other.sum(1),
    )  # fmt: skip
    given: dict[str, Any] = inputs_of(keep) | {"label": good, "ref_logps": reference.sum(1)}
    given["ref_KL_logps"] = other_reference.sum(1)
    theirs = trl.KTOTrainer._compute_loss(trainer, lambda **_: answers(leaf), given, False)
    mine, _ = ops.kto_loss(
        leaf.sum(1), reference.sum(1), good, kl=other.sum(1) - other_reference.sum(1), beta=0.2,
        desirable_weight=1.3, undesirable_weight=0.7,
    )  # fmt: skip
    same(mine, theirs)
    same(*(torch.autograd.grad(loss, leaf)[0] for loss in (mine, theirs)))


def test_simpo() -> None:
    chosen, rejected = -normal(2, 9).abs()
    trainer = Trainer(alpha=0.0, beta=2.0, simpo_gamma=1.0, loss_type="simpo", label_smoothing=0.0)
    theirs, *rewards = module("trl.experimental.cpo").CPOTrainer.cpo_loss(trainer, chosen, rejected)
    mine, *mine_rewards = ops.simpo_loss(chosen, rejected, beta=2.0, gamma=1.0, reduction="none")
    same(mine, theirs)
    for a, b in zip(mine_rewards, rewards):
        same(a, b)


def test_orpo() -> None:
    chosen, rejected = -normal(2, 9).abs() - 0.01
    theirs = module("trl.experimental.orpo").ORPOTrainer.odds_ratio_loss(Trainer(beta=0.1), chosen, rejected)[0]
    same(ops.orpo_loss(chosen, rejected, reduction="none") * 0.1, -theirs)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_advantages_have_trls_divisor(kind: str) -> None:
    """TRL's are in the midst of its rollouts; its helper for the deviation is what can differ (n - 1, not n)."""
    rewards = normal(6, 4)
    centred = rewards - rewards.mean(1, keepdim=True)
    wanted = {
        "grpo": centred / (module("trl.trainer.utils").nanstd(rewards, dim=1)[:, None] + 1e-4),
        "dr_grpo": centred,
        "rloo": centred * 4 / 3,
    }[kind]
    same(ops.group_advantages(rewards.flatten(), 4, kind=kind), wanted.flatten())
