"""A reward model from ratings: a step compares every answer of its batch with every other.

    loss = mean over pairs i, j of the batch with score_i - score_j >= least of -log sigmoid(r_i - r_j)
           + centring * mean of r^2

Ouyang et al. (arXiv:2203.02155), section 3.5, train on all comparisons of a prompt's answers at once; here the prompts
of a batch ask for the same in other words, so that all of its answers are compared. n answers cost n forward passes and
give up to n (n - 1) / 2 pairs. A part of an answer may stand for it, with a rating nearer to the mean. Each member of
an ensemble learns by itself, from the answers in an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.formats.tokenizer import Tokenizer
from gptfast.train.config import dial
from gptfast.train.optim import AdamW
from gptfast.train.packing import Order, Packed, generator, pack, seed_of
from gptfast.train.parallel import Runner
from gptfast.train.prompts import Pair, Prompt, completion_ids, prompt_ids
from gptfast.train.reward import Pairs, Reward, RewardConfig
from gptfast.train.reward_model import RewardEnsemble, RewardModel
from gptfast.train.trainer import check_finite


class Answer(NamedTuple):
    """An answer and how good people found it, in any unit."""

    prompt: Prompt
    text: str
    score: float


@dataclass(frozen=True)
class RankedConfig(RewardConfig):
    """Dials of a reward model that learns from ratings; batch_size counts answers."""

    batch_size: int = dial(64, "answers of one optimiser step, each compared with each", least=2)
    least: float = dial(0.5, "how far two ratings must be apart to be compared", least=0)
    hidden_tokens: float = dial(0.0, "share of the tokens that are hidden at random in training", least=0, most=0.9)
    fragments: float = dial(0.0, "share of the answers of which a part is judged in training", least=0, most=1)
    centring: float = dial(0.001, "pulls scores towards 0: the weight of their mean square", least=0)


class Ranked(Reward):
    """Trains a reward model on rated answers.

    answers  what it learns from; those longer than the model's context are left out
    heldout  pairs for the figures, as Reward has them
    """

    name = "reward"
    config: RankedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    _runner: Runner | None = None

    def __init__(
        self,
        config: RankedConfig,
        model: RewardModel | RewardEnsemble,
        tokenizer: Tokenizer,
        answers: Sequence[Answer],
        heldout: Sequence[Pair] = (),
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.modules = {"model": model}
        longest = model.context
        rows = [
            (prompt_ids(a.prompt, tokenizer), completion_ids(a.prompt, a.text, tokenizer), a.score) for a in answers
        ]
        rows = [row for row in rows if len(row[0]) + len(row[1]) <= longest]
        if len(rows) < 2:
            raise ValueError(f"reward: expected answers within {longest} tokens, got {len(rows)} among {len(answers)}")
        self.sequences = [prompt + answer for prompt, answer, _ in rows]
        self.texts = [(len(p), len(p) + self._length(answer)) for p, answer, _ in rows]  # where each answer's text is
        self.ratings = torch.tensor([score for *_, score in rows])
        self.heldout = Pairs(heldout, tokenizer, longest) if heldout else None
        self.normal = ([prompt for prompt, *_ in rows[:256]], [answer for _, answer, _ in rows[:256]])
        names = ["reward", *(f"reward {i}" for i in range(1, model.members))]
        self.orders = [Order(len(rows), config.seed, name) for name in names]
        self.hidden_id = next((i for i in (tokenizer.pad_id, tokenizer.bos_id) if i is not None), 0)

    def compare(self, packed: list[Packed], first: int, others: Tensor, ratings: Tensor) -> tuple[Tensor, Tensor]:
        """The members' mean loss as a function of these sequences' scores, which stand at `first` among all scores
        (members, n); the others' come without gradients. And the scores.

        packed   each member's sequences
        ratings  (members, n)
        """
        mine = self.model.each(packed)
        scores = torch.cat([others[:, :first], mine, others[:, first + mine.shape[1] :]], 1)
        apart = ratings[:, :, None] - ratings[:, None]
        counts = ((apart >= self.config.least) & (apart > 0)).float()
        losses = F.softplus(scores[:, None] - scores[:, :, None]) * counts
        loss = (losses.sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)).mean()
        return loss + self.config.centring * scores.square().mean(), scores.detach()

    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        rows = [order.batch(step, self.config.batch_size) for order in self.orders]
        n = len(rows[0])
        ratings = self.ratings[torch.tensor(rows)]
        sequences = [[self.sequences[i] for i in mine] for mine in rows]
        if self.config.fragments:
            self._cut(step, rows, sequences, ratings)
        torch.manual_seed(seed_of("dropout", self.config.seed, step, self.world.rank))
        optimizer.zero_grad(set_to_none=True)
        if self._runner is None:
            self._runner = self.world.runner(self.modules, self.compare)
        first, end = (n * r // self.world.size for r in (self.world.rank, self.world.rank + 1))
        packed = [self._hide(pack(mine[first:end])) for mine in sequences]
        with self._runner.part(last=True):
            loss, scores = self._runner(packed, first, self._others(packed, first, n), ratings)
            (loss * self.world.size).backward()
        check_finite(float(loss.detach()), step)
        optimizer.step()
        apart = ratings[:, :, None] > ratings[:, None]
        right = ((scores[:, :, None] > scores[:, None]) & apart).sum() / apart.sum().clamp(min=1)
        found = {"loss": float(loss.detach()), "accuracy": float(right), "grad_norm": float(optimizer.grad_norm or 0)}
        return found | {"tokens": float(sum(len(s) for mine in sequences for s in mine))}

    def _length(self, answer: list[int]) -> int:
        """Tokens before the marks at its end."""
        n = len(answer)
        while n and answer[n - 1] in self.tokenizer.special_ids:
            n -= 1
        return n

    def _cut(self, step: int, rows: list[list[int]], sequences: list[list[list[int]]], ratings: Tensor) -> None:
        """Some answers become a part of themselves, which says less: a part's rating is nearer to the mean of all, in
        proportion to its tokens. People rate whole texts, and a policy soon finds a word that only good ones have."""
        random = generator("fragments", self.config.seed, step)
        drawn = torch.rand(*ratings.shape, 3, generator=random).tolist()
        mean = float(self.ratings.mean())
        for member, (mine, cuts) in enumerate(zip(rows, drawn)):
            for j, (i, (which, length, place)) in enumerate(zip(mine, cuts)):
                whole, (begin, end) = self.sequences[i], self.texts[i]
                if which >= self.config.fragments or end - begin < 2:
                    continue
                kept = 1 + int(length * (end - begin - 1))
                first = begin + int(place * (end - begin - kept + 1))
                sequences[member][j] = [*whole[:begin], *whole[first : first + kept], *whole[end:]]
                ratings[member, j] = mean + (float(ratings[member, j]) - mean) * kept / (end - begin)

    def _hide(self, packed: Packed) -> Packed:
        """Some of the text's tokens become padding, so that a score rests on more of them than the few that could be
        learnt by heart (word dropout: Iyyer et al. 2015, section 3.2). Marks stay."""
        if not self.config.hidden_tokens:
            return packed
        marks = torch.tensor(sorted(self.tokenizer.special_ids))
        hidden = (torch.rand(len(packed.ids)) < self.config.hidden_tokens) & ~torch.isin(packed.ids, marks)
        return packed._replace(ids=packed.ids.masked_fill(hidden, self.hidden_id))

    @torch.no_grad()
    def _others(self, packed: list[Packed], first: int, n: int) -> Tensor:
        """All scores of the batch, of which the other processes' are used, (members, n) fp32."""
        scores = torch.zeros(self.model.members, n)
        if self.world.size > 1:
            import torch.distributed as dist

            mine = self.model.each(packed)
            scores[:, first : first + mine.shape[1]] = mine
            dist.all_reduce(scores)
        return scores

    def _some(self) -> tuple[list[list[int]], list[list[int]]]:
        return self.normal
