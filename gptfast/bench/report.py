"""Results for the eye: a table in the terminal, bars in a picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast.bench.ops import CONTENDERS, Row
from gptfast.bench.timing import Spread, geometric_mean

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = "needs the packages of the extra: pip install 'gptfast-kernels[bench]'"
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
COLOURS = {"float32": "#3b6fb6", "bfloat16": "#d1742b", "float16": "#5a9c54"}


def seconds(value: float) -> str:
    """A time in the unit that leaves it between 1 and 1,000."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def table(rows: Sequence[Row], title: str) -> Table:
    """All rows: time, how many times faster than each rival (quartiles in brackets), rates, share of the roofline."""
    try:
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise RuntimeError(f"the table {PACKAGES}") from error
    rivals = [name for name in CONTENDERS[1:] if any(name in row.ratios or name in row.skipped for row in rows)]
    out = Table(title=title, title_justify="left")
    out.add_column("op/case", overflow="fold")
    out.add_column("dtype")
    for heading in ("time", *(f"over {name}" for name in rivals), "GB/s", "GFLOP/s", "roofline"):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        name = f"{row.op}/{row.case}" + " (on the reference)" * (row.backend == "reference")
        dtype = SHORT[row.dtype]
        if not row.check.passed:
            verdict = f"WRONG: error {row.check.error:.2g}, limit {row.check.limit:.2g}; not timed"
            out.add_row(name, dtype, Text(verdict, style="bold red"))
            continue
        percent = row.roofline_percent
        cells = [
            seconds(row.times["gptfast"].median),
            *(_ratio(row.ratios[r]) if r in row.ratios else Text("-", style="dim") for r in rivals),
            f"{row.gbytes_per_s:.3g}",
            f"{row.gflops:.3g}",
            "-" if percent is None else f"{percent:.0f}%",
        ]
        out.add_row(name, dtype, *cells)
    means = [geometric_mean([row.ratios[r].median for row in rows if r in row.ratios]) for r in rivals]
    out.add_section()
    out.add_row("geometric mean", "", "", *(f"{m:.2f}x" for m in means))
    return out


def show(rows: Sequence[Row], title: str) -> None:
    """Prints the table, then the reason of each contender that couldn't run."""
    shown = table(rows, title)
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(shown)
    for row in rows:
        for name, reason in row.skipped.items():
            console.print(f"{row.op}/{row.case} {row.dtype}: no {name}: {reason}", style="dim", markup=False)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars: how many times faster than eager PyTorch, quartiles as whiskers, the share of the roofline beside each."""
    figure, axes = _figure((9, 1.2 + 0.32 * sum("eager" in row.ratios for row in rows)))
    timed = [row for row in rows if "eager" in row.ratios][::-1]
    for y, row in enumerate(timed):
        speed = row.ratios["eager"]
        axes.barh(y, speed.median - 1, left=1, color=COLOURS[row.dtype], height=0.72, zorder=2)
        axes.plot([speed.low, speed.high], [y, y], color="#222222", linewidth=1, zorder=3)
        share = "" if row.roofline_percent is None else f"   {row.roofline_percent:.0f}% of roofline"
        axes.annotate(
            f"{speed.median:.3g}x{share}",
            (max(speed.high, 1), y),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(timed)), [f"{row.op}  {row.case}" for row in timed], fontsize=8)
    axes.set_ylim(-0.7, len(timed) - 0.3)
    axes.set_xscale("log", base=2)
    highest = max((row.ratios["eager"].high for row in timed), default=1.0)
    lowest = min((row.ratios["eager"].low for row in timed), default=1.0)
    axes.set_xlim(min(0.8, lowest * 0.9), max(2.0, highest) ** 1.45)
    shown = [2.0**e for e in range(-6, 13) if axes.get_xlim()[0] <= 2.0**e <= highest * 1.2]
    ticks = [x for x in shown if len(shown) <= 9 or math.log2(x) % 2 == 0]
    axes.set_xticks(ticks, [f"{x:g}x" for x in ticks])
    axes.axvline(1, color="#222222", linewidth=1, zorder=1)
    axes.set_xlabel("times as fast as eager PyTorch (log scale)")
    axes.set_title(title, loc="left", fontsize=10)
    from matplotlib.patches import Patch

    used = dict.fromkeys(row.dtype for row in rows)
    axes.legend(handles=[Patch(color=COLOURS[d], label=d) for d in used], fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    """A picture without pyplot, whose global state and choice of a window system are not wanted in a library."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"the picture {PACKAGES}") from error
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    return figure, axes


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.3g}x [{spread.low:.3g}-{spread.high:.3g}]"
