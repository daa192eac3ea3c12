"""Where the time of a decode step of SmolLM2-135M goes: each kernel's part and the bytes of weights it reads a second;
the time in which a thread waits for the other; and the time in which no thread is in a kernel.

Steps are real ones of a real answer, from one token to the next, so what Python does in between counts as well. Writes
results/<machine>/gaps.csv, and gaps.png: the kernels of the median step on each thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import gptfast
from gptfast import hardware
from gptfast.bench import threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.generate.fuse import Launch
from gptfast.generate.replay import StepTrace, tracing

BITS = {3: 8.5, 4: 4.5, 5: 5.0}  # a weight's, by the format of a linear: Q8_0, Q4_0, Q4_1
COLOURS = {"linear_int8": "#2f6fb0", "linear_exact": "#2f6fb0", "linear": "#2f6fb0", "attention": "#d9822b"}


def busy(step: StepTrace, thread: int) -> list[tuple[int, int, int]]:
    """The times that a thread was in kernels, as (begin, end, launch), in order."""
    found: list[tuple[int, int, int]] = []
    for i in range(len(step.launches)):
        at, end = step.came[i][thread], step.came[i + 1][thread]
        if not at or not end:
            continue
        for begin_wait, end_wait in step.waits[i][thread]:
            found.append((at, begin_wait, i))
            at = end_wait
        found.append((at, end, i))
    return found


def uncovered(step: StepTrace, before: int) -> int:
    """Nanoseconds from `before`, the end of the last step, to this one's end in which no thread was in a kernel."""
    times = sorted((b, e) for thread in range(len(step.came[0])) for b, e, _ in busy(step, thread))
    idle, at = 0, before
    for begin, end in times:
        idle += max(0, begin - at)
        at = max(at, end)
    return idle + max(0, step.end - at)


def kind(launch: Launch) -> tuple[Any, ...]:
    """What launches that are one row of the table have in common."""
    op, _, fields = launch
    return (op, *(fields.get(name) for name in ("rows", "cols", "depth", "format")))


def of(steps: Sequence[StepTrace]) -> tuple[list[dict[str, Any]], dict[str, float], int]:
    """A row for each kind of launch, slowest first; the shares of a whole step; and which step is the median one.

    The first step is only where the second one begins.
    """
    wholes = [step.end - last.end for last, step in pairwise(steps)]
    order = sorted(range(len(wholes)), key=wholes.__getitem__)
    whole, median = statistics.median(wholes), order[len(order) // 2] + 1
    threads = range(len(steps[0].came[0]))
    times: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for step in steps[1:]:
        parts: dict[tuple[Any, ...], float] = defaultdict(float)
        for i, launch in enumerate(step.launches):
            parts[kind(launch)] += step.came[i + 1][0] - step.came[i][0]
        for key, taken in parts.items():
            times[key].append(taken)
    counts = Counter(map(kind, steps[0].launches))
    rows = []
    for key, taken in sorted(times.items(), key=lambda item: -statistics.median(item[1])):
        op, M, N, K, form = key
        us = statistics.median(taken) / 1e3
        bits = BITS.get(form or 0) if op.startswith("linear") else None
        rows.append(
            {
                "kernel": op + (f" {M}x{N}x{K}" if op.startswith("linear") else ""),
                "launches": counts[key],
                "us": round(us, 1),
                "share": round(1e5 * us / whole, 1),
                "gbytes_per_s": None if bits is None else round(counts[key] * N * K * bits / 8e3 / us, 1),
            }
        )
    shares = {"step_us": round(whole / 1e3, 1)}
    idle = [100 * uncovered(step, last.end) / (step.end - last.end) for last, step in pairwise(steps)]
    shares["uncovered_percent"] = round(statistics.median(idle), 2)
    for thread in threads:
        part = [
            100 - 100 * sum(e - b for b, e, _ in busy(step, thread)) / (step.end - last.end)
            for last, step in pairwise(steps)
        ]
        shares[f"thread{thread}_idle_percent"] = round(statistics.median(part), 2)
    return rows, shares, median


def plot(step: StepTrace, before: int, path: Path, title: str) -> None:
    """The kernels of one step on each thread, from the end of the last one."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, 2.4))
    axes = figure.subplots()
    names: dict[str, str] = {}
    threads = len(step.came[0])
    for thread in range(threads):
        for begin, end, i in busy(step, thread):
            op = step.launches[i][0]
            kind = "linear" if op.startswith("linear") else op if op == "attention" else "others"
            names[kind] = COLOURS.get(op, "#777777")
            axes.broken_barh([((begin - before) / 1e3, (end - begin) / 1e3)], (thread - 0.4, 0.8), color=names[kind])
    axes.set_yticks(range(threads), [f"thread {t}" for t in range(threads)], fontsize=8)
    axes.set_xlim(0, (step.end - before) / 1e3)
    axes.set_xlabel("microseconds after the token before; white: not in a kernel", loc="left")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colour, label=name) for name, colour in names.items()]
    axes.legend(handles=handles, fontsize=8, frameon=False, ncols=3, loc="upper right", bbox_to_anchor=(1, -0.1))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def show(rows: Sequence[dict[str, Any]], shares: dict[str, float], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("kernel", "launches", "us a step", "% of it", "GB/s"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right", no_wrap=True)
    for row in rows:
        rate = "" if row["gbytes_per_s"] is None else f"{row['gbytes_per_s']:.1f}"
        table.add_row(row["kernel"], str(row["launches"]), f"{row['us']:.1f}", f"{row['share']:.1f}", rate)
    console = Console(width=120)
    console.print(table)
    idle = ", ".join(f"thread {t} is idle in {v}%" for t, v in enumerate(list(shares.values())[2:]))
    nobody = f"In {shares['uncovered_percent']}% of it no thread is in a kernel"
    console.print(f"A step takes {shares['step_us'] / 1e3:.2f} ms. {nobody}; {idle}.", highlight=False)


def measure(lm: gptfast.LanguageModel, context: int, new: int) -> list[StepTrace]:
    """The steps of one answer of `new` tokens to a prompt of `context`, after one that records them."""
    prompt = [100 + i % 1000 for i in range(context)]
    options: dict[str, Any] = dict(max_new_tokens=new, min_new_tokens=0, temperature=0.0, seed=1)
    lm.generate(prompt, **options)
    with tracing() as traced:
        lm.generate(prompt, **options)
    return traced.steps()[4:]  # the first ones wake the threads


def main(argv: Sequence[str] = ()) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks gaps", description=__doc__)
    p.add_argument("--context", type=int, default=128, help="tokens of the prompt")
    p.add_argument("--new", type=int, default=100, help="tokens to write")
    p.add_argument("--quick", action="store_true", help="20 tokens")
    p.add_argument("--threads", type=int)
    args = p.parse_args(argv)
    with threads_set(args.threads):
        lm = gptfast.load("smollm2", activations="int8")
        steps = measure(lm, args.context, 20 if args.quick else args.new)
        if len(steps) < 2 or not steps[0].came[0][0]:
            print("gaps: needs at least 2 threads and an answer of more than 5 tokens", file=sys.stderr)
            return 1
        rows, shares, median = of(steps)
        title = f"SmolLM2-135M, int8 activations, a step after {args.context} tokens, {hardware.machine().cpu}"
        show(rows, shares, title)
        settings = {"threads": torch.get_num_threads(), "context": args.context}
        path = results_file("gaps")
        append_csv(path, [settings | row | shares for row in rows])
        plot(steps[median], steps[median - 1].end, path.with_suffix(".png"), title)
    return 0
