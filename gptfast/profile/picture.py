"""The picture of what bounds kernels: for each, the cycles that every unit of a multiprocessor needs for one turn of
its longest loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptfast.profile.aot import Compiled
from gptfast.profile.bound import UNITS, turn

COLOURS = dict(zip((*UNITS, "DRAM"), ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#bbbbbb")))


def draw(found: Sequence[Compiled], path: Path) -> None:
    """A group of bars for each kernel that compiled, on a logarithmic axis: the longest one but DRAM's is its bound.

    Raises ValueError if there is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    kernels = [(c, turn(c.resources, c.arch)) for c in found if c.resources is not None]
    if not kernels:
        raise ValueError("expected a kernel that compiles, to draw it; got none")
    figure = Figure(figsize=(9, 1.2 + 0.62 * len(kernels)), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(COLOURS)
    for n, (_, one) in enumerate(kernels):
        for k, unit in enumerate(COLOURS):
            cycles = one.dram if unit == "DRAM" else one.cycles.get(unit, 0)
            if cycles < 1:
                continue
            at = n + (k - (len(COLOURS) - 1) / 2) * width
            axes.barh(at, cycles, height=width * 0.9, color=COLOURS[unit], zorder=2)
            if unit == one.bound:
                axes.text(cycles * 1.05, at, f"{cycles:,.0f}", va="center", fontsize=7)
    names = [
        f"{c.kernel.strip('_').removesuffix('_kernel')}\n{c.call}, {c.arch}"
        + ("" if "matrix" in one.cycles else "\nmatrix: not known")
        for c, one in kernels
    ]
    axes.set_yticks(range(len(kernels)), names, fontsize=8)
    axes.set_ylim(len(kernels) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(left=10)
    axes.set_xlabel("cycles of one multiprocessor for a turn of the longest loop, each unit alone (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    labels = {
        "issue": "instructions",
        "DRAM": "DRAM, if nothing is in a cache",
        "special": "exp2 and the like",
    }
    handles = [Patch(color=colour, label=labels.get(unit, unit)) for unit, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
