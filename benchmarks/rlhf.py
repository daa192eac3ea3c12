"""An iteration of PPO as a recipe's preset has it (rollouts, the models' looks at them, epochs of minibatches), from
random weights: on the kernels and on the reference ops, in turns in one process, from the same weights.

Prompts are 8 to 24 random tokens and no answer ends before the last token, so that both do the same work. Learning is
told apart into its forward passes, backward passes and AdamW. Processor seconds, of all threads, say more than the
clock's where others use the machine, but count what waiting threads spin. How they wait is OMP_WAIT_POLICY, which
`gptfast train` sets to PASSIVE, and a row says it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.bench import ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S, Spread
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT
from gptfast.train.ppo import PPO, PPOConfig
from gptfast.train.presets import recipe_preset
from gptfast.train.recipe import new_reward
from gptfast.train.trainer import make_optimizer

OURS, REFERENCE = "gptfast", "reference ops"
BACKENDS = {OURS: None, REFERENCE: "reference"}
PARTS = ("rollout", "look", "forward", "backward", "adamw")


class Iteration:
    """PPO as its trainer drives it, one iteration a call."""

    def __init__(self, backend: str | None, preset: str, prompts: int, new: int) -> None:
        torch.manual_seed(0)
        recipe = recipe_preset(preset)
        policy = GPT(recipe.config(recipe.vocab_size, None, ()))
        judge = new_reward(recipe, recipe.config(recipe.vocab_size, None, (), recipe.reward_model), 0)
        for model in (policy, *(member.backbone for member in judge.each_model())):
            model.backend = backend  # the reference and the value model are copies
        draw = torch.Generator().manual_seed(1)
        ids = [
            torch.randint(recipe.vocab_size, (int(torch.randint(8, 25, (), generator=draw)),), generator=draw).tolist()
            for _ in range(4 * prompts)
        ]
        dials: dict[str, Any] = dict(prompts_per_step=prompts, max_new_tokens=new, missing_end_penalty=0.0)
        config = PPOConfig(**(recipe.stages.get("ppo", {}) | dials))
        self.stage = PPO(config, policy, _bytes(), ids, judge)
        self.optimizer = make_optimizer(self.stage.modules, config)
        self.optimizer.backend = backend
        self.steps = 0
        self.spent: dict[str, float] = {"forward": 0.0, "adamw": 0.0}
        self.stage.loss = self._timed("forward", self.stage.loss)
        self.optimizer.step = self._timed("adamw", self.optimizer.step)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            made = function(*arguments)
            self.spent[name] += time.perf_counter() - start
            return made

        return run

    def __call__(self) -> dict[str, float]:
        """The trainer's figures, and the seconds of the iteration and of its parts."""
        self.spent = dict.fromkeys(self.spent, 0.0)
        start, processor = time.perf_counter(), time.process_time()
        found = self.stage.step(self.steps, self.optimizer)
        found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - processor}
        self.steps += 1
        found |= self.spent | {part: found[f"time/{part}"] for part in ("rollout", "look", "learn")}
        return found | {"backward": found["learn"] - self.spent["forward"] - self.spent["adamw"]}


def _bytes() -> Tokenizer:
    """A tokenizer of bytes: prompts are token ids, and what ids beyond it stand for is nothing."""
    from gptfast.formats.extras import need

    library = need("tokenizers", "models")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    fast = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    fast.decoder = library.decoders.ByteLevel()
    return Tokenizer(fast)


def measure(rounds: int, preset: str, prompts: int, new: int) -> list[dict[str, Any]]:
    """One row for each contender: seconds an iteration, where they go, how many times as fast as the reference."""
    made = {name: Iteration(backend, preset, prompts, new) for name, backend in BACKENDS.items()}
    first = {name: call() for name, call in made.items()}
    apart = abs(first[OURS]["policy/loss"] - first[REFERENCE]["policy/loss"])
    if first[OURS]["objective/length"] != first[REFERENCE]["objective/length"] or apart > 1e-3:
        raise RuntimeError(f"expected the same iteration of both, got policy losses {apart} apart")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in made}
    for i in range(rounds):
        for name in sorted(made, reverse=bool(i % 2)):
            time.sleep(SETTLE_S)
            found[name].append(made[name]())
    return [_row(name, found, preset=preset, prompts=prompts, new=new) for name in made]


def _row(name: str, found: dict[str, list[dict[str, float]]], **sizes: Any) -> dict[str, Any]:
    def times(key: str, of: str = name) -> list[float]:
        return [iteration[key] for iteration in found[of]]

    row: dict[str, Any] = {"contender": name, **sizes, "threads": torch.get_num_threads(), "rounds": len(found[name])}
    row["waiting"] = os.environ.get("OMP_WAIT_POLICY", "default").lower()
    row["seconds"] = round(Spread.of(times("seconds")).median, 3)
    row |= {f"{part}_s": round(Spread.of(times(part)).median, 3) for part in (*PARTS, "learn", "cpu")}
    for key, column in (
        ("seconds", "over"),
        ("rollout", "rollout"),
        ("look", "look"),
        ("learn", "learn"),
        ("cpu", "cpu"),
    ):
        over = ratio(times(key, REFERENCE), times(key))
        row |= {f"{column}_{end}": round(getattr(over, end), 3) for end in ("median", "low", "high")}
    return row


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("PPO iteration")
    for heading in ("s", "rollouts", "looks", "forward", "backward", "AdamW", "processor s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seconds = [f"{row[key]:.2f}" for key in ("seconds", *(f"{part}_s" for part in PARTS), "cpu_s")]
        table.add_row(row["contender"], *seconds)
    Console(width=140).print(table)
    ours = rows[0]
    for what, column in (
        ("iteration", "over"),
        ("rollouts", "rollout"),
        ("looks", "look"),
        ("learning", "learn"),
        ("processor", "cpu"),
    ):
        spread = f"({ours[f'{column}_low']:.2f}-{ours[f'{column}_high']:.2f})"
        print(f"{what:>10}: {ours[f'{column}_median']:.2f}x the reference ops {spread}")


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks rlhf", description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--preset", default="tiny", help="a recipe's: its models and PPO's dials")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/rlhf.csv, or to this file")
    o = parser.parse_args(argv)
    with threads_set(o.threads):
        rows = measure(o.rounds, o.preset, o.prompts, o.new)
    waiting = rows[0]["waiting"]
    show(rows, f"{o.preset}: {o.prompts} prompts x {o.new} tokens, {o.threads} threads, idle ones wait: {waiting}")
    if o.csv is not None:
        append_csv(Path(o.csv) if o.csv else results_file("rlhf"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
