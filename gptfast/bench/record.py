"""Results as JSON and as CSV: one file per kind of machine, rows appended with what is needed to compare them later."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gptfast
from gptfast import hardware
from gptfast.bench.ops import CONTENDERS, Row
from gptfast.bench.timing import Spread

RESULTS = Path("benchmarks/results")


def flat(row: Row) -> dict[str, Any]:
    """A row as one level of names and plain values; times in microseconds. Each row has the same names."""
    cells: dict[str, Any] = {
        "op": row.op,
        "case": row.case,
        "dtype": row.dtype,
        "threads": row.threads,
        "isa": row.isa,
        "backend": row.backend,
        "correct": row.check.passed,
        "error": _digits(row.check.error),
        "limit": _digits(row.check.limit),
    }
    for name in CONTENDERS:
        cells |= _columns(f"{name}_us", row.times.get(name), 1e6)
    for name in CONTENDERS[1:]:
        cells |= _columns(f"over_{name}", row.ratios.get(name))
    timed = bool(row.times)
    return cells | {
        "gbytes_per_s": _digits(row.gbytes_per_s if timed else None),
        "gflops": _digits(row.gflops if timed else None),
        "roofline_us": _digits(row.roofline and row.roofline * 1e6),
        "roofline_percent": _digits(row.roofline_percent if timed else None),
    }


def environment() -> dict[str, Any]:
    """When, which code, and on what."""
    here = hardware.machine()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "gptfast": gptfast.__version__,
        "torch": here.torch,
        "cpu": here.cpu,
        "cores": here.cores,
    }


def commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside a checkout."""
    try:
        where = Path(__file__).parent
        say = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=where, capture_output=True, text=True
        )
    except OSError:
        return ""
    return say.stdout.strip() if say.returncode == 0 else ""


def results_file(name: str) -> Path:
    """benchmarks/results/<machine>/<name>.csv below the working directory."""
    return RESULTS / hardware.machine().slug / f"{name}.csv"


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows, each with the environment's columns before its own; writes the header of a new file.

    Raises ValueError if the file's columns are others than the rows': its older rows would be misread.
    """
    if not rows:
        return
    full = [environment() | dict(row) for row in rows]
    columns = list(full[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        with path.open(newline="") as file:
            there = next(csv.reader(file))
        if there != columns:
            other = next((x for x in there if x not in columns), "an older order")
            raise ValueError(f"{path}: expected these rows' columns, got {len(there)} with {other}; move the file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(full)


def _columns(name: str, spread: Spread | None, scale: float = 1.0) -> dict[str, float | None]:
    """The median under the name itself, and the quartiles."""
    median, low, high = (spread.median, spread.low, spread.high) if spread else (None, None, None)
    cells = {name: median, f"{name}_low": low, f"{name}_high": high}
    return {column: _digits(value and value * scale) for column, value in cells.items()}


def _digits(value: float | None) -> float | None:
    """Four significant digits: more is noise in a file that people compare."""
    return None if value is None else float(f"{value:.4g}")
