"""The reward model: a GPT with one number in the place of the vocabulary, trained on pairs of answers.

    loss = mean of -log sigmoid(r_chosen - r_rejected - margin) + centring (r_chosen + r_rejected)^2
    r    = the head's number at a sequence's last token;  the head starts as N(0, 1 / (d + 1)), its variance

Ouyang et al. (arXiv:2203.02155), eq. 1; the head's start: Stiennon et al. (arXiv:2009.01325), appendix B.1. A value
model is the same with a number at every token. Both are saved as a Hugging Face folder of the family's
ForSequenceClassification with one label.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.formats.files import FormatError
from gptfast.formats.huggingface import read_folder, write_folder
from gptfast.formats.tokenizer import Tokenizer
from gptfast.layers import Linear
from gptfast.model import GPT, GPTConfig, convert
from gptfast.train.config import StageConfig, dial
from gptfast.train.optim import AdamW
from gptfast.train.packing import Order, Packed, generator, pack, seed_of
from gptfast.train.parallel import Runner
from gptfast.train.prompts import Pair, pair_ids
from gptfast.train.sequences import Means, row_parts
from gptfast.train.trainer import Stage, check_finite

HEAD = "score."  # transformers' name of a sequence classifier's head
OURS = "gptfast_score"  # our entry of config.json
TOKENS_AT_ONCE = 16384  # where nothing is learnt


class Scorer(nn.Module):
    """A GPT and a linear layer that makes one number of a final hidden state.

    backbone  is used as it is, not copied; its own head does nothing here
    seed      decides the head's start
    """

    kind: str

    def __init__(self, backbone: GPT, seed: int = 0, *, bias: bool = False) -> None:
        super().__init__()
        width = backbone.config.n_embd
        self.backbone = backbone
        self.score = Linear(width, 1, bias, device=backbone.device, dtype=backbone.dtype)
        start = torch.randn(1, width, generator=generator("score", seed)) / math.sqrt(width + 1)
        with torch.no_grad():
            assert isinstance(self.score.weight, Tensor)
            self.score.weight.copy_(start)
        if backbone.head is not None:
            backbone.head.requires_grad_(False)

    def scores(self, ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None = None) -> Tensor:
        """A number at every token of packed sequences, ids (1, T) -> (1, T) fp32; with rows (M,) int64 at these alone,
        (1, M), which spares much of the last block."""
        self.score.backend = self.backbone.backend
        return self.score(self.backbone.hidden(ids, cu_seqlens=cu_seqlens, rows=rows))[..., 0].float()

    def save_folder(self, path: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> None:
        """Writes config.json, safetensors and, where one is given, the tokenizer."""
        config, tensors = convert.to_huggingface(self.backbone)
        names = config.get("architectures") or ["GPT2LMHeadModel"]
        base = names[0].removesuffix("LMHeadModel").removesuffix("ForCausalLM")
        config |= {"architectures": [f"{base}ForSequenceClassification"], "num_labels": 1, OURS: self._extra()}
        config |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        head = {HEAD + name: p.detach() for name, p in self.score.named_parameters()}
        extra: dict[str, Any] = {}
        if tokenizer is not None:
            config["pad_token_id"] = tokenizer.pad_id  # which transformers finds the last token by
            extra = {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": tokenizer.to_config()}
            if tokenizer.chat_template is not None:
                extra["chat_template.jinja"] = tokenizer.chat_template
        write_folder(path, config, {n: t.contiguous() for n, t in tensors.items()} | head, extra)

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what save_folder wrote. Raises FormatError for another folder."""
        folder = read_folder(path)
        extra = folder.config.get(OURS)
        if not isinstance(extra, dict) or extra.get("kind") != cls.kind:
            raise FormatError(f"{folder.path.name}: expected a {cls.kind} model's folder, got {extra!r:.80}")
        head = {n: folder.tensors[n] for n in folder.tensors if n.startswith(HEAD)}
        config = GPTConfig.from_huggingface(folder.config).replace(eos_ids=tuple(folder.eos_ids))
        rest = {n: folder.tensors[n] for n in folder.tensors if not n.startswith(HEAD)}
        model = cls(convert.from_tensors(config, rest))
        for name, p in model.score.named_parameters():
            found = head.pop(HEAD + name, None)
            if found is None or found.shape != p.shape:
                got = "none" if found is None else str(tuple(found.shape))
                raise FormatError(f"{folder.path.name}: expected {HEAD}{name} {tuple(p.shape)}, got {got}")
            with torch.no_grad():
                p.copy_(found)
        if head:
            raise FormatError(f"{folder.path.name}: expected no tensor {min(head)}")
        model._take_extra(extra, folder.path.name)
        return model.eval()

    def _extra(self) -> dict[str, Any]:
        return {"kind": self.kind}

    def _take_extra(self, extra: dict[str, Any], where: str) -> None:
        return


