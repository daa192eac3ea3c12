"""The rows as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.measure import COLUMNS

OURS, THEIRS = "#3b6fb6", "#b9b9b9"


def by_contender(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """ "engine weights" -> column -> row."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(f"{row['engine']} {row['weights']}", {})[row["column"]] = row
    return found


def best_rival(rows: Sequence[Mapping[str, Any]], column: str) -> Mapping[str, Any] | None:
    """The row of the fastest engine but gptfast."""
    rivals = [row for row in rows if row["column"] == column and row["engine"] != "gptfast"]
    return max(rivals, key=lambda row: row["tokens_per_s"], default=None)


def show(rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str], title: str) -> None:
    """Prints tokens/s, the best of each column in bold; then what gptfast's first contender is to the best rival."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("engine and weights", no_wrap=True)
    for heading in (*COLUMNS, "of reading", "peak MB", "load s", "nats"):
        table.add_column(heading, justify="right")
    best = {name: max(row["tokens_per_s"] for row in rows if row["column"] == name) for name in COLUMNS}
    for name, of in by_contender(rows).items():
        speeds = [of[c]["tokens_per_s"] for c in COLUMNS]
        cells = [f"[bold]{s:.0f}[/]" if s == b else f"{s:.0f}" for s, b in zip(speeds, best.values())]
        one = of["decode"]
        share = f"{one['read_percent']:.0f}%"
        table.add_row(name, *cells, share, str(one["peak_mb"]), f"{one['load_s']:.2f}", f"{one['nats_per_token']:.2f}")
    rivals = [best_rival(rows, name) for name in COLUMNS]
    if all(rivals):
        table.add_section()
        over = [
            f"{r['gptfast_over']:.2f}x [{r['gptfast_over_low']:.2f}-{r['gptfast_over_high']:.2f}]" for r in rivals if r
        ]
        table.add_row("gptfast over the best rival", *over)
    console = Console(width=150, highlight=False)
    console.print(table)
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}", style="dim", markup=False)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """One panel a column: bars of tokens/s with the quartiles as whiskers."""
    from matplotlib.figure import Figure

    names = list(by_contender(rows))[::-1]
    figure = Figure(figsize=(3 * len(COLUMNS), 1.2 + 0.3 * len(names)), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS):
        for y, name in enumerate(names):
            row = by_contender(rows)[name][column]
            axes.barh(y, row["tokens_per_s"], color=OURS if row["engine"] == "gptfast" else THEIRS, height=0.72)
            axes.plot([row["low"], row["high"]], [y, y], color="#222222", linewidth=1)
            axes.annotate(
                f"{row['tokens_per_s']:.0f}",
                (row["high"], y),
                textcoords="offset points",
                xytext=(4, 0),
                va="center",
                fontsize=8,
            )
        axes.set_xlim(0, 1.2 * max(row["high"] for row in rows if row["column"] == column))
        axes.set_title(f"{column}, tokens/s", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
