"""PPO and GRPO against the papers' formulas, that they learn, and that a stopped run goes on as it would have."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast.model import GPT
from gptfast.train.grpo import GRPO, GRPOConfig
from gptfast.train.online import Experience, Online
from gptfast.train.parallel import World
from gptfast.train.ppo import PPO, STATISTICS, KLController, PPOConfig
from gptfast.train.reward_model import RewardEnsemble, RewardModel
from gptfast.train.sequences import row_parts
from gptfast.train.trainer import Trainer, make_optimizer
from gptfast.train.verify import arithmetic_prompts, arithmetic_reward
from tests.train import oracles, tiny

QUIET: dict[str, Any] = dict(eval_every=0, save_every=0)
PROMPTS = [tiny.user(w) for w in ("ab", "c", "defg", "hi", "jklmno")]


def ppo(model: GPT | None = None, reward: Any = tiny.share_of_e, reference: GPT | None = None, **dials: Any) -> PPO:
    few: dict[str, Any] = dict(prompts_per_step=5, max_new_tokens=12, minibatches=2, epochs=2)
    config = PPOConfig(**(QUIET | few | dials))
    return PPO(config, model or tiny.model(), tiny.tokenizer(), PROMPTS, reward, reference=reference)


def two_judges() -> RewardEnsemble:
    return RewardEnsemble([RewardModel(tiny.model(i), i) for i in (3, 4)])


def nudge(model: torch.nn.Module, by: float = 0.02, seed: int = 9) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=random) * by)


def logits_of(model: GPT, prompt: list[int], response: list[int]) -> Any:
    """What each token of a response was drawn from, without packing."""
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *response]]))[0, len(prompt) - 1 : -1].numpy()


def values_of(stage: PPO, prompt: list[int], response: list[int]) -> Any:
    with torch.no_grad():
        hidden = stage.value.backbone.hidden(torch.tensor([[*prompt, *response]]))[0, len(prompt) - 1 : -1]
        weight, bias = stage.value.score.weight, stage.value.score.bias
        assert isinstance(weight, torch.Tensor) and bias is not None
        return (hidden @ weight[0] + bias).numpy().astype(np.float64)


def f64(row: torch.Tensor) -> Any:
    return np.array(row.tolist(), np.float64)


def close(mine: Any, wanted: Any, tolerance: float = 3e-5) -> None:
    np.testing.assert_allclose(np.asarray(mine, np.float64), np.asarray(wanted), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_the_models_think_of_the_answers(temperature: float) -> None:
    stage = ppo(tiny.model(1), temperature=temperature, reference=tiny.model(2), samples_per_prompt=2)
    made, _ = stage.gather(0)
    assert len(made) == 10
    for i in range(10):
        prompt, response = made.prompts[i], made.responses[i]
        logprobs, entropy = oracles.logprobs(logits_of(stage.model, prompt, response), response, temperature)
        close(made.logprobs[i], logprobs)
        close(made.entropy[i], entropy)
        reference, _ = oracles.logprobs(logits_of(stage.reference.model, prompt, response), response, temperature)
        close(made.reference[i], reference)
        close(made.values[i], values_of(stage, prompt, response))
        text = stage.tokenizer.decode(response)
        assert made.scores[i] == pytest.approx(text.count("e") / max(1, len(text)))
    found = stage.objective(made)
    kls = [np.sum(np.asarray(a, np.float64) - np.asarray(b, np.float64)) for a, b in zip(made.logprobs, made.reference)]
    assert found["objective/kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    assert found["objective/entropy"] == pytest.approx(np.mean(np.concatenate(made.entropy)), abs=1e-5)
    assert found["objective/score"] == pytest.approx(np.mean(made.scores), abs=1e-6)
    assert found["objective/ended"] == np.mean(made.ended)
    assert found["objective/length"] == pytest.approx(np.mean([len(r) for r in made.responses]))
    assert 0 < found["objective/sampler_gap"] < 1e-4


def by_hand(stage: PPO, made: Experience) -> tuple[list[Any], list[Any], list[float], list[float]]:
    """Advantages and returns as RECIPE's PPO has them, the sums of the KL part and the scores."""
    c = stage.config
    rewards, penalties, scores = [], [], []
    for i in range(len(made)):
        per_token = -stage.controller.beta * oracles.kl(c.kl, *(f64(x[i]) for x in (made.logprobs, made.reference)))
        score = made.scores[i] - c.caution * made.doubts[i]
        score = score if not c.score_clip else max(-c.score_clip, min(c.score_clip, score))
        if not made.ended[i]:
            score -= c.missing_end_penalty
        penalties.append(per_token.sum())
        per_token[-1] += score
        scores.append(score)
        rewards.append(per_token)
    if c.whiten_rewards:
        flat = oracles.whiten(np.concatenate(rewards), shift_mean=False)
        rewards = np.split(flat, np.cumsum([len(r) for r in rewards])[:-1])
    both = [oracles.gae(r, f64(v), c.gamma, c.lam) for r, v in zip(rewards, made.values)]
    flat = np.concatenate([a for a, _ in both])
    if c.whiten_advantages:
        flat = oracles.whiten(flat)
    return np.split(flat, np.cumsum(made.lengths)[:-1]), [r for _, r in both], penalties, scores


