"""PPO: a policy learns from the scores of its own answers, kept near the model that it started from.

    r_t     = -beta kl(logp_t - logp_ref_t), and at an answer's last token + clip(score) - penalty without an end token
    delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   R_t = A_t + V_t,   V after the end = 0
    loss    = mean of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) + c_v value loss - c_e entropy,  rho = exp(logp - old)
    beta   *= 1 + clip(KL / target - 1, -.2, .2) n / horizon       (adaptive; after the iteration, from its n answers)

kl is k1, x, or k3, exp(-x) - 1 + x. Means are over the minibatch's tokens. Schulman et al. (arXiv:1707.06347); for
language models Ziegler et al. (arXiv:1909.08593), section 2.2 with the adaptive beta, and Ouyang et al.
(arXiv:2203.02155), section 3.5. The parts' formulas: gptfast/ops/policy.py and advantages.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.train.config import dial
from gptfast.train.lora import adapted
from gptfast.train.online import KL_CHOICES, Experience, Online, OnlineConfig, learnt
from gptfast.train.optim import AdamW
from gptfast.train.packing import Packed
from gptfast.train.prompts import Prompt, RewardFunction
from gptfast.train.reward_model import RewardEnsemble, RewardModel, ValueModel
from gptfast.train.sequences import (
    Means,
    completion_logprobs,
    completion_logprobs_and_entropy,
    mask_of,
    padded,
)
from gptfast.train.trainer import check_finite


@dataclass(frozen=True)
class PPOConfig(OnlineConfig):
    """Dials of PPO."""

    beta: float = dial(0.05, "weight of the KL penalty at the start", least=0)
    kl: str = dial("k1", "estimate of a token's KL in its reward", choices=KL_CHOICES)
    target_kl: float = dial(0.0, "nats an answer that an adaptive beta steers to; 0 = beta stays", least=0)
    kl_horizon: int = dial(10_000, "answers in which an adaptive beta may change by 20%", least=1)
    gamma: float = dial(1.0, "discount of what comes a token later", least=0, most=1)
    lam: float = dial(0.95, "GAE's lambda", least=0, most=1)
    value_clip: float = dial(0.2, "how far a value may move from what it was", least=0)
    value_coefficient: float = dial(0.1, "weight of the value loss", least=0)
    whiten_advantages: bool = dial(True, "advantages with mean 0 and variance 1 over an iteration")
    whiten_rewards: bool = dial(False, "rewards with variance 1 over an iteration; their mean stays")


class KLController:
    """beta: fixed, or steered so that the KL comes near a target (Ziegler et al., section 2.2)."""

    def __init__(self, beta: float, target: float = 0.0, horizon: int = 10_000) -> None:
        self.beta, self.target, self.horizon = beta, target, horizon

    def update(self, kl: float, answers: int) -> None:
        """After an iteration of so many answers with this mean KL, in nats an answer."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.beta *= 1 + error * answers / self.horizon


