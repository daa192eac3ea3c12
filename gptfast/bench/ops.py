"""Ops against their rivals: what one writes with PyTorch, the same compiled, and the bare reference."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptfast import hardware, ops
from gptfast.bench.check import Check, check, check_gradients
from gptfast.bench.timing import Spread, interleave, ratio
from gptfast.ops.spec import Case, Cost, Op, leaves, outputs, upstream

# gptfast: the public function as a user calls it. eager: the page's baseline, what one writes with PyTorch. compile:
# torch.compile of that. reference: the page's meaning.
CONTENDERS = ("gptfast", "eager", "compile", "reference")


@dataclass(frozen=True)
class Row:
    """One op case in one dtype: right or wrong, and how fast. Times are seconds per call."""

    op: str
    case: str
    dtype: str
    threads: int
    isa: str | None
    backend: str  # that served gptfast's call
    check: Check
    cost: Cost
    roofline: float | None  # seconds; None where the machine's ceilings can't be measured
    times: dict[str, Spread] = field(default_factory=dict)  # by contender; empty if the check failed
    ratios: dict[str, Spread] = field(default_factory=dict)  # of each rival: how many times faster gptfast is
    skipped: dict[str, str] = field(default_factory=dict)  # a contender that couldn't run, and why

    @property
    def gbytes_per_s(self) -> float:
        return self.cost.bytes / self.times["gptfast"].median / 1e9

    @property
    def gflops(self) -> float:
        return self.cost.flops / self.times["gptfast"].median / 1e9

    @property
    def roofline_percent(self) -> float | None:
        """How much of what the machine allows is reached; 100 = nothing left to gain."""
        return None if self.roofline is None else 100 * self.roofline / self.times["gptfast"].median


def selected(patterns: Sequence[str] = (), backward: bool = False) -> Iterator[tuple[Op, Case]]:
    """The cases tagged "bench" whose op or op/case matches one of the patterns (shell wildcards); none = all.

    backward: only those of ops with gradients.
    """
    for op in ops.pages().values():
        if backward and op.train_cost is None:
            continue
        for case in op.cases():
            names = (op.name, f"{op.name}/{case.name}")
            wanted = not patterns or any(fnmatch.fnmatchcase(name, p) for name in names for p in patterns)
            if wanted and "bench" in case.tags:
                yield op, case


def run_ops(
    patterns: Sequence[str] = (),
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    contenders: Sequence[str] = ("gptfast", "eager"),
    threads: int | None = None,
    rounds: int = 20,
    backward: bool = False,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Checks and times every bench case that `patterns` (op, or op/case, with wildcards) select; with `backward`, a
    forward and a backward together.

    `threads` is given to PyTorch and to gptfast alike (None = as PyTorch is set). `on_row` sees each row at once. With
    `backward`, cases with what gets no gradient (a packed weight) are left out.
    Raises ValueError where nothing is selected or a contender is unknown.
    """
    if unknown := set(contenders) - set(CONTENDERS):
        raise ValueError(f"contenders: expected some of {', '.join(CONTENDERS)}, got {', '.join(sorted(unknown))}")
    chosen = [(op, case, dtype) for op, case in selected(patterns, backward) for dtype in dtypes if dtype in op.dtypes]
    if not chosen:
        known = ", ".join(sorted({op.name for op, _ in selected((), backward)}))
        asked = " ".join(patterns) or "these dtypes"
        raise ValueError(f"no bench case matches {asked}: expected cases of {known}")
    rows = []
    with threads_set(threads):
        for op, case, dtype in chosen:
            arguments = case.arguments(dtype)
            if backward and not all(isinstance(arguments.get(n), Tensor | None) for n in op.differentiable):
                continue  # a quantised or packed weight gets no gradient
            row = measure(*(op, case.name, arguments, contenders), rounds=rounds, dtype=dtype, backward=backward)
            rows.append(row)
            if on_row is not None:
                on_row(row)
    if not rows:
        raise ValueError(f"no gradient to time in {' '.join(patterns)}: expected a case without packed weights")
    return rows


def measure(
    op: Op,
    case: str,
    arguments: Mapping[str, Any],
    contenders: Sequence[str] = ("gptfast", "eager"),
    *,
    rounds: int = 20,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
) -> Row:
    """One row: checks gptfast's result, then, if it is right, times the contenders on the same arguments."""
    here = hardware.machine()
    if backward:
        assert op.train_cost is not None
        cost, verdict = op.train_cost(**arguments), check_gradients(op, arguments)
        arguments = leaves(op, arguments)
    else:
        cost, verdict = op.cost(**arguments), check(op, arguments)
    with torch.inference_mode(not backward):
        calls, skipped = _calls(op, arguments, contenders, backward) if verdict.passed else ({}, {})
        samples = interleave(calls, rounds)
    return Row(
        op=op.name + "+backward" * backward,
        case=case,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        isa=here.isa,
        backend=ops.explain(op.function, **arguments).backend,
        check=verdict,
        cost=cost,
        roofline=None if here.isa is None else hardware.roofline(cost),
        times={name: Spread.of(taken) for name, taken in samples.items()},
        ratios={name: ratio(taken, samples["gptfast"]) for name, taken in samples.items() if name != "gptfast"},
        skipped=skipped,
    )


@contextmanager
def threads_set(threads: int | None) -> Iterator[None]:
    """PyTorch's threads, which gptfast follows; as before afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if threads is None else threads)
        yield
    finally:
        torch.set_num_threads(before)


def _calls(
    op: Op, arguments: Mapping[str, Any], contenders: Sequence[str], backward: bool = False
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What to time, gptfast always among it; and the contenders that can't run, with the reason."""
    baseline = op.baseline or op.reference
    given = upstream(op, arguments) if backward else []
    wanted = [arguments[name] for name in op.differentiable if arguments.get(name) is not None]

    def call(function: Callable[..., Any]) -> Callable[[], object]:
        if not backward:
            return lambda: function(**arguments)
        return lambda: torch.autograd.grad(outputs(function(**arguments)), wanted, given, allow_unused=True)

    calls = {"gptfast": call(op.function)}
    skipped: dict[str, str] = {}
    if "eager" in contenders:
        calls["eager"] = call(baseline)
    if "reference" in contenders:
        calls["reference"] = call(op.reference)
    if "compile" in contenders:
        compiled = call(torch.compile(baseline, dynamic=False))
        try:
            compiled()
            calls["compile"] = compiled
        except Exception as error:  # whatever inductor, its compiler or the baseline's Python may raise: say it, go on
            skipped["compile"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return calls, skipped
