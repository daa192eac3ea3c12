"""`python -m gptfast.bench` and `gptfast bench`: checks and times ops, and prints, plots or records the rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gptfast import hardware
from gptfast.bench import record, report
from gptfast.bench.ops import Row, run_ops, selected

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="gptfast bench", description=__doc__)
    p.add_argument("patterns", nargs="*", metavar="OP[/CASE]", help="ops or cases, shell wildcards allowed; none = all")
    p.add_argument("--list", action="store_true", help="only name the cases")
    p.add_argument("--dtype", default="float32,bfloat16", help="of float32, bfloat16, float16, separated by commas")
    p.add_argument("--threads", type=int, help="for PyTorch and gptfast alike; default: as PyTorch is set")
    p.add_argument("--rounds", type=int, default=20, help="samples of each contender (default 20)")
    p.add_argument("--quick", action="store_true", help="5 rounds: a first look")
    p.add_argument("--compile", action="store_true", help="time torch.compile of the PyTorch code too (compiles first)")
    p.add_argument("--reference", action="store_true", help="time the op pages' reference too")
    p.add_argument("--backward", action="store_true", help="time a forward and a backward together")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    p.add_argument(
        "--csv",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"append to FILE ({record.RESULTS}/<machine>/ops.csv)",
    )
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the speedups")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a result was wrong; 2 if the request makes no sense (the sentence is on stderr)."""
    args = parser().parse_args(argv)
    try:
        return _run(args)
    except (ValueError, RuntimeError) as error:
        print(f"gptfast bench: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if args.list:
        for op, case in selected(args.patterns, args.backward):
            print(f"{op.name}/{case.name}")
        return 0
    names = args.dtype.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(f"--dtype: expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    here = hardware.machine()
    if here.isa is not None:
        hardware.ceilings(refresh=True)  # a first measurement may have had loud neighbours

    def progress(row: Row) -> None:
        print(f"\r\033[K{row.op}/{row.case} {row.dtype}", end="", file=sys.stderr, flush=True)

    rows = run_ops(
        args.patterns,
        dtypes=[DTYPES[name] for name in names],
        contenders=["gptfast", "eager", *["compile"] * args.compile, *["reference"] * args.reference],
        threads=args.threads,
        rounds=5 if args.quick else args.rounds,
        backward=args.backward,
        on_row=progress if sys.stderr.isatty() else None,
    )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    title = f"{here.cpu}, {here.isa or 'no C++ kernels'}, {rows[0].threads} threads, torch {here.torch}"
    if args.json:
        print(json.dumps({**record.environment(), "rows": [record.flat(row) for row in rows]}))
    else:
        report.show(rows, title)
    if args.csv is not None:
        record.append_csv(
            Path(args.csv) if args.csv else record.results_file("ops"), [record.flat(row) for row in rows]
        )
    if args.plot:
        report.plot(rows, args.plot, title)
    return 0 if all(row.check.passed for row in rows) else 1
