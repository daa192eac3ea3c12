"""Proposes tiles: a shipped call's kernels compiled with other warps, stages and blocks than tiles.py gives them, on an
architecture that needn't be here. Blocks that decide the order of summation stay as they are: no machine may change a
result. What spills or doesn't fit is left out; of the rest those come first that need the fewest cycles for an element
of the tile by gptfast.profile.bound, of equals the one with more warps on a multiprocessor. With --time, on a GPU of
that architecture, tiles with the blocks that ship are also timed. It chooses nothing: what it finds is written down,
and tiles.py names the limit that a choice touches.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from gptfast.kernels import reason_missing
from gptfast.profile import aot, bound, shipped

FILE = Path(__file__).parent / "results" / "tiles.csv"
# Blocks that decide no order of summation, by kernel.
FREE = {
    "_attention_kernel": ("BLOCK_M",),
    "_attention_dq_kernel": ("BLOCK_M",),
    "_attention_dkdv_kernel": ("BLOCK_N",),
    "_chunk_kernel": ("BLOCK_M",),
    "_linear_kernel": ("BLOCK_N", "BLOCK_R"),
    "_linear_quantised_kernel": ("BLOCK_N", "BLOCK_R"),
    "_product_kernel": ("BLOCK_M", "BLOCK_N"),
}
FIELDS = ("call", "arch", "kernel", "tile", "ships", "registers", "shared", "occupancy", "bound", "cycles", "us")


@dataclass(frozen=True)
class Candidate:
    """A tile of one kernel, all launches of it together."""

    options: dict[str, int]
    ships: bool
    registers: int
    shared: int
    occupancy: float
    bound: str
    cycles: float  # of the bound, for an element of the tile, relative to the tile that ships
    us: float | None = None


def neighbours(shipped_options: dict[str, int], kernel: str) -> Iterator[dict[str, int]]:
    """The tile that ships, and those with half or twice of its warps and free blocks, with 1 to 4 stages."""
    choices: dict[str, list[int]] = {"num_warps": [], "num_stages": [1, 2, 3, 4]}
    warps = shipped_options["num_warps"]
    choices["num_warps"] = [w for w in (warps // 2, warps, 2 * warps) if 1 <= w <= 16]
    for name in FREE.get(kernel, ()):
        size = shipped_options[name]
        choices[name] = [b for b in (size // 2, size, 2 * size) if 16 <= b <= 256]
    names = list(choices)
    for values in itertools.product(*choices.values()):
        yield dict(zip(names, values))


def search(call: str, arch: str, kernel: str, progress: Progress) -> list[Candidate]:
    """The candidates for one kernel of a call, the best first; empty if the call doesn't launch it."""
    [first, *_] = [c for c in aot.compiled_apart([(call, arch, kernel)])] or [None]
    if first is None:
        return []
    names = ("num_warps", "num_stages", *FREE.get(kernel, ()))
    ours = {name: int(first.options[name]) for name in names}
    todo = list(neighbours(ours, kernel))
    task = progress.add_task(f"{kernel.strip('_').removesuffix('_kernel')}, {arch}", total=len(todo))
    found: dict[str, list[aot.Compiled]] = {}
    for compiled in aot.compiled_apart([(call, arch, kernel, options) for options in todo]):
        options = {name: int(compiled.options[name]) for name in names} if compiled.options else {}
        found.setdefault(json.dumps(options), []).append(compiled)
        progress.update(task, completed=len(found))
    progress.remove_task(task)
    good = [
        _candidate(json.loads(options), launches, ours)
        for options, launches in found.items()
        if all(c.resources and not c.resources["spills"] and c.resources["fits"] for c in launches)
    ]
    base = next((c.cycles for c in good if c.ships), 1.0)
    ranked = [Candidate(**{**vars(c), "cycles": c.cycles / base}) for c in good]
    return sorted(ranked, key=lambda c: (round(c.cycles, 2), -c.occupancy))


def _candidate(options: dict[str, int], launches: list[aot.Compiled], ours: dict[str, int]) -> Candidate:
    turns = [(c, bound.turn(c.resources, c.arch)) for c in launches if c.resources is not None]
    elements = math.prod(size for name, size in options.items() if name.startswith("BLOCK"))
    slowest, turn = max(turns, key=lambda pair: pair[1].cycles[pair[1].bound])
    resources: dict[str, Any] = slowest.resources or {}
    return Candidate(
        options=options,
        ships=options == ours,
        registers=max(c.resources["registers"] for c, _ in turns if c.resources),
        shared=resources["shared"],
        occupancy=min(c.resources["occupancy"] for c, _ in turns if c.resources),
        bound=turn.bound,
        cycles=turn.cycles[turn.bound] / elements,
    )