@pytest.mark.parametrize(
    "dials",
    [
        {},
        {"kl": "k3", "beta": 0.3, "gamma": 0.9, "lam": 0.8},
        {"whiten_rewards": True, "whiten_advantages": False, "missing_end_penalty": 0.0},
        {"score_clip": 0.05, "whiten_advantages": False},
        {"score_clip": 0.0, "lam": 1.0},
        {"caution": 2.0, "score_clip": 0.5, "whiten_advantages": False},
    ],
    ids=str,
)
def test_advantages(dials: dict[str, Any]) -> None:
    reward = two_judges() if "caution" in dials else tiny.share_of_e
    stage = ppo(tiny.model(1), reward, reference=tiny.model(2), samples_per_prompt=3, **dials)
    made, _ = stage.gather(0)
    assert any(made.doubts) == ("caution" in dials)
    assert any(made.ended) or not dials.get("missing_end_penalty", 1)
    advantages, returns, found = stage.advantages(made)
    wanted_A, wanted_R, penalties, scores = by_hand(stage, made)
    for i, n in enumerate(made.lengths):
        close(advantages[i, :n], wanted_A[i], 1e-4)
        close(returns[i, :n], wanted_R[i], 1e-4)
        assert not advantages[i, n:].any()
    assert found["objective/non_score_reward"] == pytest.approx(np.mean(penalties), abs=1e-4)
    assert found["objective/rlhf_reward"] == pytest.approx(np.mean(penalties) + np.mean(scores), abs=1e-4)
    R = np.concatenate(wanted_R)
    off = R - np.concatenate([f64(v) for v in made.values])
    assert found["value/explained_variance"] == pytest.approx(1 - off.var() / R.var(), abs=1e-3)


def test_the_loss_and_its_statistics() -> None:
    """After the policy has moved: ratios, clipping, values, entropy, all of one minibatch."""
    stage = ppo(tiny.model(1), reference=tiny.model(2), samples_per_prompt=3, clip=0.1, value_clip=0.05,
                value_coefficient=0.7, entropy_coefficient=0.3)  # fmt: skip
    made, _ = stage.gather(0)
    wanted_A, wanted_R, _, _ = by_hand(stage, made)
    nudge(stage.model)
    nudge(stage.value)
    rows = [3, 0, 7, 11]
    count = sum(len(made.responses[i]) for i in rows)
    columns = [
        made.logprobs,
        [torch.tensor(a, dtype=torch.float32) for a in wanted_A],
        made.values,
        [torch.tensor(r, dtype=torch.float32) for r in wanted_R],
    ]
    old, advantages, values, returns = (torch.cat([c[i] for i in rows]) for c in columns)
    loss, found = stage.loss(made.pack(rows), old, advantages, values, returns, count)

    losses, ratios, clipped, squares, entropies, moved = [], [], [], [], [], []
    for i in rows:
        new, entropy = oracles.logprobs(
            logits_of(stage.model, made.prompts[i], made.responses[i]), made.responses[i], 1.0
        )
        old, values = f64(made.logprobs[i]), values_of(stage, made.prompts[i], made.responses[i])
        l, c = oracles.policy_loss(new, old, wanted_A[i], 0.1, 0.1)
        losses.append(l)
        clipped.append(c)
        ratios.append(np.exp(new - old))
        entropies.append(entropy)
        squares.append(oracles.value_loss(values, f64(made.values[i]), wanted_R[i], 0.05))
        before = f64(made.values[i])
        cut = before + np.clip(values - before, -0.05, 0.05)
        moved.append((cut - wanted_R[i]) ** 2 > (values - wanted_R[i]) ** 2)
    l, r, c, s, e, m = (np.concatenate(x) for x in (losses, ratios, clipped, squares, entropies, moved))
    assert loss.item() == pytest.approx(l.mean() + 0.7 * s.mean() - 0.3 * e.mean(), abs=1e-4)
    named = dict(zip(STATISTICS, found.tolist()))
    assert named["policy/loss"] == pytest.approx(l.mean(), abs=1e-4)
    assert named["value/loss"] == pytest.approx(s.mean(), rel=1e-3)
    assert named["policy/approxkl"] == pytest.approx((r - 1 - np.log(r)).mean(), abs=1e-5)
    assert named["policy/clipfrac"] == pytest.approx(c.mean(), abs=1e-6) and 0 < c.mean() < 1
    assert named["value/clipfrac"] == pytest.approx(m.mean(), abs=1e-6) and 0 < m.mean() < 1
    assert named["policy/ratio_mean"] == pytest.approx(r.mean(), abs=1e-4)
    assert named["policy/ratio_var"] == pytest.approx((r**2).mean(), abs=1e-4)


