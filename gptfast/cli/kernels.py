"""`gptfast kernels`: what Triton's kernels use and do on each architecture, read from their machine code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, TextColumn
from rich.table import Table

from gptfast.cli.console import err, fail, out, reported
from gptfast.formats.extras import need
from gptfast.profile import aot, sass, shipped, table


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
) -> None:
    """Compile Triton's kernels for GPUs that needn't be here, and list registers, spills, KiB of shared memory,
    occupancy, matrix instructions, and the issue slots of a warp in one turn of each inner loop.

    Exits with status 1 where a kernel can't be compiled, spills registers or doesn't fit.
    """
    need("triton", "triton")
    archs = tuple(arch or aot.TARGETS)
    if unknown := [a for a in archs if a not in aot.TARGETS]:
        raise ValueError(f"expected --arch of {', '.join(aot.TARGETS)}, got {unknown[0]}")
    names = [name for name in shipped.names() if only in name]
    if not names:
        raise ValueError(f'expected part of a call\'s name, like "attention 128 bf16", got "{only}"')
    found = []
    for compiled in _shown(names, archs):
        found.append(compiled)
        if as_json:
            print(json.dumps(asdict(compiled)), flush=True)
    if into is not None:
        table.write(into, found)
    if not as_json:
        out.print(_table(found))
    if bad := [c for c in found if _complaint(c)]:
        raise fail(f"{len(bad)} of {len(found)} kernels spill, don't fit or don't compile")


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
    for name in ("registers", "spills", "KiB", "occupancy", "matrix", "slots", ""):
        lines.add_column(name, justify="right", no_wrap=True)
    for c in found:
        r = c.resources
        if r is None:
            lines.add_row(
                c.call, c.arch, c.kernel, "", "", "", "", "", "", f"[red]{(c.error or '').splitlines()[-1][:60]}[/]"
            )
            continue
        lines.add_row(
            c.call,
            c.arch,
            c.kernel.strip("_").removesuffix("_kernel"),
            str(r["registers"]),
            str(r["spills"]),
            f"{r['shared'] / 1024:.0f}",
            f"{r['occupancy']:.0%} {r['limit']}",
            str(r["tensor"]),
            " ".join(str(sass.slots(loop)) for loop in r["loops"]),
            f"[red]{_complaint(c)}[/]",
        )
    return lines