class RewardModel(Scorer):
    """How good an answer is: the number at its last token, normalised by `mean` and `std`, (1,) fp32 buffers."""

    kind = "reward"
    mean: Tensor
    std: Tensor

    def __init__(self, backbone: GPT, seed: int = 0) -> None:
        super().__init__(backbone, seed)
        self.register_buffer("mean", torch.zeros(1, device=backbone.device))
        self.register_buffer("std", torch.ones(1, device=backbone.device))

    def raw(self, packed: Packed) -> Tensor:
        """The number at each sequence's last token as the head gives it, (n,) fp32."""
        return self.scores(packed.ids[None], packed.cu_seqlens, packed.last)[0]

    @torch.no_grad()
    def rewards(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
        """The normalised score of each response (token ids, its end token included), (n,) fp32."""
        return (self._all_raw([[*p, *r] for p, r in zip(prompts, responses)]) - self.mean) / self.std

    @torch.no_grad()
    def normalise(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """From now on rewards have mean 0 and standard deviation 1 over these responses, those of the model that PPO
        starts from for example. Raises ValueError for fewer than two."""
        if len(responses) < 2:
            raise ValueError(f"RewardModel.normalise: expected at least 2 responses, got {len(responses)}")
        raw = self._all_raw([[*p, *r] for p, r in zip(prompts, responses)])
        self.mean.copy_(raw.mean()[None])
        self.std.copy_(raw.std().clamp(min=1e-6)[None])

    def _all_raw(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        training = self.training
        self.eval()
        try:
            found = [self.raw(packed) for packed in rows_of(sequences)]
        finally:
            self.train(training)
        return torch.cat(found) if found else torch.zeros(0)

    def _extra(self) -> dict[str, Any]:
        return {"kind": self.kind, "mean": float(self.mean), "std": float(self.std)}

    def _take_extra(self, extra: dict[str, Any], where: str) -> None:
        mean, std = extra.get("mean"), extra.get("std")
        if not isinstance(mean, float | int) or not isinstance(std, float | int) or not 0 < std < math.inf:
            raise FormatError(f"{where}: expected numbers mean and std > 0 in config.json's {OURS}, got {extra!r:.80}")
        self.mean.fill_(mean)
        self.std.fill_(std)


class ValueModel(Scorer):
    """What is still to come: a number at every token."""

    kind = "value"

    def __init__(self, backbone: GPT, seed: int = 0) -> None:
        super().__init__(backbone, seed, bias=True)

    @classmethod
    def from_reward(cls, reward: RewardModel) -> ValueModel:
        """Starts as a copy of the reward model, in its normalised units: Stiennon et al., section 3.4."""
        made = cls(copy.deepcopy(reward.backbone))
        weight, bias = made.score.weight, made.score.bias
        assert isinstance(weight, Tensor) and isinstance(reward.score.weight, Tensor) and bias is not None
        with torch.no_grad():
            weight.copy_(reward.score.weight / reward.std)
            bias.copy_(-reward.mean / reward.std)
        return made


def rows_of(sequences: Sequence[Sequence[int]], most: int = TOKENS_AT_ONCE) -> list[Packed]:
    """These sequences in their order, packed in rows of at most `most` tokens; a longer one stands alone."""
    groups: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if not groups or len(sequence) > room:
            groups.append([])
            room = most
        groups[-1].append(sequence)
        room -= len(sequence)
    return [pack(group) for group in groups]


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
        model: RewardModel,
        tokenizer: Tokenizer,
        pairs: Sequence[Pair],
        heldout: Sequence[Pair] = (),
    ) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.modules = {"model": model}
        self.pairs = Pairs(pairs, tokenizer, model.backbone.config.context)
        self.heldout = Pairs(heldout, tokenizer, model.backbone.config.context) if heldout else None
        self.order = Order(len(self.pairs), config.seed, "reward")

    def loss(self, packed: Packed, margins: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs' part of the loss, and the scores of chosen and rejected, which alternate in `packed`."""
        scores = self.model.raw(packed)
        chosen, rejected = scores[0::2], scores[1::2]
        margin = margins if self.config.use_margin else None
        losses = ops.reward_loss(chosen, rejected, margin=margin, centring=self.config.centring, reduction="none")
        return losses.sum() / count, chosen.detach(), rejected.detach()

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
        config = self.model.backbone.config
        model = self.world.whole(self.model, lambda: RewardModel(GPT(config, device="meta")))
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
