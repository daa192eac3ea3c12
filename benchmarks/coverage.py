"""The tables of kernels/README.md, made from the op pages: which backend serves which op, and each op's roofline.

`python -m benchmarks.coverage` rewrites them; tests/test_layering.py fails where they are out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from gptfast import kernels, ops
from gptfast.bench.ops import selected
from gptfast.bench.report import SHORT
from gptfast.ops.spec import Op

README = Path(__file__).parents[1] / "kernels" / "README.md"


def served(op: Op, backend: str) -> str:
    """The dtypes in which a backend serves cases of the page, and how many of them where it declines some."""
    said = []
    for dtype in op.dtypes:
        taken = [ops.explain(op.function, **case.unread(dtype)).backend == backend for case in op.cases()]
        if any(taken):
            name = SHORT[str(dtype).removeprefix("torch.")]
            said.append(name if all(taken) else f"{name} ({sum(taken)} of {len(taken)} cases)")
    return ", ".join(said) or "-"


def coverage() -> str:
    """Op x backend: the direction is forward; a backend that isn't in this version has no column's worth of dashes."""
    here = [name for name in kernels.BACKENDS if kernels.reason_missing(name) is None]
    lines = ["| op | direction | reference | " + " | ".join(here) + " |", "|---" * (3 + len(here)) + "|"]
    for name, op in sorted(ops.pages().items()):
        every = ", ".join(SHORT[str(dtype).removeprefix("torch.")] for dtype in (*op.dtypes, torch.float64))
        lines.append(f"| {name} | forward | {every} | " + " | ".join(served(op, backend) for backend in here) + " |")
    return "\n".join(lines)


def rooflines() -> str:
    """Each timed case: operations, the fewest bytes, and their quotient."""
    lines = ["| op/case (fp32) | MFLOP | MB | FLOP/byte |", "|---|---:|---:|---:|"]
    for op, case in sorted(selected(), key=lambda pair: (pair[0].name, pair[1].name)):
        cost = op.cost(**case.unread(op.dtypes[0]))
        unit = "" if cost.unit == "fp32" else f" ({cost.unit})"
        cells = (f"{cost.flops / 1e6:.4g}{unit}", f"{cost.bytes / 1e6:.4g}", f"{cost.flops / max(cost.bytes, 1):.3g}")
        lines.append(f"| {op.name}/{case.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def updated(text: str) -> str:
    """The README with its tables made anew, between <!-- name --> and <!-- /name -->."""
    for name, table in (("coverage", coverage()), ("rooflines", rooflines())):
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not between.search(text):
            raise ValueError(f"kernels/README.md: expected <!-- {name} --> ... <!-- /{name} -->, got none")
        text = between.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    return text


def main() -> int:
    if (reason := kernels.reason_missing("cpu")) is not None:
        print(reason, file=sys.stderr)
        return 1
    README.write_text(updated(README.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
