"""The table of what every shipped kernel uses on every architecture (tests/data/kernels.csv), so that a change of a
kernel, of its tiles or of the compiler shows as a change of numbers.

A line is a kernel of a call, a column an architecture: "96 0 49152 25% registers" are a thread's registers,
instructions that spill, bytes of shared memory, occupancy and its limit. `gptfast kernels --table FILE` writes it.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gptfast.profile import shipped
from gptfast.profile.aot import TARGETS, Compiled

Key = tuple[str, str, str]  # call, kernel, which of the call's kernels of that name
Rows = dict[Key, dict[str, str]]  # a cell by architecture
FIELDS = ("registers", "spills", "shared", "occupancy", "limit")


def compiler() -> str:
    """What the numbers depend on besides the kernels: "triton 3.9.0", which brings its own LLVM and ptxas."""
    return f"triton {version('triton')}"


def cell(resources: Mapping[str, Any]) -> str:
    values = {**resources, "occupancy": f"{resources['occupancy']:.1%}".replace(".0%", "%")}
    return " ".join(str(values[name]) for name in FIELDS)


def rows(found: Iterable[Compiled]) -> Rows:
    """The lines of what was compiled; what couldn't be is "none"."""
    result: Rows = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    for c in found:
        counts[c.call, c.arch, c.kernel] += 1
        key = c.call, c.kernel, str(counts[c.call, c.arch, c.kernel])
        result.setdefault(key, {})[c.arch] = "none" if c.resources is None else cell(c.resources)
    return result


def read(path: Path) -> tuple[str, Rows]:
    """(the compiler that a table was written with, its lines). Raises ValueError for what is no table."""
    with path.open(newline="") as file:
        lines = list(csv.reader(file))
    if not lines or lines[0][:1] != ["call"] or tuple(lines[0][3:-1]) != TARGETS:
        raise ValueError(f"{path}: expected a table of {', '.join(TARGETS)}, got {lines[:1]}")
    by = lines[0][-1]
    return by, {(a, b, c): {t: x for t, x in zip(TARGETS, cells) if x} for a, b, c, *cells in lines[1:]}


def write(path: Path, found: Iterable[Compiled]) -> None:
    """Puts what was compiled into the table: calls that weren't keep their cells if the same compiler made them, calls
    that ship no more go."""
    found = list(found)
    by, kept = read(path) if path.exists() else ("", {})
    new, asked = rows(found), {(c.call, c.arch) for c in found}
    order = {name: n for n, name in enumerate(shipped.names())}
    for key, cells in kept.items() if by == compiler() else ():
        old = {arch: text for arch, text in cells.items() if (key[0], arch) not in asked}
        if old and key[0] in order:
            new[key] = old | new.get(key, {})
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["call", "kernel", "of", *TARGETS, compiler()])
        # A call's kernels stay in the order of their launches.
        for key in sorted(new, key=lambda key: order.get(key[0], len(order))):
            writer.writerow([*key, *(new[key].get(arch, "") for arch in TARGETS)])


def differences(table: Rows, found: Iterable[Compiled]) -> list[str]:
    """What a table says otherwise of the calls that were compiled: "attention 128 bf16, sm_90, _attention_kernel 1:
    registers 96 -> 128"."""
    found = list(found)
    new = rows(found)
    said = []
    for call, arch in dict.fromkeys((c.call, c.arch) for c in found):
        keys = [k for k in {**table, **new} if k[0] == call]
        for key in keys:
            old, now = table.get(key, {}).get(arch, "none"), new.get(key, {}).get(arch, "none")
            if old == now:
                continue
            pairs = zip(FIELDS, old.split(), now.split()) if "none" not in (old, now) else [("all of it", old, now)]
            changes = ", ".join(f"{name} {a} -> {b}" for name, a, b in pairs if a != b)
            said.append(f"{call}, {arch}, {key[1]} {key[2]}: {changes}")
    return said
