"""Rollouts of a small GPT-2 (64 prompts of 8 to 24 tokens, 48 new ones each, from the whole distribution): ours, on
packed and on live weights, and transformers' generate() with its cache and SDPA, in turns in one process.

Each of our rollouts takes the weights anew, as it does in training; the rival's model has them already.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.bench import ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S, Spread
from gptfast.model import GPT
from gptfast.train.rollout import Rollout, Samples

OURS, LIVE, THEIRS = "gptfast, packed", "gptfast, live", "transformers"


def contenders(prompts: int, new: int, layers: int, width: int, vocabulary: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. Nothing ends before `new` tokens, so that all do the same work."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(n_layer=layers, n_embd=width, n_head=width // 64, vocab_size=vocabulary)
    config = GPT2Config(n_positions=256, bos_token_id=0, eos_token_id=0, **sizes)
    theirs: Any = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval()
    ours = GPT.from_huggingface_model(theirs)
    ours.config = ours.config.replace(eos_ids=())
    draw = random.Random(0)
    ids = [[draw.randrange(1, vocabulary) for _ in range(draw.randrange(8, 25))] for _ in range(prompts)]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in ids])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in ids])
    rollouts = {OURS: Rollout(ours), LIVE: Rollout(ours, packed=False)}
    step = iter(range(1 << 30))

    def rival() -> Any:
        options: dict[str, Any] = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)
        with torch.inference_mode():
            return theirs.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options
            )

    def own(rollout: Rollout) -> Callable[[], Samples]:
        return lambda: rollout(ids, step=next(step), max_new_tokens=new)

    first = [rollout(ids, max_new_tokens=new) for rollout in rollouts.values()]
    if first[0].responses != first[1].responses or {len(r) for r in first[0].responses} != {new}:
        raise RuntimeError("rollouts on packed and on live weights differ, or aren't of the length asked for")
    return {name: own(rollout) for name, rollout in rollouts.items()} | {THEIRS: rival}


def measure(rounds: int, prompts: int, new: int, **sizes: int) -> list[dict[str, Any]]:
    """One row for each contender: seconds a batch of rollouts, and how many times as fast as transformers."""
    calls = contenders(prompts, new, **sizes)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for name in names:
        calls[name]()
    for i in range(rounds):
        for name in [*names[i % len(names) :], *names[: i % len(names)]]:
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    rows = []
    for name in names:
        spread, over = Spread.of(times[name]), ratio(times[THEIRS], times[name])
        row: dict[str, Any] = {"contender": name, "prompts": prompts, "new": new, **sizes}
        row |= {"threads": torch.get_num_threads(), "seconds": round(spread.median, 4)}
        row |= {"tokens_per_s": round(prompts * new / spread.median, 1), "over_transformers": round(over.median, 3)}
        rows.append(row | {"over_low": round(over.low, 3), "over_high": round(over.high, 3)})
    return rows


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("rollouts")
    for heading in ("s", "tokens/s", "over transformers"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        over = f"{row['over_transformers']:.2f}x ({row['over_low']:.2f}-{row['over_high']:.2f})"
        table.add_row(row["contender"], f"{row['seconds']:.3f}", f"{row['tokens_per_s']:.0f}", over)
    Console(width=140).print(table)


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks rollouts", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/rollouts.csv, or to this file")
    o = parser.parse_args(argv)
    with threads_set(o.threads):
        sizes = dict(layers=o.layers, width=o.width, vocabulary=o.vocabulary)
        rows = measure(o.rounds, o.prompts, o.new, **sizes)
    show(rows, f"{o.prompts} prompts x {o.new} tokens, {o.layers} layers of {o.width}, {o.threads} threads")
    if o.csv is not None:
        append_csv(Path(o.csv) if o.csv else results_file("rollouts"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
