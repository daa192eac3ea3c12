"""How cost grows: attention with the sequence, decode with the context, sampling with the vocabulary, linear with rows.

Each point is checked against the op's reference, then timed beside eager PyTorch. Theory says what the slope on log-log
paper comes to: 2 for causal prefill, 1 for the others, 0 while a linear's weights cost more than its rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptfast import bench, hardware, ops
from gptfast.bench.record import append_csv, flat, results_file
from gptfast.bench.report import seconds
from gptfast.ops.spec import Inputs


@dataclass(frozen=True)
class Series:
    """An op's arguments as a function of one size; the slope its cost has for large sizes."""

    name: str
    op: str
    along: str
    sizes: Sequence[int]
    make: Callable[[Inputs, int], dict[str, Any]]
    slope: float


def prefill(i: Inputs, S: int) -> dict[str, Any]:
    return {"q": i.randn(1, S, 4, 64), "k": i.randn(1, S, 4, 64), "v": i.randn(1, S, 4, 64), "causal": True}


def decode(i: Inputs, context: int, batch: int = 1) -> dict[str, Any]:
    cache = (batch, context, 3, 64)
    return {
        "q": i.randn(batch, 1, 9, 64),
        "k_cache": i.randn(*cache),
        "v_cache": i.randn(*cache),
        "lengths": torch.full((batch,), context, dtype=torch.int32),
    }


def sampling(i: Inputs, V: int) -> dict[str, Any]:
    return {"logits": i.randn(1, V, scale=3.0), "top_k": 50, "top_p": 0.95, "seed": 1}


def linear(i: Inputs, rows: int) -> dict[str, Any]:
    return {"x": i.randn(rows, 768), "weight": i.randn(3072, 768, scale=0.03)}


SERIES = (
    Series("causal prefill", "attention", "sequence", (128, 256, 512, 1024, 2048, 4096), prefill, 2),
    Series("decode", "attention_kvcache", "context", (128, 512, 2048, 8192), decode, 1),
    Series("decode at 1024", "attention_kvcache", "batch", (1, 2, 4, 8, 16), lambda i, b: decode(i, 1024, b), 1),
    Series("sample top-k, top-p", "sample", "vocabulary", (1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18), sampling, 1),
    Series("linear 768 -> 3072", "linear", "rows", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), linear, 1),
)


def slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    """The exponent between the two largest sizes."""
    return math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])


def measure(series: Series, dtype: torch.dtype, rounds: int) -> list[bench.Row]:
    op, rows = ops.pages()[series.op], []
    for size in series.sizes:
        arguments = series.make(Inputs(dtype, f"{series.name}{size}"), size)
        rows.append(bench.measure(op, f"{series.along}={size}", arguments, rounds=rounds, dtype=dtype))
    return rows


def show(series: Series, rows: Sequence[bench.Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    times = {name: [row.times[name].median for row in rows] for name in ("gptfast", "eager")}
    title = (
        f"{series.name}: grows as size^{slope(series.sizes, times['gptfast']):.2f} at the end, theory {series.slope:g}"
    )
    table = Table(title=title, title_justify="left")
    for heading in (series.along, "gptfast", "eager", "over eager", "roofline"):
        table.add_column(heading, justify="right")
    for size, row, ours, eager in zip(series.sizes, rows, times["gptfast"], times["eager"]):
        share = "-" if row.roofline_percent is None else f"{row.roofline_percent:.0f}%"
        table.add_row(f"{size:,}", seconds(ours), seconds(eager), f"{row.ratios['eager'].median:.2f}x", share)
    Console(width=100).print(table)


def plot(found: Sequence[tuple[Series, Sequence[bench.Row]]], path: Path, title: str) -> None:
    """One log-log panel for each series: both contenders, the roofline, and a line of the slope that theory gives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 3.4), layout="constrained")
    for axes, (series, rows) in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        for name, colour in (("gptfast", "#3b6fb6"), ("eager", "#d1742b")):
            times = [row.times[name] for row in rows]
            axes.plot(series.sizes, [t.median * 1e6 for t in times], "o-", color=colour, label=name, markersize=3)
            axes.fill_between(
                series.sizes, [t.low * 1e6 for t in times], [t.high * 1e6 for t in times], color=colour, alpha=0.2
            )
        if all(row.roofline for row in rows):
            bound = [(row.roofline or 0) * 1e6 for row in rows]
            axes.plot(series.sizes, bound, ":", color="#555555", label="roofline")
        last = rows[-1].times["gptfast"].median * 1e6
        guide = [last * (size / series.sizes[-1]) ** series.slope for size in series.sizes]
        axes.plot(series.sizes, guide, "--", color="#bbbbbb", label=f"size^{series.slope:g}", zorder=0)
        axes.set(xscale="log", yscale="log", xlabel=series.along)
        axes.set_xscale("log", base=2)
        axes.set_title(series.name, fontsize=10)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("microseconds per call")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] = ()) -> int:
    """Returns 0; 1 if a point was wrong."""
    p = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    p.add_argument("--quick", action="store_true", help="3 rounds")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--threads", type=int)
    args = p.parse_args(argv)
    found, wrong = [], 0
    with bench.threads_set(args.threads):
        for series in SERIES:
            rows = measure(series, torch.float32, 3 if args.quick else args.rounds)
            if any(not row.check.passed for row in rows):
                print(
                    f"{series.name}: WRONG at {', '.join(row.case for row in rows if not row.check.passed)}; not shown"
                )
                wrong += 1
                continue
            show(series, rows)
            append_csv(results_file("scaling"), [flat(row) for row in rows])
            found.append((series, rows))
        here = hardware.machine()
        title = f"{here.cpu}, {here.isa}, {torch.get_num_threads()} threads, fp32"
    if found:
        plot(found, results_file("scaling").with_suffix(".png"), title)
    return 1 if wrong else 0
