"""The arithmetic of the benchmark of gaps, on steps whose times are made up; and a real step's trace."""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks import gaps
from gptfast.generate import replay
from gptfast.generate.replay import Recorded, StepTrace, tracing
from gptfast.kernels import reason_missing
from gptfast.ops import rms_norm

LINEAR = ("linear_int8", 2, {"rows": 1, "cols": 32, "depth": 64, "format": 5})
NORM = ("rms_norm", 1, {"rows": 1, "cols": 64})


def step(begin: int) -> StepTrace:
    """Thread 0: 10 to 40, waits to 50, 50 to 90; thread 1 comes at 20, works to 50, then from 60 to 85 and waits."""
    at = [[10, 20], [50, 60], [90, 90]]
    waits = [[[(40, 50)], [(50, 50)]], [[], [(85, 90)]]]
    shifted = [[[(a + begin, b + begin) for a, b in t] for t in launch] for launch in waits]
    return StepTrace([LINEAR, NORM], begin + 5, begin + 100, [[t + begin for t in row] for row in at], shifted)


def test_busy_times_leave_out_the_waits() -> None:
    assert gaps.busy(step(1000), 0) == [(1010, 1040, 0), (1050, 1050, 0), (1050, 1090, 1)]
    assert gaps.busy(step(1000), 1) == [(1020, 1050, 0), (1050, 1060, 0), (1060, 1085, 1), (1090, 1090, 1)]


def test_a_thread_that_never_came_is_not_busy() -> None:
    late = StepTrace([NORM], 5, 50, [[10, 0], [40, 0]], [[[], []]])
    assert gaps.busy(late, 1) == []


def test_uncovered_is_what_no_thread_covers() -> None:
    """Before the first launch 10, after the last one 10; between them somebody always works."""
    assert gaps.uncovered(step(1000), 1000) == 20
    assert gaps.uncovered(step(1000), 990) == 30


def test_rows_and_shares_of_steps() -> None:
    rows, shares, median = gaps.of([step(0), step(100), step(200), step(300)])
    assert [(r["kernel"], r["launches"]) for r in rows] == [("linear_int8 1x32x64", 1), ("rms_norm", 1)]
    assert shares["step_us"] == 0.1 and shares["uncovered_percent"] == 20
    assert shares["thread0_idle_percent"] == 30 and 1 <= median <= 3


@pytest.mark.skipif(reason_missing("cpu") is not None, reason="needs the CPU backend")
def test_a_real_trace_covers_its_step(two_threads: None) -> None:
    x, w = torch.randn(4096, 768), torch.randn(768)
    recorded = Recorded(lambda: rms_norm(x, w))
    wanted = recorded.result.clone()
    with tracing() as traced:
        for _ in range(3):
            replay._run(recorded._plan, [("rms_norm", 2, {})])
    steps = traced.steps()
    assert torch.equal(recorded.result, wanted)
    assert replay._tracing is None and len(steps) == 3
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: alone, nobody waits, and a trace holds its beginning and end only")
    for taken in steps:
        assert taken.begin <= taken.came[0][0] <= taken.came[1][0] <= taken.end
        work = sum(e - b for t in range(2) for b, e, _ in gaps.busy(taken, t))
        assert 0 < work <= 2 * (taken.end - taken.begin)
        assert gaps.uncovered(taken, taken.begin) < taken.end - taken.begin
