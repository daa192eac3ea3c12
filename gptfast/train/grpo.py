"""GRPO, Dr. GRPO and RLOO: an answer is as good as it is better than the others to the same prompt; no value model.

    grpo     A = (r - mean) / (std + 1e-4);  loss = mean over tokens of the clipped loss + beta k3
             Shao et al. (arXiv:2402.03300), whose mean over answers of each answer's mean is normalise = "sequences"
    dr_grpo  A = r - mean;  the loss's sum over tokens / (answers x the longest allowed), so that length has no weight
             Liu et al. (arXiv:2503.20783)
    rloo     A = r - mean of the others, where r has lost beta times the answer's KL (k1);  mean over tokens
             Ahmadian et al. (arXiv:2402.14740)

r is the clipped score less the penalty where an answer didn't end by itself; means and std are over a prompt's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from gptfast import ops
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.ops.advantages import GROUP_KINDS
from gptfast.train.config import dial
from gptfast.train.online import KL_CHOICES, Experience, Online, OnlineConfig
from gptfast.train.optim import AdamW
from gptfast.train.packing import Packed
from gptfast.train.prompts import Prompt, RewardFunction
from gptfast.train.reward_model import RewardEnsemble, RewardModel
from gptfast.train.sequences import (
    Means,
    completion_logprobs,
    completion_logprobs_and_entropy,
    mask_of,
    padded,
    row_sums,
)
from gptfast.train.trainer import check_finite


@dataclass(frozen=True)
class GRPOConfig(OnlineConfig):
    """Dials of GRPO and its relatives."""

    prompts_per_step: int = dial(8, "prompts of one iteration", least=1)
    samples_per_prompt: int = dial(8, "answers to each prompt: a group", least=2)
    epochs: int = dial(1, "how often an iteration's answers are learnt from", least=1)
    minibatches: int = dial(1, "optimiser steps of an epoch", least=1)
    kind: str = dial("grpo", "advantages of a group", choices=GROUP_KINDS)
    normalise: str = dial("tokens", "what grpo's loss is a mean over", choices=("tokens", "sequences"))
    beta: float = dial(0.04, "weight of the KL penalty: in the loss, for rloo in the reward", least=0)
    kl: str = dial("k3", "estimate of a token's KL in the loss", choices=KL_CHOICES)
    clip_high: float = dial(0.0, "how far a ratio may rise above 1; 0 = as far as clip", least=0)


class GRPO(Online):
    """Arguments as Online has them."""

    name = "grpo"
    config: GRPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        config: GRPOConfig,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        reward: RewardModel | RewardEnsemble | RewardFunction | str,
        *,
        reference: GPT | None = None,
        heldout: Sequence[Prompt] = (),
    ) -> None:
        super().__init__(config, model, tokenizer, prompts, reward, reference=reference, heldout=heldout)

    def advantages(self, experience: Experience) -> Tensor:
        """Of each answer, (n,) fp32."""
        rewards = self.shaped_scores(experience)
        if self.config.kind == "rloo":
            apart = torch.cat(experience.logprobs) - torch.cat(experience.reference)
            rewards = rewards - self.config.beta * row_sums(apart, experience.lengths)
        return ops.group_advantages(rewards, self.config.samples_per_prompt, kind=self.config.kind)

    def denominator(self, lengths: Sequence[int]) -> float:
        """What the loss's sum over a minibatch of answers with these lengths is divided by."""
        if self.config.kind == "dr_grpo":
            return float(len(lengths) * self.config.max_new_tokens)
        sequences = self.config.kind == "grpo" and self.config.normalise == "sequences"
        return float(len(lengths) if sequences else sum(lengths))

    def loss(
        self, packed: Packed, old: Tensor, reference: Tensor, advantages: Tensor, lengths: Tensor, denominator: float
    ) -> tuple[Tensor, Tensor]:
        """These answers' part of the loss (old and reference (M,), advantages and lengths (n,)); STATISTICS."""
        config = self.config
        if config.entropy_coefficient:
            logprobs, entropy = completion_logprobs_and_entropy(self.model, packed, config.temperature)
        else:
            logprobs, entropy = completion_logprobs(self.model, packed, config.temperature), None
        sizes = lengths.tolist()
        rows = [padded(flat.split(sizes)) for flat in (logprobs, old, reference)]
        found = ops.policy_loss(
            *(rows[0], rows[1], advantages, mask_of(sizes)),
            clip=config.clip,
            clip_high=config.clip_high or None,
            reference_logprobs=rows[2],
            beta=0.0 if config.kind == "rloo" else config.beta,
            kl=config.kl,
            normalise=config.normalise if config.kind == "grpo" else "tokens",
            denominator=denominator,
        )
        loss = found.loss
        if entropy is not None:
            loss = loss - config.entropy_coefficient * entropy.sum() / denominator
        statistics = [found.approx_kl, found.clip_fraction, found.ratio_mean]
        statistics += [found.ratio_var + found.ratio_mean.square(), found.kl]
        return loss, torch.stack([s.detach().float() for s in statistics])

    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        self.model.eval()  # no dropout: a ratio begins at 1
        experience, found = self.gather(step)
        began = perf_counter()
        advantages = self.advantages(experience)
        means, norms, losses = Means(), list[float](), list[float]()
        if self._runner is None:
            self._runner = self.world.runner(self.modules, self.loss)
        for epoch in range(self.config.epochs):
            for rows in self.minibatches(step, epoch, len(experience), self.config.samples_per_prompt):
                denominator = self.denominator([len(experience.responses[i]) for i in rows])
                optimizer.zero_grad(set_to_none=True)
                pieces, total = self.parts(experience, rows), 0.0
                for k, piece in enumerate(pieces):
                    old, reference = (
                        torch.cat([column[i] for i in piece]) for column in (experience.logprobs, experience.reference)
                    )
                    lengths = torch.tensor([len(experience.responses[i]) for i in piece])
                    with self._runner.part(last=k == len(pieces) - 1):
                        loss, statistics = self._runner(
                            *(experience.pack(piece), old, reference, advantages[torch.tensor(piece)], lengths),
                            denominator,
                        )
                        (loss * self.world.size).backward()
                    total += float(loss.detach())
                    means.add(len(old), dict(zip(STATISTICS, statistics.tolist())))
                losses.append(self.world.sum({"loss": total})["loss"])
                check_finite(losses[-1], step)
                optimizer.step()
                norms.append(float(optimizer.grad_norm or 0))
        statistics = means.read(self.world)
        statistics["policy/ratio_var"] -= statistics["policy/ratio_mean"] ** 2
        flat = self.shaped_scores(experience).view(-1, self.config.samples_per_prompt)
        found |= self.objective(experience) | statistics
        found["objective/group_std"] = float(flat.std(1).mean())
        found |= {"loss": sum(losses) / len(losses), "grad_norm": max(norms), "time/learn": perf_counter() - began}
        return found | {"tokens": float(sum(map(experience.tokens, range(len(experience)))))}


STATISTICS = ("policy/approxkl", "policy/clipfrac", "policy/ratio_mean", "policy/ratio_var", "policy/kl")
