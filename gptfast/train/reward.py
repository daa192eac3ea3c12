"""The reward model's training on pairs of answers.

    loss = mean of -log sigmoid(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)^2

Ouyang et al. (arXiv:2203.02155), eq. 1; r: reward_model.py. Each member of an ensemble learns from the same pairs by
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptfast import ops
from gptfast.formats.tokenizer import Tokenizer
from gptfast.train.config import StageConfig, dial
from gptfast.train.optim import AdamW
from gptfast.train.packing import Order, Packed, pack, seed_of
from gptfast.train.parallel import Runner
from gptfast.train.prompts import Pair, pair_ids
from gptfast.train.reward_model import RewardEnsemble, RewardModel
from gptfast.train.sequences import Means, row_parts
from gptfast.train.trainer import Stage, check_finite


@dataclass(frozen=True)
class RewardConfig(StageConfig):
    """Dials of the reward model's training."""

    steps: int = dial(200, "optimiser steps", least=1)
    lr: float = dial(1e-4, "learning rate at its highest", least=0)
    warmup: int = dial(10, "steps in which the learning rate rises", least=0)
    batch_size: int = dial(32, "pairs of one optimiser step", least=1)
    micro_tokens: int = dial(8192, "tokens of one forward and backward pass: less takes less memory", least=1)
    use_margin: bool = dial(False, "whether the pairs' own margins are asked of the scores")
    centring: float = dial(0.01, "pulls scores towards 0: the weight of (chosen + rejected)^2", least=0)


class Reward(Stage):
    """Trains a reward model on preferences.

    pairs    what it learns from; those longer than the model's context are left out
    heldout  pairs for the figures: accuracy with a 95% interval, mean margin, spread of the scores
    """

    name = "reward"
    _runner: Runner | None = None

    def __init__(
        self,
        config: RewardConfig,
        model: RewardModel | RewardEnsemble,
        tokenizer: Tokenizer,
        pairs: Sequence[Pair],
        heldout: Sequence[Pair] = (),
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.modules = {"model": model}
        self.pairs = Pairs(pairs, tokenizer, model.context)
        self.heldout = Pairs(heldout, tokenizer, model.context) if heldout else None
        self.order = Order(len(self.pairs), config.seed, "reward")

    def loss(self, packed: Packed, margins: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs' part of the loss, and the scores of chosen and rejected, which alternate in `packed`: for an
        ensemble the mean of its members' losses and scores."""
        members = self.model.members
        scores = self.model.each([packed] * members)
        chosen, rejected = scores[:, 0::2].flatten(), scores[:, 1::2].flatten()
        margin = margins.repeat(members) if self.config.use_margin else None
        losses = ops.reward_loss(chosen, rejected, margin=margin, centring=self.config.centring, reduction="none")
        mean = scores.detach().mean(0)
        return losses.sum() / (count * members), mean[0::2], mean[1::2]

    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        rows = self.order.batch(step, self.config.batch_size)
        optimizer.zero_grad(set_to_none=True)
        if self._runner is None:
            self._runner = self.world.runner(self.modules, self.loss)
        means, runner = Means(), self._runner
        parts = row_parts([self.pairs.tokens(i) for i in rows], self.config.micro_tokens, self.world)
        for i, part in enumerate(parts):
            torch.manual_seed(seed_of("dropout", self.config.seed, step, self.world.rank, i))
            mine = [rows[j] for j in part]
            with runner.part(last=i == len(parts) - 1):
                loss, chosen, rejected = runner(*self.pairs.pack(mine), len(rows))
                (loss * self.world.size).backward()
            means.add(len(mine), {"loss": float(loss.detach()) * len(rows) / len(mine)} | _agreement(chosen, rejected))
        found = means.read(self.world)
        check_finite(found["loss"], step)
        optimizer.step()
        tokens = float(sum(self.pairs.tokens(i) for i in rows))
        return found | {"tokens": tokens, "grad_norm": float(optimizer.grad_norm or 0)}

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        if self.heldout is None:
            return {}
        chosen, rejected = self._heldout_scores()
        right = int((chosen > rejected).sum())
        low, high = wilson(right, len(chosen))
        both = torch.cat([chosen, rejected])
        found = {"loss": float(ops.reward_loss(chosen, rejected)), "accuracy": right / len(chosen)}
        found |= {"accuracy_low": low, "accuracy_high": high, "margin": float((chosen - rejected).mean())}
        return found | {"score_mean": float(both.mean()), "score_std": float(both.std())}

    def _heldout_scores(self) -> tuple[Tensor, Tensor]:
        assert self.heldout is not None
        scores = self.model._all_raw(self.heldout.sequences(range(len(self.heldout))))
        return scores[0::2], scores[1::2]

    def export(self, folder: Path) -> None:
        """Normalised on the held-out answers (or some of those learnt from), until somebody normalises it on a
        policy's."""
        model = self.world.whole(self.model, self.model.blank)
        if model is None or not self.world.first:
            return
        model.normalise(*(_answers(self.heldout) if self.heldout is not None else self._some()))
        model.save_folder(folder / "model", self.tokenizer)

    def _some(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts and answers that it learns from."""
        return _answers(self.pairs)


def _answers(pairs: Pairs) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of the first 256 pairs."""
    some = range(min(256, len(pairs)))
    answers = [a for i in some for a in (pairs.chosen[i], pairs.rejected[i])]
    return [pairs.prompts[i] for i in some for _ in (0, 1)], answers


class Pairs:
    """Preferences as token ids."""

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, longest: int) -> None:
        self.prompts, self.chosen, self.rejected, self.margins = pair_ids(pairs, tokenizer, longest)

    def __len__(self) -> int:
        return len(self.prompts)

    def tokens(self, i: int) -> int:
        """Of both sequences."""
        return 2 * len(self.prompts[i]) + len(self.chosen[i]) + len(self.rejected[i])

    def sequences(self, rows: Sequence[int]) -> list[list[int]]:
        """Chosen and rejected in turns, each behind its prompt."""
        return [self.prompts[i] + answer for i in rows for answer in (self.chosen[i], self.rejected[i])]

    def pack(self, rows: Sequence[int]) -> tuple[Packed, Tensor]:
        """The sequences of these pairs in one row, and their margins (n,)."""
        return pack(self.sequences(rows)), torch.tensor([self.margins[i] for i in rows])


def _agreement(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        "accuracy": (chosen > rejected).float().mean(),
        "margin": (chosen - rejected).mean(),
        "chosen": chosen.mean(),
        "rejected": rejected.mean(),
    }


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share, right of n: Wilson (1927), which stays inside [0, 1]."""
    if n < 1:
        raise ValueError(f"wilson: expected at least one trial, got {n}")
    p, q = right / n, z * z / n
    middle, half = (p + q / 2) / (1 + q), z / (1 + q) * math.sqrt(p * (1 - p) / n + q / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)
