"""What PPO and GRPO share: an iteration samples answers from the model in training, has them judged, and looks at them
once with the training forward before it learns from them.

All log-probabilities (new, old, the reference's) are at the sampling temperature. The old ones are computed again by
the training forward: the generation loop's kernels round differently, and a ratio should begin at 1. Dropout is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.ops.policy import KL_KINDS
from gptfast.train.config import StageConfig, dial
from gptfast.train.packing import IGNORED, Order, Packed, shuffled
from gptfast.train.parallel import Runner
from gptfast.train.prompts import Prompt, RewardFunction, call_reward, messages_of, prompt_ids, reward_function
from gptfast.train.reference import Reference
from gptfast.train.reward_model import RewardEnsemble, RewardModel
from gptfast.train.rollout import Rollout, Samples
from gptfast.train.sequences import (
    completion_logprobs,
    completion_logprobs_and_entropy,
    pack_completions,
    row_parts,
    row_sums,
)
from gptfast.train.trainer import Stage


@dataclass(frozen=True)
class OnlineConfig(StageConfig):
    """Dials of every stage that learns from its own samples."""

    steps: int = dial(100, "iterations: sample, judge, learn", least=1)
    lr: float = dial(2e-5, "learning rate at its highest", least=0)
    warmup: int = dial(0, "iterations in which the learning rate rises", least=0)
    weight_decay: float = dial(0.0, "AdamW's, of matrices only", least=0)
    schedule: str = dial(
        "constant", "how the learning rate falls after the warm-up", choices=("cosine", "linear", "constant")
    )
    eval_every: int = dial(10, "iterations between evaluations; 0 = at the end only", least=0)
    save_every: int = dial(10, "iterations between checkpoints; 0 = at the end only", least=0)
    log_every: int = dial(1, "iterations between rows of the log", least=1)
    prompts_per_step: int = dial(64, "prompts of one iteration", least=1)
    samples_per_prompt: int = dial(1, "answers to each prompt", least=1)
    max_new_tokens: int = dial(48, "the longest answer, in tokens", least=1)
    temperature: float = dial(1.0, "of sampling, and of all log-probabilities", least=1e-3)
    epochs: int = dial(4, "how often an iteration's answers are learnt from", least=1)
    minibatches: int = dial(4, "optimiser steps of an epoch", least=1)
    micro_tokens: int = dial(8192, "tokens of one forward and backward pass: less takes less memory", least=1)
    clip: float = dial(0.2, "how far a token's probability ratio may leave 1 and still be learnt from", least=0, most=1)
    caution: float = dial(0.0, "deviations between a reward ensemble's members that are taken off a score", least=0)
    score_clip: float = dial(5.0, "scores are cut to +- this; 0 = never", least=0)
    missing_end_penalty: float = dial(1.0, "taken off the score of an answer that didn't end by itself", least=0)
    entropy_coefficient: float = dial(0.0, "bonus for a token's entropy, in the loss", least=0)
    eval_prompts: int = dial(64, "held-out prompts that are answered at an evaluation", least=0)


KL_CHOICES = KL_KINDS


@dataclass
class Experience:
    """An iteration's answers, row by row: what was written, what it got, what the models thought of its tokens."""

    prompts: list[list[int]]
    responses: list[list[int]]
    ended: list[bool]
    scores: list[float]  # as the judge gave them
    doubts: list[float]  # the standard deviation between the judge's members, where it has some
    logprobs: list[Tensor]  # of each response's tokens, under the policy that wrote it
    reference: list[Tensor]
    entropy: list[Tensor]
    values: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)  # the generation loop's own log-probs

    def __len__(self) -> int:
        return len(self.responses)

    def tokens(self, i: int) -> int:
        return len(self.prompts[i]) + len(self.responses[i])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(r) for r in self.responses]

    def pack(self, rows: Sequence[int]) -> Packed:
        return pack_completions([self.prompts[i] for i in rows], [self.responses[i] for i in rows])

    def extend(self, other: Experience) -> None:
        for name, mine in vars(self).items():
            mine += getattr(other, name)