def test_micro_batches_and_their_order_change_nothing() -> None:
    """The gradient and the statistics of a minibatch are those of its whole, whatever is computed at once."""
    grads, statistics = [], []
    for micro in (40, 10_000):
        stage = ppo(tiny.model(1), reference=tiny.model(2), micro_tokens=micro, lr=0.0, epochs=1, minibatches=1)
        optimizer = make_optimizer(stage.modules, stage.config)
        nudge(stage.value)
        statistics.append(stage.step(0, optimizer))
        grads.append(torch.cat([p.grad.flatten() for p in stage.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
    for name, value in statistics[0].items():
        if not name.startswith("time/"):
            assert value == pytest.approx(statistics[1][name], rel=1e-4, abs=1e-6), name
    stage = ppo(tiny.model(1))
    made, _ = stage.gather(0)
    with torch.no_grad(), torch.enable_grad():
        for i in range(len(made)):
            logprobs = stage.model.logprobs(
                *(x[None] for x in made.pack([i])[:2]), cu_seqlens=made.pack([i]).cu_seqlens
            )
            assert isinstance(logprobs, torch.Tensor)
            alone = logprobs[0][made.pack([i]).targets != -100]
            assert torch.equal(alone, made.logprobs[i]), "bit for bit, whatever is packed beside it"


def test_the_first_ratio_is_1() -> None:
    stage = ppo(lr=0.0, epochs=1)
    found = stage.step(0, make_optimizer(stage.modules, stage.config))
    assert found["policy/ratio_mean"] == 1 and found["policy/approxkl"] == 0 and found["policy/clipfrac"] == 0


def test_the_kl_controller() -> None:
    """Ziegler et al. (arXiv:1909.08593), section 2.2."""
    fixed = KLController(0.1)
    fixed.update(50.0, 100)
    assert fixed.beta == 0.1
    adaptive, beta = KLController(0.1, 6.0, 1000), 0.1
    for kl, n in ((6.3, 64), (100.0, 64), (0.0, 64), (5.5, 10)):
        adaptive.update(kl, n)
        beta *= 1 + np.clip(kl / 6.0 - 1, -0.2, 0.2) * n / 1000
        assert adaptive.beta == pytest.approx(beta, rel=1e-12)
    stage = ppo(reference=tiny.model(2), target_kl=1.0, kl_horizon=50)
    found = stage.step(0, make_optimizer(stage.modules, stage.config))
    assert found["objective/kl_coefficient"] == 0.05
    error = np.clip(found["objective/kl"] / 1.0 - 1, -0.2, 0.2)
    assert stage.state() == {"beta": pytest.approx(0.05 * (1 + error * 5 / 50))}
    with pytest.raises(ValueError, match="expected a number beta of at least 0"):
        stage.load_state({"beta": "x"})


# --- groups


def grpo(**dials: Any) -> GRPO:
    few: dict[str, Any] = dict(prompts_per_step=3, samples_per_prompt=4, max_new_tokens=10)
    config = GRPOConfig(**(QUIET | few | dials))
    return GRPO(config, tiny.model(1), tiny.tokenizer(), PROMPTS, tiny.share_of_e, reference=tiny.model(2))


@pytest.mark.parametrize(
    "dials",
    [
        {"beta": 0.2},
        {"beta": 0.2, "normalise": "sequences", "clip_high": 0.3},
        {"kind": "dr_grpo", "beta": 0.0},
        {"kind": "rloo", "beta": 0.1},
        {"beta": 0.1, "kl": "k1", "entropy_coefficient": 0.2},
    ],
    ids=str,
)
def test_grpo_and_its_relatives(dials: dict[str, Any]) -> None:
    stage = grpo(**dials)
    c, (made, _) = stage.config, stage.gather(0)
    scores = [s - (0.0 if e else c.missing_end_penalty) for s, e in zip(made.scores, made.ended)]
    if c.kind == "rloo":
        scores = [s - c.beta * float((f64(a) - f64(b)).sum()) for s, a, b in zip(scores, made.logprobs, made.reference)]
    wanted = np.concatenate([oracles.group(c.kind, np.array(scores[g : g + 4])) for g in range(0, 12, 4)])
    advantages = stage.advantages(made)
    close(advantages, wanted, 1e-4)

    nudge(stage.model)
    rows = [4, 5, 6, 7, 0, 1, 2, 3]
    lengths = [len(made.responses[i]) for i in rows]
    loss, _ = stage.loss(
        made.pack(rows),
        torch.cat([made.logprobs[i] for i in rows]),
        torch.cat([made.reference[i] for i in rows]),
        advantages[torch.tensor(rows)],
        torch.tensor(lengths),
        stage.denominator(lengths),
    )
    terms, entropies = [], []
    for i in rows:
        new, entropy = oracles.logprobs(
            logits_of(stage.model, made.prompts[i], made.responses[i]), made.responses[i], 1.0
        )
        l, _ = oracles.policy_loss(new, f64(made.logprobs[i]), wanted[i], c.clip, c.clip_high or c.clip)
        if c.kind != "rloo":
            l = l + c.beta * oracles.kl(c.kl, new, f64(made.reference[i]))
        terms.append(l)
        entropies.append(entropy)
    if c.kind == "dr_grpo":
        total = sum(l.sum() for l in terms) / (8 * c.max_new_tokens)
    elif c.normalise == "sequences":
        total = np.mean([l.mean() for l in terms])
    else:
        total = np.concatenate(terms).mean() - c.entropy_coefficient * np.concatenate(entropies).mean()
    assert loss.item() == pytest.approx(total, abs=1e-4)


def test_groups_stay_together() -> None:
    for rows in grpo(minibatches=3).minibatches(0, 0, 12, 4):
        assert len(rows) == 4 and len({i // 4 for i in rows}) == 1
    whole = [i for rows in ppo().minibatches(1, 0, 15) for i in rows]
    assert sorted(whole) == list(range(15)) and whole != list(range(15))


def test_every_process_has_its_rows_and_as_many_pieces() -> None:
    lengths = [5, 9, 2, 14, 7, 3, 8]
    for size in (1, 2, 3):
        parts = [row_parts(lengths, 10, World(rank, size)) for rank in range(size)]
        assert len({len(p) for p in parts}) == 1
        assert sorted(i for p in parts for piece in p for i in piece) == list(range(7))
    with pytest.raises(ValueError, match="expected at least one sequence for each of 3 processes"):
        row_parts([1, 2], 10, World(0, 3))


# --- learning


def test_ppo_learns_what_it_is_told(tmp_path: Path) -> None:
    stage = ppo(steps=25, lr=2e-3, prompts_per_step=24, beta=0.01, missing_end_penalty=0.0, max_new_tokens=10)
    trace: list[dict[str, float]] = []
    Trainer(stage, tmp_path, quiet=True, on_step=lambda _, found: trace.append(found)).run()
    first, last = (np.mean([t["objective/score"] for t in part]) for part in (trace[:3], trace[-3:]))
    assert last > 5 * first + 0.1, f"{first} -> {last}"
    assert trace[-1]["objective/kl"] > trace[0]["objective/kl"]


def test_grpo_learns_what_it_is_told(tmp_path: Path) -> None:
    config = GRPOConfig(steps=30, lr=3e-3, prompts_per_step=5, samples_per_prompt=16, beta=0.0, max_new_tokens=10,
                        epochs=2, missing_end_penalty=0.0, **QUIET)  # fmt: skip
    stage = GRPO(config, tiny.model(), tiny.tokenizer(), PROMPTS, "tests.train.tiny:share_of_e")
    trace: list[float] = []
    Trainer(stage, tmp_path, quiet=True, on_step=lambda _, f: trace.append(f["objective/score"])).run()
    assert np.mean(trace[-3:]) > 5 * np.mean(trace[:3]) + 0.05


def test_a_reward_model_judges() -> None:
    reward = RewardModel(tiny.model(3), seed=1)
    stage = ppo(tiny.model(1), reward)
    made, _ = stage.gather(0)
    close(made.scores, reward.rewards(made.prompts, made.responses))
    assert all(p.requires_grad for p in stage.value.parameters())
    assert stage.value.backbone is not reward.backbone
    stage.step(0, make_optimizer(stage.modules, stage.config))
    close(made.scores, reward.rewards(made.prompts, made.responses))


def test_sums_are_rewarded() -> None:
    config = GRPOConfig(prompts_per_step=4, samples_per_prompt=2, max_new_tokens=6, **QUIET)
    stage = GRPO(config, tiny.model(), tiny.tokenizer(), arithmetic_prompts(9), arithmetic_reward)
    made, _ = stage.gather(0)
    assert set(made.scores) <= {0.0, 0.1, 1.0} and len(made) == 8


def test_evaluations_and_samples() -> None:
    config = PPOConfig(max_new_tokens=8, **QUIET)
    stage = PPO(config, tiny.model(), tiny.tokenizer(), PROMPTS, tiny.share_of_e, heldout=PROMPTS[:3])
    found = stage.evaluate(0)
    assert found == stage.evaluate(5), "the same seeds each time"
    assert found["kl"] == pytest.approx(0, abs=1e-4) and set(found) >= {"score", "ended", "length", "entropy"}
    shown = stage.samples(0)
    assert len(shown) == 3
    assert tiny.share_of_e([], [s["text"] for s in shown]) == [s["score"] for s in shown]


def test_prompts_that_leave_no_room() -> None:
    with pytest.raises(ValueError, match="expected prompts that leave room for an answer within 96 tokens"):
        PPO(PPOConfig(**QUIET), tiny.model(), tiny.tokenizer(), [tiny.user("a" * 90)], tiny.share_of_e)


# --- going on


def online(kind: str) -> Online:
    dials: dict[str, Any] = dict(steps=4, lr=1e-3, save_every=2, keep=9, max_new_tokens=8, log_every=1, eval_every=0)
    if kind == "grpo":
        return GRPO(GRPOConfig(**dials), tiny.model(), tiny.tokenizer(), PROMPTS, tiny.share_of_e)
    config = PPOConfig(**dials, prompts_per_step=6, epochs=2, minibatches=2, target_kl=0.5, kl_horizon=30)
    return PPO(config, tiny.model(), tiny.tokenizer(), PROMPTS, RewardModel(tiny.model(5)))


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_run_that_was_stopped_goes_on_as_it_would_have(kind: str, tmp_path: Path) -> None:
    def run(folder: str, stop: int | None) -> tuple[list[dict[str, float]], Online]:
        stage, trace = online(kind), []

        def seen(step: int, found: dict[str, float]) -> None:
            timeless = {n: v for n, v in found.items() if not n.startswith(("time/", "seconds", "tokens_per_s", "mfu"))}
            trace.append(timeless)
            if step == stop:
                trainer._stop = True

        trainer = Trainer(stage, tmp_path / folder, quiet=True, on_step=seen)
        if stop is None:
            trainer.run()
        else:
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
        return trace, stage

    whole, a = run("whole", None)
    first, _ = run("cut", 2)
    second, b = run("cut", None)
    assert len(first) == len(second) == 2 and first + second == whole
    assert a.state() == b.state()
    for name, module in a.modules.items():
        for p, q in zip(module.parameters(), b.modules[name].parameters()):
            assert torch.equal(p, q)
    assert not torch.equal(copy.deepcopy(next(a.reference.model.parameters())), next(a.model.parameters()))
