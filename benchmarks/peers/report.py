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


def by_bits(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """The rows of engines that compete, by the bits of their weights."""
    return {bits: [row for row in rows if row["bits"] == bits] for bits in dict.fromkeys(row["bits"] for row in rows)}


def best_rival(rows: Sequence[Mapping[str, Any]], column: str) -> Mapping[str, Any] | None:
    """The row of the fastest engine but gptfast."""
    rivals = [row for row in rows if row["column"] == column and row["engine"] != "gptfast"]
    return max(rivals, key=lambda row: row["tokens_per_s"], default=None)


def show(rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str], title: str) -> None:
    """Prints tokens/s, the best of each column and number of bits in bold, and what gptfast is to the best rival."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("engine and weights", no_wrap=True)
    prompts = {row["column"]: row["prompt"] for row in rows}
    names = [f"decode at {prompts[column]}" if column == "decode long" else column for column in COLUMNS]
    for heading in (*names, "of reading", "peak MB", "load s", "nats"):
        table.add_column(heading, justify="right")
    for bits, competing in by_bits(rows).items():
        table.add_section()
        best = {name: max(row["tokens_per_s"] for row in competing if row["column"] == name) for name in COLUMNS}
        for name, of in by_contender(competing).items():
            speeds = [of[c]["tokens_per_s"] for c in COLUMNS]
            cells = [f"[bold]{s:.0f}[/]" if s == b else f"{s:.0f}" for s, b in zip(speeds, best.values())]
            one = of["decode"]
            share = f"{one['read_percent']:.0f}% of {one['read_gbytes_per_s']:.0f}"
            table.add_row(
                name, *cells, share, str(one["peak_mb"]), f"{one['load_s']:.2f}", f"{one['nats_per_token']:.2f}"
            )
        rivals = [best_rival(competing, name) for name in COLUMNS]
        if all(rivals):
            over = [
                f"{r['gptfast_over']:.2f}x [{r['gptfast_over_low']:.2f}-{r['gptfast_over_high']:.2f}]"
                for r in rivals
                if r
            ]
            table.add_row(f"gptfast over the best at {bits} bits", *over, style="italic")
    console = Console(width=170, highlight=False)
    console.print(table)
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}", style="dim", markup=False)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """One panel a column: bars of tokens/s with the quartiles as whiskers, a gap between numbers of bits."""
    from matplotlib.figure import Figure

    groups = [by_contender(competing) for competing in by_bits(rows).values()]
    places: dict[str, float] = {}
    for gap, group in enumerate(groups):
        places |= {name: -(len(places) + i) - 0.6 * gap for i, name in enumerate(group)}
    figure = Figure(figsize=(3 * len(COLUMNS), 1.2 + 0.3 * len(places)), layout="constrained")
    found = by_contender(rows)
    for axes, column in zip(figure.subplots(1, len(COLUMNS), sharey=True), COLUMNS):
        for name, y in places.items():
            row = found[name][column]
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
        of_column = [row for row in rows if row["column"] == column]
        axes.set_xlim(0, 1.2 * max(row["high"] for row in of_column))
        heading = f"decode at {of_column[0]['prompt']}" if column == "decode long" else column
        axes.set_title(f"{heading}, tokens/s", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yticks(list(places.values()), list(places), fontsize=8)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
