"""The benchmark harness: check a result first, then time it beside its rivals, then say how far the machine allows.

    python -m gptfast.bench "layer_norm/*" --dtype float32 --csv
    rows = gptfast.bench.run_ops(["attention"], dtypes=[torch.bfloat16])

Cases come from the op pages (those tagged "bench"), so a new op is here as soon as its page exists.
"""

from __future__ import annotations

from gptfast.bench.check import Check, check
from gptfast.bench.cli import main
from gptfast.bench.ops import CONTENDERS, Row, measure, run_ops, threads_set
from gptfast.bench.timing import Spread, interleave, ratio

__all__ = [
    "CONTENDERS",
    "Check",
    "Row",
    "Spread",
    "check",
    "interleave",
    "main",
    "measure",
    "ratio",
    "run_ops",
    "threads_set",
]
