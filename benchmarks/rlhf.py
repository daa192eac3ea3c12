"""An iteration of PPO (rollouts, the models' looks at them, 4 epochs of 4 minibatches) of a small GPT-2: on the kernels
and on the reference ops, in turns in one process, from the same weights.

Policy, reference, value and reward model have one size; answers have up to 48 tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptfast.bench import ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S, Spread
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, GPTConfig
from gptfast.train.ppo import PPO, PPOConfig
from gptfast.train.reward import RewardModel
from gptfast.train.trainer import make_optimizer

OURS, REFERENCE = "gptfast", "reference ops"
PARTS = ("time/rollout", "time/look", "time/learn")


class Iteration:
    """PPO as its trainer drives it, one iteration a call."""

    def __init__(self, backend: str | None, layers: int, width: int, vocabulary: int, prompts: int, new: int) -> None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(vocab_size=vocabulary, n_layer=layers, n_head=width // 64, n_embd=width)
        config = GPTConfig("gpt2", context=256, **sizes)
        models = [GPT(config) for _ in range(2)]
        for model in models:
            model.backend = backend
        draw = torch.Generator().manual_seed(1)
        ids = [
            torch.randint(vocabulary, (int(torch.randint(8, 25, (), generator=draw)),), generator=draw).tolist()
            for _ in range(4 * prompts)
        ]
        dials: dict[str, Any] = dict(prompts_per_step=prompts, max_new_tokens=new, missing_end_penalty=0.0)
        self.stage = PPO(PPOConfig(**dials), models[0], _bytes(), ids, RewardModel(models[1]))
        for module in self.stage.value.modules():
            if isinstance(module, GPT):
                module.backend = backend
        self.optimizer = make_optimizer(self.stage.modules, self.stage.config)
        self.optimizer.backend = backend
        self.steps = 0

    def __call__(self) -> dict[str, float]:
        for module in self.stage.modules.values():
            assert isinstance(module, nn.Module)
            module.train()
        found = self.stage.step(self.steps, self.optimizer)
        self.steps += 1
        return found


def _bytes() -> Tokenizer:
    """A tokenizer of bytes: prompts are token ids, and what ids beyond it stand for is nothing."""
    from gptfast.formats.extras import need

    library = need("tokenizers", "models")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    fast = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.decoder = library.decoders.ByteLevel()
    return Tokenizer(fast)


def measure(rounds: int, **sizes: int) -> list[dict[str, Any]]:
    """One row for each contender: seconds an iteration, where they go, how many times as fast as the reference."""
    contenders = {OURS: Iteration(None, **sizes), REFERENCE: Iteration("reference", **sizes)}
    first = {name: call() for name, call in contenders.items()}
    apart = abs(first[OURS]["policy/loss"] - first[REFERENCE]["policy/loss"])
    if first[OURS]["objective/length"] != first[REFERENCE]["objective/length"] or apart > 1e-3:
        raise RuntimeError(f"expected the same iteration of both, got policy losses {apart} apart")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for i in range(rounds):
        for name in sorted(contenders, reverse=bool(i % 2)):
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            parts[name].append(contenders[name]())
            times[name].append(time.perf_counter() - start)
    rows = []
    for name in contenders:
        over = ratio(times[REFERENCE], times[name])
        row: dict[str, Any] = {"contender": name, **sizes, "threads": torch.get_num_threads()}
        row["seconds"] = round(Spread.of(times[name]).median, 3)
        row |= {f"{p.partition('/')[2]}_s": round(Spread.of([x[p] for x in parts[name]]).median, 3) for p in PARTS}
        row |= {
            "over_reference": round(over.median, 3),
            "over_low": round(over.low, 3),
            "over_high": round(over.high, 3),
        }
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("PPO iteration")
    for heading in ("s", "rollouts", "looks", "learning", "over reference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        over = f"{row['over_reference']:.2f}x ({row['over_low']:.2f}-{row['over_high']:.2f})"
        seconds = [f"{row[key]:.2f}" for key in ("seconds", "rollout_s", "look_s", "learn_s")]
        table.add_row(row["contender"], *seconds, over)
    Console(width=140).print(table)


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks rlhf", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/rlhf.csv, or to this file")
    o = parser.parse_args(argv)
    with threads_set(o.threads):
        sizes = dict(layers=o.layers, width=o.width, vocabulary=o.vocabulary, prompts=o.prompts, new=o.new)
        rows = measure(o.rounds, **sizes)
    show(rows, f"{o.prompts} prompts x {o.new} tokens, {o.layers} layers of {o.width}, {o.threads} threads")
    if o.csv is not None:
        append_csv(Path(o.csv) if o.csv else results_file("rlhf"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
