"""A head of GPT-2's size with its loss, forward and backward: ours, PyTorch's F.linear_cross_entropy by chunks of
several sizes, and what one writes (all logits); in turns in one process, and the memory of each in one of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.train import memory_status, reset_peak
from gptfast import hardware, ops
from gptfast.bench import Spread, ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS, NAIVE = "gptfast", "all logits"


def _chunks(size: int) -> Loss:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        made = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size, acc_policy="compact")
        return F.linear_cross_entropy(x, weight, target, options=made)

    return loss


CONTENDERS: dict[str, Loss] = {
    OURS: ops.linear_cross_entropy,
    "F.linear_cross_entropy, 1024 rows": _chunks(1024),
    "F.linear_cross_entropy, 2048 rows": _chunks(2048),
    NAIVE: lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
}


def data(rows: int, vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, width, generator=g) * 0.02
    target = torch.randint(vocabulary, (rows,), generator=g)
    return torch.randn(rows, width, generator=g).requires_grad_(), weight.requires_grad_(), target


def step(loss: Loss, given: tuple[Tensor, Tensor, Tensor]) -> float:
    x, weight, target = given
    x.grad = weight.grad = None
    made = loss(x, weight, target)
    made.backward()
    return made.item()


def memory(name: str, rows: int, vocabulary: int, width: int) -> int:
    """Of this process: the most that a call takes beyond inputs and gradients, in bytes."""
    step(CONTENDERS[name], data(1024, 700, 64))  # libraries, threads and their workspaces
    x, weight, target = data(rows, vocabulary, width)
    before = memory_status("VmRSS")
    reset_peak()
    step(CONTENDERS[name], (x, weight, target))
    return memory_status("VmHWM") - before - x.nbytes - weight.nbytes


def memory_apart(name: str, rows: int, vocabulary: int, width: int) -> int:
    """memory() in a process of its own."""
    options = [f"--rows={rows}", f"--vocabulary={vocabulary}", f"--width={width}"]
    command = [sys.executable, "-m", "benchmarks", "losses", f"--memory={name}", *options]
    command.append(f"--threads={torch.get_num_threads()}")
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak_bytes"]


def measure(rows: int, vocabulary: int, width: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender: seconds, how many times as fast ours is, peak memory."""
    given, names = data(rows, vocabulary, width), list(CONTENDERS)
    losses = {name: step(CONTENDERS[name], given) for name in names}  # warm-up
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in [*names[i % len(names) :], *names[: i % len(names)]]:
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            step(CONTENDERS[name], given)
            times[name].append(time.perf_counter() - start)
    peaks = {name: memory_apart(name, rows, vocabulary, width) for name in names}
    made = []
    for name in names:
        taken, over = Spread.of(times[name]), ratio(times[name], times[OURS])
        made.append(
            {
                "contender": name,
                "rows": rows,
                "vocabulary": vocabulary,
                "width": width,
                "threads": torch.get_num_threads(),
                "rounds": rounds,
                "loss": round(losses[name], 6),
                "seconds": round(taken.median, 3),
                "gflops": round(6 * rows * vocabulary * width / taken.median / 1e9, 1),
                "gptfast_over": round(over.median, 3),
                "gptfast_over_low": round(over.low, 3),
                "gptfast_over_high": round(over.high, 3),
                "peak_mb": round(peaks[name] / 1e6, 1),
                "percent_of_all_logits": round(100 * peaks[name] / peaks[NAIVE], 1),
            }
        )
    return made


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("head and loss")
    for heading in ("loss", "s", "GFLOP/s", "gptfast is", "quartiles", "peak MB", "of all logits'"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(row["contender"], f"{row['loss']:.5f}", f"{row['seconds']:.2f}", f"{row['gflops']:.0f}"),
            *(f"{row['gptfast_over']:.2f}x", f"{row['gptfast_over_low']:.2f}-{row['gptfast_over_high']:.2f}"),
            *(f"{row['peak_mb']:.0f}", f"{row['percent_of_all_logits']:.0f}%"),
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] = ()) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks losses", description=__doc__)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--rows", type=int, default=2048)
    p.add_argument("--vocabulary", type=int, default=50257)
    p.add_argument("--width", type=int, default=768)
    p.add_argument("--threads", type=int)
    p.add_argument("--memory", choices=list(CONTENDERS), help="measure the memory of this one alone, in this process")
    p.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/losses.csv, or to this file")
    args = p.parse_args(argv)
    sizes = (args.rows, args.vocabulary, args.width)
    with threads_set(args.threads):
        if args.memory:
            print(json.dumps({"peak_bytes": memory(args.memory, *sizes)}))
            return 0
        rows = measure(*sizes, args.rounds)
        show(rows, f"{args.rows} rows, {hardware.machine().cpu}, {torch.get_num_threads()} threads")
    if args.csv is not None:
        append_csv(Path(args.csv) if args.csv else results_file("losses"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