class PPO(Online):
    """Arguments as Online has them; value: what estimates returns, None = a copy of the reward model where there is
    one, else of the policy with a new head."""

    name = "ppo"
    config: PPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        config: PPOConfig,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        reward: RewardModel | RewardEnsemble | RewardFunction | str,
        *,
        value: ValueModel | None = None,
        reference: GPT | None = None,
        heldout: Sequence[Prompt] = (),
    ) -> None:
        super().__init__(config, model, tokenizer, prompts, reward, reference=reference, heldout=heldout)
        if value is None:
            same = isinstance(reward, RewardModel | RewardEnsemble)
            value = ValueModel.from_reward(reward) if same else ValueModel(copy.deepcopy(model), config.seed)
            if not adapted(value.backbone):
                value.requires_grad_(True)
            if value.backbone.head is not None:
                value.backbone.head.requires_grad_(False)
        self.value = value
        self.modules = {"model": model, "value": value}
        self.controller = KLController(config.beta, config.target_kl, config.kl_horizon)

    def judge_tokens(self, packed: Packed, lengths: Sequence[int]) -> Sequence[Tensor]:
        with torch.enable_grad():
            return self._values(packed).detach().split(list(lengths))

    def _values(self, packed: Packed) -> Tensor:
        return self.value.scores(packed.ids[None], packed.cu_seqlens, learnt(packed).nonzero()[:, 0])[0]

    def advantages(self, experience: Experience) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Advantages and returns (n, longest) fp32, 0 behind an answer's end, and what their parts were."""
        config, lengths = self.config, experience.lengths
        mask = mask_of(lengths)
        flat = ops.kl_estimate(torch.cat(experience.logprobs), torch.cat(experience.reference), kind=config.kl)
        rewards = padded((-self.controller.beta * flat).split(lengths))
        penalty = rewards.sum(1)
        scores = self.shaped_scores(experience)
        rewards[torch.arange(len(lengths)), torch.tensor(lengths) - 1] += scores
        if config.whiten_rewards:
            rewards = ops.whiten(rewards, mask, shift_mean=False)
        values = padded(experience.values)
        advantages, returns = ops.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        off, R = (returns - values)[mask], returns[mask]
        found = {
            "objective/non_score_reward": float(penalty.mean()),
            "objective/rlhf_reward": float((penalty + scores).mean()),
            "value/mean": float(values[mask].mean()),
            "value/explained_variance": float(1 - off.var(correction=0) / R.var(correction=0).clamp(min=1e-8)),
        }
        if config.whiten_advantages:
            advantages = ops.whiten(advantages, mask)
        return advantages, returns, found

    def loss(
        self, packed: Packed, old: Tensor, advantages: Tensor, old_values: Tensor, returns: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """These tokens' part of the loss, all (M,), of `count` in the minibatch; and STATISTICS of them."""
        config = self.config
        if config.entropy_coefficient:
            logprobs, entropy = completion_logprobs_and_entropy(self.model, packed, config.temperature)
        else:
            logprobs, entropy = completion_logprobs(self.model, packed, config.temperature), None
        values = self._values(packed)
        policy = ops.policy_loss(
            logprobs[None], old[None], advantages[None], clip=config.clip, denominator=float(count)
        )
        value = ops.value_loss(
            values[None], old_values[None], returns[None], clip=config.value_clip, denominator=float(count)
        )
        loss = policy.loss + config.value_coefficient * value.loss
        if entropy is not None:
            loss = loss - config.entropy_coefficient * entropy.sum() / count
        share = len(old) / count
        statistics = [policy.loss / share, value.loss / share, policy.approx_kl, policy.clip_fraction]
        statistics += [policy.ratio_mean, policy.ratio_var + policy.ratio_mean.square(), value.clip_fraction]
        return loss, torch.stack([s.detach().float() for s in statistics])

    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        for module in self.modules.values():
            module.eval()  # no dropout: a ratio begins at 1
        experience, found = self.gather(step)
        began = perf_counter()
        padded_advantages, padded_returns, parts = self.advantages(experience)
        lengths = experience.lengths
        advantages = [row[:n] for row, n in zip(padded_advantages, lengths)]
        returns = [row[:n] for row, n in zip(padded_returns, lengths)]
        means, norms = Means(), list[float]()
        for epoch in range(self.config.epochs):
            for rows in self.minibatches(step, epoch, len(experience)):
                self._learn(step, experience, rows, advantages, returns, optimizer, means)
                norms.append(float(optimizer.grad_norm or 0))
        statistics = means.read(self.world)
        statistics["policy/ratio_var"] -= statistics["policy/ratio_mean"] ** 2
        found |= self.objective(experience) | parts | statistics
        found["objective/kl_coefficient"] = self.controller.beta
        found["loss"] = statistics["policy/loss"] + self.config.value_coefficient * statistics["value/loss"]
        found |= {"grad_norm": max(norms), "time/learn": perf_counter() - began}
        self.controller.update(found["objective/kl"], len(experience))
        return found | {"tokens": float(sum(map(experience.tokens, range(len(experience)))))}

    def _learn(
        self,
        step: int,
        experience: Experience,
        rows: Sequence[int],
        advantages: Sequence[Tensor],
        returns: Sequence[Tensor],
        optimizer: AdamW,
        means: Means,
    ) -> None:
        """One optimiser step on these rows."""
        count = sum(len(experience.responses[i]) for i in rows)
        if self._runner is None:
            self._runner = self.world.runner(self.modules, self.loss)
        optimizer.zero_grad(set_to_none=True)
        pieces = self.parts(experience, rows)
        for k, piece in enumerate(pieces):
            columns = (experience.logprobs, advantages, experience.values, returns)
            given = [torch.cat([column[i] for i in piece]) for column in columns]
            with self._runner.part(last=k == len(pieces) - 1):
                loss, statistics = self._runner(experience.pack(piece), *given, count)
                (loss * self.world.size).backward()
            check_finite(float(loss.detach()), step)
            means.add(len(given[0]), dict(zip(STATISTICS, statistics.tolist())))
        optimizer.step()

    def state(self) -> dict[str, Any]:
        return {"beta": self.controller.beta}

    def load_state(self, state: Mapping[str, Any]) -> None:
        beta = state.get("beta")
        if not isinstance(beta, float | int) or not beta >= 0:
            raise ValueError(f"ppo: expected a number beta of at least 0 in the saved state, got {beta!r}")
        self.controller.beta = float(beta)


STATISTICS = (
    "policy/loss",
    "value/loss",
    "policy/approxkl",
    "policy/clipfrac",
    "policy/ratio_mean",
    "policy/ratio_var",
    "value/clipfrac",
)