class Online(Stage):
    """A stage that learns from its own answers to prompts.

    model      the policy; trained
    prompts    conversations that end with the user, texts (the user's), or token ids with the answer's turn opened
    reward     a RewardModel, a callable (prompts, responses) -> scores, or "package.module:function"
    reference  the model that the policy is kept near; None = the policy as it is now, before anything is loaded into
               it, or without its adapters
    heldout    prompts whose answers are judged at evaluations
    """

    config: OnlineConfig
    _runner: Runner | None = None

    def __init__(
        self,
        config: OnlineConfig,
        model: GPT,
        tokenizer: Tokenizer,
        prompts: Sequence[Prompt],
        reward: RewardModel | RewardEnsemble | RewardFunction | str,
        *,
        reference: GPT | None = None,
        heldout: Sequence[Prompt] = (),
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.modules = {"model": model}
        self.reference = Reference(model, reference)
        self.reward = reward.eval() if isinstance(reward, RewardModel | RewardEnsemble) else reward_function(reward)
        self.rollout = Rollout(model, tokenizer)
        self.messages, self.ids = self._encode(prompts)
        self.heldout_messages, self.heldout_ids = self._encode(heldout) if heldout else ([], [])
        if not self.ids:
            raise ValueError(
                f"{self.name}: expected prompts that leave room for an answer within {model.config.context} tokens, "
                f"got none among {len(prompts)}"
            )
        self.order = Order(len(self.ids), config.seed, self.name)

    def _encode(self, prompts: Sequence[Prompt]) -> tuple[list[list[dict[str, str]]], list[list[int]]]:
        """Conversations and token ids; prompts that leave no room for the longest answer are left out."""
        room = self.model.config.context - min(self.config.max_new_tokens, self.model.config.context // 2)
        both = [(messages_of(p, self.tokenizer), prompt_ids(p, self.tokenizer)) for p in prompts]
        both = [(messages, ids) for messages, ids in both if 0 < len(ids) <= room]
        return [messages for messages, _ in both], [ids for _, ids in both]

    def gather(self, step: int) -> tuple[Experience, dict[str, float]]:
        """An iteration's answers, those of all processes, and how long they took."""
        config, world = self.config, self.world
        if world.size > 1 and world.kind == "fsdp":
            raise ValueError(f"{self.name}: expected DDP or one process: sharded weights can't write answers")
        chosen = self.order.batch(step, config.prompts_per_step)
        mine = chosen[world.rank * len(chosen) // world.size : (world.rank + 1) * len(chosen) // world.size]
        first = world.rank * len(chosen) // world.size * config.samples_per_prompt
        began = perf_counter()
        samples = self.rollout(
            [self.ids[i] for i in mine],
            n=config.samples_per_prompt,
            seed=config.seed,
            step=step,
            first=first,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
        )
        wrote = perf_counter()
        experience = self.look(samples, [self.messages[mine[i]] for i in samples.sources])
        times = {"time/rollout": wrote - began, "time/look": perf_counter() - wrote}
        if world.size > 1:
            import torch.distributed as dist

            parts: list[Any] = [None] * world.size
            dist.all_gather_object(parts, experience)
            experience = parts[0]
            for part in parts[1:]:
                experience.extend(part)
        return experience, times

    @torch.no_grad()
    def look(self, samples: Samples, messages: list[list[dict[str, str]]]) -> Experience:
        """Has the answers judged and computes what the models think of them."""
        judged = self.judge(samples, messages)
        made = Experience(samples.prompts, samples.responses, samples.ended, *judged, [], [], [])
        made.sampled = [torch.tensor(row) for row in samples.logprobs]
        for rows in self._pieces(made):
            packed, lengths = made.pack(rows), [len(made.responses[i]) for i in rows]
            with torch.enable_grad():  # the kernels that training uses: a ratio begins at 1 to the last bit
                logprobs, entropy = completion_logprobs_and_entropy(self.model, packed, self.config.temperature)
            with self.reference() as model:
                reference = completion_logprobs(model, packed, self.config.temperature)
            made.logprobs += logprobs.detach().split(lengths)
            made.entropy += entropy.detach().split(lengths)
            made.reference += reference.split(lengths)
            made.values += self.judge_tokens(packed, lengths)
        return made

    def _pieces(self, made: Experience) -> list[list[int]]:
        """Rows of what is computed at once."""
        pieces: list[list[int]] = []
        room = 0
        for i in range(len(made)):
            if not pieces or made.tokens(i) > room:
                pieces.append([])
                room = self.config.micro_tokens
            pieces[-1].append(i)
            room -= made.tokens(i)
        return pieces

    def judge(self, samples: Samples, messages: list[list[dict[str, str]]]) -> tuple[list[float], list[float]]:
        """A score for each answer, and how far the judge's members differ about it."""
        if isinstance(self.reward, RewardModel | RewardEnsemble):
            scores, doubts = self.reward.judged(samples.prompts, samples.responses)
            return scores.tolist(), doubts.tolist()
        return call_reward(self.reward, messages, samples.texts), [0.0] * len(samples)

    def judge_tokens(self, packed: Packed, lengths: Sequence[int]) -> Sequence[Tensor]:
        """Values of each answer's tokens, where a stage has them."""
        return []

    def shaped_scores(self, experience: Experience) -> Tensor:
        """Scores as they are learnt from, (n,) fp32: less the judge's doubts, clipped, less the penalty where an answer
        didn't end by itself."""
        scores = torch.tensor(experience.scores) - self.config.caution * torch.tensor(experience.doubts)
        if self.config.score_clip:
            scores = scores.clamp(-self.config.score_clip, self.config.score_clip)
        return scores - self.config.missing_end_penalty * ~torch.tensor(experience.ended)

    def minibatches(self, step: int, epoch: int, n: int, group: int = 1) -> list[list[int]]:
        """The rows of each of an epoch's minibatches, in an order made of seed, step and epoch; groups of rows beside
        each other stay together."""
        order = shuffled(n // group, self.name, self.config.seed, step, epoch)
        k = min(self.config.minibatches, len(order))
        cuts = [len(order) * i // k for i in range(k + 1)]
        return [[g * group + j for g in order[a:b] for j in range(group)] for a, b in pairwise(cuts)]

    def parts(self, experience: Experience, rows: Sequence[int]) -> list[list[int]]:
        """This process's rows of a minibatch, in pieces for one forward and backward pass each."""
        parts = row_parts([experience.tokens(i) for i in rows], self.config.micro_tokens, self.world)
        return [[rows[j] for j in part] for part in parts]

    def objective(self, experience: Experience) -> dict[str, float]:
        """Statistics of an iteration's answers. KL is in nats an answer, entropy in nats a token."""
        scores = torch.tensor(experience.scores)
        lengths = experience.lengths
        logprobs, reference = torch.cat(experience.logprobs), torch.cat(experience.reference)
        return {
            "objective/kl": float(row_sums(logprobs - reference, lengths).mean()),
            "objective/entropy": float(torch.cat(experience.entropy).mean()),
            "objective/score": float(scores.mean()),
            "objective/score_std": float(scores.std()) if len(scores) > 1 else 0.0,
            "objective/doubt": sum(experience.doubts) / len(experience),
            "objective/ended": sum(experience.ended) / len(experience),
            "objective/length": sum(lengths) / len(lengths),
            "objective/sampler_gap": float((torch.cat(experience.sampled) - logprobs).abs().max()),
        }

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Answers to held-out prompts, with the same seeds each time."""
        if not self.heldout_ids or not self.config.eval_prompts:
            return {}
        experience, _ = self._heldout()
        found = self.objective(experience)
        return {name.removeprefix("objective/"): found[name] for name in sorted(found) if "gap" not in name}

    def _heldout(self) -> tuple[Experience, Samples]:
        ids = self.heldout_ids[: self.config.eval_prompts]
        options: dict[str, Any] = dict(
            max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature, seed=self.config.seed
        )
        samples = self.rollout(ids, step=-1, **options)
        return self.look(samples, [self.heldout_messages[i] for i in samples.sources]), samples

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Answers to the first held-out prompts, with their scores."""
        few = min(8, self.config.eval_prompts, len(self.heldout_ids))
        if not few:
            return []
        options: dict[str, Any] = dict(max_new_tokens=self.config.max_new_tokens, temperature=self.config.temperature)
        made = self.rollout(self.heldout_ids[:few], step=-1, seed=self.config.seed, **options)
        scores, _ = self.judge(made, [self.heldout_messages[i] for i in made.sources])
        return [
            {"prompt": self.heldout_messages[i][-1]["content"], "text": text, "score": score, "finish_reason": finish}
            for i, text, score, finish in zip(made.sources, made.texts, scores, made.finishes)
        ]

    def export(self, folder: Path) -> None:
        from gptfast.train.sampling import save_model

        save_model(self.model, self.tokenizer, folder / "model")


def learnt(packed: Packed) -> Tensor:
    """Which tokens of a row predict one of an answer's, (T,) bool."""
    return packed.targets != IGNORED


def check(name: str, values: Mapping[str, Any], expected: Mapping[str, Sequence[Any]]) -> None:
    """Raises ValueError for a setting that isn't one of those expected."""
    for key, choices in expected.items():
        if values[key] not in choices:
            raise ValueError(f"{name}: expected {key} among {', '.join(map(str, choices))}, got {values[key]!r}")
