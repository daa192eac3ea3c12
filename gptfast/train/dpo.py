"""DPO: a policy learns from pairs of answers directly, without samples and without a reward model.

    d    = (log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected)),  sums over an answer's tokens
    loss = -log sigmoid(beta d), with label smoothing, or the "robust", "ipo" and "hinge" forms

The losses' formulas: gptfast/ops/preference.py.

Rafailov et al. (arXiv:2305.18290), eq. 7. The rewards reported are beta (log p - log p_ref). Dropout is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gptfast import ops
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.ops.preference import DPO_KINDS
from gptfast.train.config import StageConfig, dial
from gptfast.train.optim import AdamW
from gptfast.train.packing import IGNORED, Order, Packed
from gptfast.train.parallel import Runner
from gptfast.train.prompts import Pair
from gptfast.train.reference import Reference
from gptfast.train.reward import Pairs, wilson
from gptfast.train.sequences import Means, completion_logprobs, pack_completions, row_parts, row_sums
from gptfast.train.trainer import Stage, check_finite


@dataclass(frozen=True)
class DPOConfig(StageConfig):
    """Dials of DPO."""

    steps: int = dial(200, "optimiser steps", least=1)
    lr: float = dial(1e-5, "learning rate at its highest", least=0)
    warmup: int = dial(10, "steps in which the learning rate rises", least=0)
    weight_decay: float = dial(0.0, "AdamW's, of matrices only", least=0)
    batch_size: int = dial(16, "pairs of one optimiser step", least=1)
    micro_tokens: int = dial(8192, "tokens of one forward and backward pass: less takes less memory", least=1)
    beta: float = dial(0.1, "how much a nat of log-probability is worth", least=1e-6)
    kind: str = dial("sigmoid", "the loss", choices=DPO_KINDS)
    label_smoothing: float = dial(
        0.0, "share of pairs that may be the wrong way round; sigmoid and robust", least=0, most=0.49
    )
    reference: str = dial(
        "once", "when the reference is asked: once for each pair, or at each step", choices=("once", "step")
    )
    eval_pairs: int = dial(0, "held-out pairs that an evaluation looks at; 0 = all", least=0)


class DPO(Stage):
    """Trains a GPT on preferences.

    pairs      what it learns from; those longer than the model's context are left out
    reference  what the policy is compared with; None = the policy as it is now, before anything is loaded into it, or
               without its adapters
    heldout    pairs for the figures
    """

    name = "dpo"
    config: DPOConfig
    _runner: Runner | None = None

    def __init__(
        self,
        config: DPOConfig,
        model: GPT,
        tokenizer: Tokenizer,
        pairs: Sequence[Pair],
        heldout: Sequence[Pair] = (),
        *,
        reference: GPT | None = None,
    ) -> None:
        if config.label_smoothing and config.kind in ("ipo", "hinge"):
            raise ValueError(f"dpo: expected label_smoothing 0 with {config.kind}, got {config.label_smoothing}")
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.modules = {"model": model}
        self.reference = Reference(model, reference)
        self.pairs = Pairs(pairs, tokenizer, model.config.context)
        self.heldout = Pairs(heldout, tokenizer, model.config.context) if heldout else None
        self.order = Order(len(self.pairs), config.seed, "dpo")
        self._known: dict[tuple[int, int], tuple[float, float]] = {}  # by whose pair and which: the reference's sums

    def sums(self, model: GPT, packed: Packed) -> Tensor:
        """log p of each completion, (n,) fp32."""
        flat = completion_logprobs(model, packed)
        learnt = (packed.targets != IGNORED).split(packed.cu_seqlens.diff().tolist())
        return row_sums(flat, [int(row.sum()) for row in learnt])

    def loss(self, packed: Packed, reference: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pairs' part of the loss, the rewards of chosen and rejected, and the completions' log p; in `packed` and
        reference (2 n,) chosen and rejected alternate."""
        sums, config = self.sums(self.model, packed), self.config
        options = {"beta": config.beta, "kind": config.kind, "label_smoothing": config.label_smoothing}
        loss, chosen, rejected = ops.dpo_loss(
            *(sums[0::2], sums[1::2], reference[0::2], reference[1::2]), **options, reduction="none"
        )
        return loss.sum() / count, chosen, rejected, sums.detach()

    def step(self, step: int, optimizer: AdamW) -> dict[str, float]:
        self.model.eval()
        rows = self.order.batch(step, self.config.batch_size)
        optimizer.zero_grad(set_to_none=True)
        if self._runner is None:
            self._runner = self.world.runner(self.modules, self.loss)
        means = Means()
        parts = row_parts([self.pairs.tokens(i) for i in rows], self.config.micro_tokens, self.world)
        for i, part in enumerate(parts):
            mine = [rows[j] for j in part]
            reference = self.reference_sums(self.pairs, mine)
            with self._runner.part(last=i == len(parts) - 1):
                loss, chosen, rejected, sums = self._runner(_pack(self.pairs, mine), reference, len(rows))
                (loss * self.world.size).backward()
            loss = float(loss.detach()) * len(rows) / len(mine)
            means.add(len(mine), {"loss": loss, **_figures(chosen, rejected, sums)})
        found = means.read(self.world)
        check_finite(found["loss"], step)
        optimizer.step()
        tokens = float(sum(self.pairs.tokens(i) for i in rows))
        return found | {"tokens": tokens, "grad_norm": float(optimizer.grad_norm or 0)}

    @torch.no_grad()
    def reference_sums(self, pairs: Pairs, rows: Sequence[int]) -> Tensor:
        """The reference's log p of these pairs' completions, chosen and rejected in turns, (2 n,) fp32."""
        which = 0 if pairs is self.pairs else 1
        new = [i for i in dict.fromkeys(rows) if self.config.reference == "step" or (which, i) not in self._known]
        if new:
            with self.reference() as model:
                sums = self.sums(model, _pack(pairs, new)).tolist()
            self._known |= {(which, i): (c, r) for i, c, r in zip(new, sums[0::2], sums[1::2])}
        return torch.tensor([x for i in rows for x in self._known[which, i]])

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        if self.heldout is None:
            return {}
        n, means = min(self.config.eval_pairs or len(self.heldout), len(self.heldout)), Means()
        right, size = 0, max(1, self.config.batch_size)
        for start in range(0, n, size):
            rows = list(range(start, min(start + size, n)))
            reference = self.reference_sums(self.heldout, rows)
            loss, chosen, rejected, sums = self.loss(_pack(self.heldout, rows), reference, len(rows))
            means.add(len(rows) / self.world.size, {"loss": loss, **_figures(chosen, rejected, sums)})
            right += int((chosen > rejected).sum())
        low, high = wilson(right, n)
        return means.read(self.world) | {"rewards/accuracy_low": low, "rewards/accuracy_high": high}

    def export(self, folder: Path) -> None:
        from gptfast.train.sampling import save_model

        model = self.whole(self.model)
        if model is not None and self.world.first:
            save_model(model, self.tokenizer, folder / "model")


def _pack(pairs: Pairs, rows: Sequence[int]) -> Packed:
    """Chosen and rejected in turns."""
    prompts = [pairs.prompts[i] for i in rows for _ in (0, 1)]
    return pack_completions(prompts, [answer for i in rows for answer in (pairs.chosen[i], pairs.rejected[i])])


def _figures(chosen: Tensor, rejected: Tensor, sums: Tensor) -> Mapping[str, Tensor]:
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margin": (chosen - rejected).mean(),
        "rewards/accuracy": (chosen > rejected).float().mean(),
        "logps/chosen": sums[0::2].mean(),
        "logps/rejected": sums[1::2].mean(),
    }
