"""`gptfast kernels`: what Triton's kernels use and do on each architecture, read from their machine code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TextColumn
from rich.table import Table

from gptfast.cli.console import err, fail, out, reported
from gptfast.formats.extras import need
from gptfast.profile import aot, bound, picture, sass, shipped, table


@reported
def kernels(
    only: Annotated[str, typer.Argument(metavar="[CALL]", help='Part of a call\'s name: "attention 128 bf16".')] = "",
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", "-a", help=f"Of {', '.join(aot.TARGETS)}; all if not."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    into: Annotated[
        Path | None, typer.Option("--table", help="Write registers, spills and occupancy into this table (CSV).")
    ] = None,
    other: Annotated[
        str,
        typer.Option("--compare", metavar="OTHER", help="Another call's name or another architecture, side by side."),
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the cycles that each unit needs for a turn.")
    ] = None,
) -> None:
    """Compile Triton's kernels for GPUs that needn't be here, and list registers, spills, KiB of shared memory,
    occupancy, matrix instructions, the issue slots of a warp in one turn of each inner loop, and of the longest loop
    (or the whole kernel, if it has none) the cycles that a multiprocessor needs at least: by the unit that needs the
    most, and by DRAM if nothing of what is read lies in a cache.

    Exits with status 1 where a kernel can't be compiled, spills registers or doesn't fit.
    """
    need("triton", "triton")
    if plot is not None:
        need("matplotlib", "bench")
    archs = tuple(arch or aot.TARGETS)
    if unknown := [a for a in archs if a not in aot.TARGETS]:
        raise ValueError(f"expected --arch of {', '.join(aot.TARGETS)}, got {unknown[0]}")
    names = _calls(only)
    if other:
        if as_json or into is not None or plot is not None:
            raise ValueError("--compare: expected no --json, --table or --plot beside it")
        bad = _compare(names, archs, other)
        if bad:
            raise fail(f"{bad} kernels don't compile")
        return
    found = []
    for compiled in _shown(names, archs):
        found.append(compiled)
        if as_json:
            print(json.dumps(_line(compiled)), flush=True)
    if into is not None:
        table.write(into, found)
    if plot is not None:
        picture.draw(found, plot)
    if not as_json:
        out.print(_table(found))
    if bad := [c for c in found if _complaint(c)]:
        raise fail(f"{len(bad)} of {len(found)} kernels spill, don't fit or don't compile")


def _calls(part: str) -> list[str]:
    """The shipped call of that name, or those whose names have it as a part."""
    names = [part] if part in shipped.names() else [name for name in shipped.names() if part in name]
    if not names:
        raise ValueError(f'expected part of a call\'s name, like "attention 128 bf16", got "{part}"')
    return names


def _line(c: aot.Compiled) -> dict[str, Any]:
    """What --json prints of a kernel."""
    turn = None if c.resources is None else bound.turn(c.resources, c.arch)
    return asdict(c) | {"turn": None if turn is None else asdict(turn) | {"bound": turn.bound}}


def _compare(names: list[str], archs: tuple[str, ...], other: str) -> int:
    """Prints two calls' kernels, or a call's on two architectures, in pairs. How many didn't compile."""
    if other in aot.TARGETS:
        pairs = [((name, arch), (name, other)) for name in names for arch in archs if arch != other]
    else:
        others = _calls(other)
        if len(names) != 1 or len(others) != 1:
            raise ValueError(f"--compare: expected one call on either side, got {len(names)} and {len(others)}")
        pairs = [((names[0], arch), (others[0], arch)) for arch in archs]
    if not pairs or any(first == second for first, second in pairs):
        raise ValueError(f"--compare: expected another call or architecture, got {other} on both sides")
    sides = {side for pair in pairs for side in pair}
    found: dict[tuple[str, str], list[aot.Compiled]] = {side: [] for side in sides}
    for arch in sorted({arch for _, arch in sides}):
        for compiled in _shown(sorted({name for name, a in sides if a == arch}), (arch,)):
            found[compiled.call, compiled.arch].append(compiled)
    for pair in pairs:
        shared = list(_paired(*(found[side] for side in pair)))
        for first, second in shared:
            out.print(_side_by_side(first, second))
        if not shared:
            both = " and ".join(", ".join(side) for side in pair)
            raise ValueError(f"--compare: {both} launch no kernel of one name")
    return sum(c.resources is None for compiled in found.values() for c in compiled)