def timed(call: str, kernel: str, candidates: list[Candidate]) -> list[Candidate]:
    """The same with the microseconds of the whole call, forward and backward, where a tile has the blocks that ship."""
    import torch
    from triton.testing import do_bench

    import gptfast.kernels.triton as triton
    from gptfast import ops
    from gptfast.ops.spec import Inputs, leaves, map_tensors, outputs

    name, _, dtype = call.rpartition(" ")
    page, make = shipped.CALLS[name]
    op = ops.pages()[page]
    arguments = map_tensors(torch.Tensor.cuda, make(Inputs(shipped.DTYPES[dtype], call)))

    def run() -> None:
        given = leaves(op, arguments) if op.differentiable else arguments
        results = [r for r in outputs(op.function(**given, backend="triton")) if r.requires_grad]
        if results:
            torch.autograd.backward(results, [torch.ones_like(r) for r in results])

    ours = next((c.options for c in candidates if c.ships), None)
    result = []
    for c in candidates:
        us = None
        if ours and all(c.options[n] == ours[n] for n in ours if n.startswith("BLOCK")):
            with triton.changed(kernel, num_warps=c.options["num_warps"], num_stages=c.options["num_stages"]):
                us = 1e3 * float(do_bench(run, return_mode="median"))  # pyright: ignore[reportArgumentType]
        result.append(Candidate(**{**vars(c), "us": us}))
    return sorted(result, key=lambda c: (c.us is None, c.us))


def written(options: dict[str, int]) -> str:
    return " ".join(f"{name.removeprefix('num_').lower()} {value}" for name, value in options.items())


def shown(call: str, arch: str, kernel: str, candidates: list[Candidate], most: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="bold")
    table.title = f"\n{call}, {arch}: {kernel.strip('_').removesuffix('_kernel')}"
    for name in ("tile", "registers", "KiB", "occupancy", "bound", "cycles", "us", ""):
        table.add_column(name, justify="left" if name == "tile" else "right")
    best = candidates[:most]
    for c in best + [c for c in candidates[most:] if c.ships]:
        us = "" if c.us is None else f"{c.us:,.1f}"
        cells = (f"{c.shared / 1024:.0f}", f"{c.occupancy:.0%}", c.bound, f"{c.cycles:.2f}", us)
        table.add_row(written(c.options), str(c.registers), *cells, "ships" if c.ships else "")
    return table


def record(call: str, arch: str, kernel: str, candidates: list[Candidate], path: Path) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(FIELDS)
        for c in candidates:
            us = "" if c.us is None else f"{c.us:.2f}"
            numbers = (c.registers, c.shared, f"{c.occupancy:.4f}", c.bound, f"{c.cycles:.3f}", us)
            writer.writerow((call, arch, kernel, written(c.options), int(c.ships), *numbers))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks tiles", description=__doc__)
    parser.add_argument("call", help='a shipped call: "attention 128 bf16" (gptfast kernels lists them)')
    parser.add_argument("--arch", action="append", choices=aot.TARGETS, help="default: sm_90; may be repeated")
    parser.add_argument("--kernel", default="", help="part of a kernel's name; default: all that the call launches")
    parser.add_argument("--most", type=int, default=8, help="candidates to show of each kernel (default 8)")
    parser.add_argument("--time", action="store_true", help="time them too, on a GPU")
    parser.add_argument("--csv", nargs="?", const=str(FILE), metavar="FILE", help=f"append all to FILE ({FILE.name})")
    options = parser.parse_args(argv)
    if options.call not in shipped.names():
        close = [name for name in shipped.names() if options.call in name][:8]
        print(f"tiles: expected a shipped call, got {options.call!r}; close: {', '.join(close) or 'none'}")
        return 2
    if options.time and (reason := reason_missing("triton")) is not None:
        print(f"tiles: --time needs a GPU: {reason}")
        return 2
    console = Console()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        for arch in options.arch or ["sm_90"]:
            launched = dict.fromkeys(c.kernel for c in aot.survey([options.call], [arch]) if c.kernel)
            for kernel in [name for name in launched if options.kernel in name]:
                candidates = search(options.call, arch, kernel, progress)
                if options.time:
                    candidates = timed(options.call, kernel, candidates)
                console.print(shown(options.call, arch, kernel, candidates, options.most))
                if options.csv:
                    record(options.call, arch, kernel, candidates, Path(options.csv))
    return 0
