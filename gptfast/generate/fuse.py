"""Fusion of recorded launches: fewer passes over memory and fewer waits, without another way to write the model.

A norm or an activation whose only reader is the linear behind it becomes that linear's prologue: the rows of x are made
where they are wanted and never stored. The bits stay the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

Launch = tuple[str, int, dict[str, Any]]

BEFORE = {"layer_norm": 1, "rms_norm": 2, "bias_gelu": 3, "swiglu": 4, "geglu": 5}  # Linear::Before in kernels.h
LINEARS = {"linear_exact", "linear_int8", "linear_packed"}


def fused(launches: list[Launch], given: Mapping[int, Sequence[int]] | None = None) -> list[Launch]:
    """The same computation in fewer launches.

    given: for addresses that were several tensors in turn, the launches before which each of them was made
    """
    addresses = given or {}

    def tensor(address: int, launch: int) -> tuple[int, int]:
        return address, bisect_right(addresses.get(address, ()), launch)

    numbers = [(i, v) for i, (_, _, fields) in enumerate(launches) for v in fields.values() if isinstance(v, int)]
    uses = Counter(tensor(value, i) for i, value in numbers)
    result: list[Launch] = []
    for i, (op, threads, fields) in enumerate(launches):
        if op in LINEARS and result and _feeds(result[-1], fields) and uses[tensor(fields["x"], i)] == 2:
            before, _, source = result.pop()
            fields = {**fields, "before": BEFORE[before], "source": (before, source)}
        result.append((op, threads, fields))
    return result


def _feeds(launch: Launch, linear: dict[str, Any]) -> bool:
    """Whether a launch writes just what the linear reads as x."""
    op, _, fields = launch
    if op not in BEFORE or fields["y"] != linear["x"]:
        return False
    same = ("rows", "rows"), ("cols", "depth"), ("cols", "x_stride"), ("dtype", "dtype")
    return all(fields[mine] == linear[its] for mine, its in same)