def _paired(first: list[aot.Compiled], second: list[aot.Compiled]) -> Iterator[tuple[aot.Compiled, aot.Compiled]]:
    """Kernels of one name, in the order of their launches."""
    left = list(second)
    for a in first:
        b = next((x for x in left if x.kernel == a.kernel), None)
        if b is not None and a.resources is not None and b.resources is not None:
            left.remove(b)
            yield a, b


def _facts(c: aot.Compiled) -> dict[str, float | str]:
    """What is compared of a kernel; numbers, where a ratio says something."""
    r = c.resources
    assert r is not None
    turn = bound.turn(r, c.arch)
    facts: dict[str, float | str] = {f"  {name}": value for name, value in c.options.items()}
    facts = {"options": ""} | facts
    facts |= {"registers": r["registers"], "spills": r["spills"], "shared memory, bytes": r["shared"]}
    facts |= {"occupancy": f"{r['occupancy']:.1%} {r['limit']}", "instructions": r["instructions"]}
    facts |= {"a turn of the longest loop" if r["loops"] else "the whole kernel": ""}
    facts |= {"  issue slots": sum(turn.mix.values())} | {f"    {kind}": n for kind, n in turn.mix.items()}
    facts |= {"  FLOP": "not known" if turn.flops is None else turn.flops, "  bytes": turn.bytes}
    facts |= {f"  cycles, {unit}": cycles for unit, cycles in turn.cycles.items()}
    return facts | {"  cycles, DRAM alone": turn.dram, "  bound on the chip": turn.bound}


def _side_by_side(first: aot.Compiled, second: aot.Compiled) -> Table:
    a, b = _facts(first), _facts(second)
    lines = Table(box=None, pad_edge=False, header_style="bold", title_justify="left", title_style="bold")
    lines.title = f"\n{_plain_name(first)}"
    lines.add_column("")
    for c in (first, second):
        lines.add_column(f"{c.call}, {c.arch}", justify="right")
    lines.add_column("ratio", justify="right")
    for name in {**a, **b}:
        x, y = a.get(name, "-"), b.get(name, "-")
        numbers = isinstance(x, (int, float)) and isinstance(y, (int, float)) and x
        lines.add_row(name, _number(x), _number(y), f"{y / x:.2f}" if numbers else "")  # pyright: ignore
    return lines


def _number(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:,.0f}"


def _plain_name(c: aot.Compiled) -> str:
    return c.kernel.strip("_").removesuffix("_kernel")


def _shown(names: list[str], archs: tuple[str, ...]) -> Iterator[aot.Compiled]:
    """aot.survey() with its progress on a terminal."""
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("compiling", total=len(names) * len(archs), now="")
        seen = set()
        for compiled in aot.survey(names, archs):
            seen.add((compiled.call, compiled.arch))
            progress.update(task, completed=len(seen) - 1, now=f"{compiled.call}, {compiled.arch}")
            yield compiled


def _complaint(c: aot.Compiled) -> str:
    """What is wrong with a kernel, in two words at most."""
    if c.resources is None:
        return "no code"
    return "spills" if c.resources["spills"] else "" if c.resources["fits"] else "too large"


def _table(found: list[aot.Compiled]) -> Table:
    lines = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("call", "for", "kernel"):
        lines.add_column(name, no_wrap=True)
    for name in ("registers", "spills", "KiB", "occupancy", "matrix", "slots", "bound", "DRAM", ""):
        lines.add_column(name, justify="right", no_wrap=True)
    for c in found:
        r = c.resources
        if r is None:
            lines.add_row(*(c.call, c.arch, c.kernel, *[""] * 8), f"[red]{(c.error or '').splitlines()[-1][:60]}[/]")
            continue
        turn = bound.turn(r, c.arch)
        lines.add_row(
            c.call,
            c.arch,
            _plain_name(c),
            str(r["registers"]),
            str(r["spills"]),
            f"{r['shared'] / 1024:.0f}",
            f"{r['occupancy']:.0%} {r['limit']}",
            str(r["tensor"]),
            " ".join(str(sass.slots(loop)) for loop in r["loops"]),
            f"{turn.bound} {turn.cycles[turn.bound]:,.0f}",
            f"{turn.dram:,.0f}",
            f"[red]{_complaint(c)}[/]",
        )
    return lines
