"""The harness: its arithmetic with a fake clock, its refusal to time what is wrong, its files and tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import bench, hardware, ops
from gptfast.bench import ops as bench_ops
from gptfast.bench import record, report, timing
from gptfast.bench.timing import Spread
from gptfast.ops.spec import Case, Cost, Inputs, Op
from tests.test_hardware import some_ceilings

torch_layer_norm = torch.nn.functional.layer_norm


class Clock:
    """Time that passes only when a contender works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def works(self, name: str, *seconds: float) -> Callable[[], None]:
        """A contender whose n-th call takes the n-th time, and later ones the last."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def doubling(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    return x * 2


def an_op(function: Callable[..., Any] = doubling, **kwargs: Any) -> Op:
    def make(i: Inputs) -> dict[str, Any]:
        return {"x": i.randn(64, 64)}

    def cost(x: torch.Tensor) -> Cost:
        return Cost(flops=x.numel(), bytes=2 * x.numel() * x.element_size())

    cases = [Case("small", make, frozenset({"bench"})), Case("untagged", make)]
    return Op("doubling", function, lambda x: x * 2, cost, lambda: cases, lambda x: x + x, **kwargs)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, short samples."""
    monkeypatch.setattr(timing, "SETTLE_S", 0.0)


@pytest.fixture
def a_row(quick: None, monkeypatch: pytest.MonkeyPatch) -> bench.Row:
    monkeypatch.setattr(ops, "explain", lambda *a, **k: ops.Choice("doubling", "reference", {}))
    op = an_op()
    return bench.measure(
        op, "small", op.cases()[0].arguments(torch.float32), ("gptfast", "eager", "reference"), rounds=4
    )


# --- timing


def test_contenders_take_turns_and_the_order_rotates() -> None:
    clock = Clock()
    calls = {name: clock.works(name, 1.0) for name in "abc"}
    timing.interleave(calls, 3, settle_s=0, clock=clock)
    assert "".join(clock.log) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"  # warm-up; then each: one untimed, one timed


def test_a_sample_is_the_time_of_one_call() -> None:
    clock = Clock()
    samples = timing.interleave({"a": clock.works("a", 2.0), "b": clock.works("b", 5.0)}, 4, settle_s=0, clock=clock)
    assert samples == {"a": [2.0] * 4, "b": [5.0] * 4}


def test_short_calls_are_repeated_until_they_can_be_timed() -> None:
    clock = Clock()
    (samples,) = timing.interleave({"a": clock.works("a", 1e-6)}, 3, warm_s=3e-3, settle_s=0, clock=clock).values()
    assert samples == pytest.approx([1e-6] * 3)
    assert 3 * 6000 <= len(clock.log) <= 3 * 6800 + 6000  # 3 ms untimed and 3 ms timed, each round


def test_a_contender_is_warm_before_it_is_timed() -> None:
    """A machine that runs at half its speed for the first 2 ms after a pause."""
    clock, woken = Clock(), 0.0

    def call() -> None:
        clock.now += 2e-4 if clock.now - woken < 2e-3 else 1e-4

    def pause(seconds: float) -> None:
        nonlocal woken
        clock.now += seconds
        woken = clock.now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing.time, "sleep", pause)
        (samples,) = timing.interleave({"a": call}, 3, settle_s=0.01, clock=clock).values()
    assert samples == pytest.approx([1e-4] * 3)


def test_a_first_call_that_compiles_does_not_count() -> None:
    clock = Clock()
    (samples,) = timing.interleave({"a": clock.works("a", 60.0, 0.5)}, 3, settle_s=0, clock=clock).values()
    assert samples == [0.5] * 3


def test_a_slow_call_is_timed_again_only_by_rounds() -> None:
    clock = Clock()
    timing.interleave({"a": clock.works("a", 10.0)}, 5, settle_s=0, clock=clock)
    assert len(clock.log) == 1 + 2 * 5


@pytest.mark.parametrize(
    ("samples", "spread"),
    [([3.0], Spread(3, 3, 3)), ([4.0, 1, 3, 2, 5], Spread(3, 2, 4)), ([1.0, 2], Spread(1.5, 1.25, 1.75))],
)
def test_median_and_quartiles(samples: list[float], spread: Spread) -> None:
    assert Spread.of(samples) == spread


def test_ratios_are_paired_by_round() -> None:
    """The machine slows down threefold half-way: medians of the times would say 2x or 1x or 6x, the rounds say 2x."""
    ours, theirs = [1.0, 1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 6.0, 6.0, 6.0]
    assert timing.ratio(theirs, ours) == Spread(2, 2, 2)
    with pytest.raises(ValueError, match="5 and 4"):
        timing.ratio(theirs, ours[:4])


def test_the_mean_of_ratios_is_geometric() -> None:
    assert timing.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)


def test_no_rounds_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 0"):
        timing.interleave({}, 0)


# --- check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "rope"])
def test_the_kernels_pass(name: str, dtype: torch.dtype) -> None:
    op = ops.pages()[name]
    assert bench.check(op, op.cases()[0].arguments(dtype)).passed


def off_by(wrong: Callable[[torch.Tensor], torch.Tensor]) -> Op:
    return an_op(lambda x, backend=None: wrong(x * 2))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: y * (1 + 2e-6),
        lambda y: y.index_fill(0, torch.tensor([5]), float("nan")),
        lambda y: y[:-1],
        lambda y: torch.where(y == y.max(), float("inf"), y),
    ],
    ids=["2e-6 off", "NaN", "a row short", "inf"],
)
def test_a_wrong_result_is_not_timed(wrong: Callable, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "explain", lambda *a, **k: ops.Choice("doubling", "cpu", {}))
    op = off_by(wrong)
    row = bench.measure(op, "small", op.cases()[0].arguments(torch.float32), rounds=1)
    assert not row.check.passed and not row.times and not row.ratios
    assert record.flat(row)["correct"] is False


def test_an_exact_op_must_be_equal() -> None:
    arguments = an_op().cases()[0].arguments(torch.float32)
    assert bench.check(an_op(exact=True), arguments).passed
    barely = an_op(lambda x, backend=None: torch.nextafter(x * 2, torch.tensor(9e9)), exact=True)
    assert not bench.check(barely, arguments).passed


def test_whole_numbers_must_be_equal() -> None:
    def argmax(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        return x.argmax(-1)

    arguments = an_op().cases()[0].arguments(torch.float32)
    right = Op("argmax", argmax, argmax, lambda x: Cost(1, 1), list)
    wrong = Op("argmax", lambda x, backend=None: x.argmax(-1) + 1, argmax, lambda x: Cost(1, 1), list)
    assert bench.check(right, arguments).passed and not bench.check(wrong, arguments).passed


def test_what_is_written_in_place_is_checked_and_left_alone() -> None:
    def zero(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        x.zero_()
        return x.sum(-1)

    def forgets(x: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
        x[1:].zero_()
        return x[1:].sum(-1).new_zeros(64)

    arguments = an_op().cases()[0].arguments(torch.float32)
    before = arguments["x"].clone()
    assert bench.check(Op("zero", zero, zero, lambda x: Cost(1, 1), list, mutates=("x",)), arguments).passed
    assert not bench.check(Op("zero", forgets, zero, lambda x: Cost(1, 1), list, mutates=("x",)), arguments).passed
    assert torch.equal(arguments["x"], before)


# --- rows, files, pictures


def test_a_row_of_real_timings(a_row: bench.Row) -> None:
    assert a_row.check.passed and set(a_row.times) == {"gptfast", "eager", "reference"}
    assert set(a_row.ratios) == {"eager", "reference"}
    seconds = a_row.times["gptfast"].median
    assert a_row.gflops == pytest.approx(64 * 64 / seconds / 1e9)
    assert a_row.gbytes_per_s == pytest.approx(2 * 64 * 64 * 4 / seconds / 1e9)


def test_a_baseline_that_does_not_compile_is_named(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmany more lines")

    monkeypatch.setattr(torch, "compile", lambda f, **k: broken)
    monkeypatch.setattr(ops, "explain", lambda *a, **k: ops.Choice("doubling", "cpu", {}))
    op = an_op()
    row = bench.measure(op, "small", op.cases()[0].arguments(torch.float32), ("gptfast", "compile"), rounds=1)
    assert row.skipped == {"compile": "RuntimeError: no C++ compiler"} and "compile" not in row.times


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "pages", lambda: {"doubling": an_op()})
    names = [(op.name, case.name) for op, case in bench_ops.selected()]
    assert names == [("doubling", "small")], "the untagged case is for tests"
    for pattern, found in (("doubling", 1), ("dou*", 1), ("doubling/sm*", 1), ("doubling/x", 0), ("small", 0)):
        assert len(list(bench_ops.selected([pattern]))) == found, pattern


def test_every_op_has_something_to_time() -> None:
    assert {op.name for op, _ in bench_ops.selected()} == set(ops.pages())


def test_bad_requests_get_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no bench case matches nothing: expected cases of .*layer_norm"):
        bench.run_ops(["nothing"])
    with pytest.raises(ValueError, match="expected some of gptfast, eager, compile, reference, got fast"):
        bench.run_ops(contenders=["fast"])
    assert bench.main(["--dtype", "int3"]) == 2
    assert "expected some of float32, bfloat16, float16, got int3" in capsys.readouterr().err
    assert bench.main(["layer_norm/1x768+residual", "--quick", "--threads", "0"]) == 2
    assert "expects a positive integer" in capsys.readouterr().err


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), bench.threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_csv_appends_and_refuses_other_columns(a_row: bench.Row, tmp_path: Path) -> None:
    path = tmp_path / "new" / "ops.csv"
    record.append_csv(path, [record.flat(a_row)])
    record.append_csv(path, [record.flat(a_row), record.flat(a_row)])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(row["op"] == "doubling" and row["correct"] == "True" for row in rows)
    assert float(rows[0]["gptfast_us"]) == pytest.approx(a_row.times["gptfast"].median * 1e6, rel=1e-3)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="expected these rows' columns"):
        record.append_csv(path, [{"other": 1}])
    assert path.read_bytes() == before


def test_json_and_table_from_the_command(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "_measure", lambda here: some_ceilings(here.cores))  # which takes seconds
    command = ["layer_norm/1x768+residual", "--dtype", "float32", "--rounds", "2"]
    csv_file, picture = tmp_path / "ops.csv", tmp_path / "ops.png"
    assert bench.main([*command, "--json", "--csv", str(csv_file), "--plot", str(picture)]) == 0
    said = json.loads(capsys.readouterr().out)
    (row,) = said["rows"]
    assert row["op"] == "layer_norm" and row["correct"] and row["gptfast_us"] > 0 and said["torch"] == torch.__version__
    assert len(csv_file.read_text().splitlines()) == 2
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert bench.main(command) == 0
    assert "layer_norm/1x768+residual" in capsys.readouterr().out


def test_the_table_says_what_was_wrong(a_row: bench.Row, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = bench.Row(**{**vars(a_row), "check": bench.Check(0.5, 0.1), "times": {}, "ratios": {}})
    report.show([a_row, wrong], "title")
    assert "WRONG: error 0.5, limit 0.1" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "text"), [(2.0, "2 s"), (1.5e-3, "1.5 ms"), (2.25e-5, "22.5 us"), (3e-8, "30 ns")])
def test_times_have_units(value: float, text: str) -> None:
    assert report.seconds(value) == text


# --- benchmarks/


def test_slopes_on_log_log_paper() -> None:
    from benchmarks.scaling import slope

    assert slope([1, 2, 4], [9.0, 3.0, 12.0]) == pytest.approx(2.0)
    assert slope([1, 4], [5.0, 5.0]) == 0.0


def test_every_scaling_series_is_right_at_its_smallest() -> None:
    from benchmarks.scaling import SERIES

    for series in SERIES:
        op = ops.pages()[series.op]
        size = series.sizes[0]
        assert bench.check(op, series.make(Inputs(torch.float32, series.name), size)).passed, series.name
        costs = [op.cost(**series.make(Inputs(torch.float32, series.name), n)) for n in series.sizes[:2]]
        assert costs[1].flops > costs[0].flops, f"{series.name}: the op's cost doesn't grow along {series.along}"


def test_tokens_agree_up_to_the_first_that_does_not() -> None:
    from benchmarks.generate import _equal

    assert _equal([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [4, 5, 6]]) == 1 + 3


def test_a_start_is_what_comes_beyond_torch() -> None:
    from benchmarks import start

    runs: list[str] = []

    def run(arguments: Sequence[str]) -> tuple[float, str]:
        kind = "bare" if arguments[1] == start.BARE else "model" if arguments[1] == start.MODEL else "command"
        runs.append(kind)
        late = 10.0 if len(runs) <= 3 else 0.0  # the first round is not counted
        said = {"bare": {"bytes": 50e6}, "model": {"import_s": 0.1, "load_s": 0.3, "first_token_s": 0.5, "bytes": 2e8}}
        return {"bare": 2.0, "model": 3.0, "command": 2.75}[kind] + late, json.dumps(said.get(kind, ""))

    found = start.row(start.measure(2, run))
    assert runs == ["bare", "model", "command"] * 3
    assert (found["rounds"], found["load_s"], found["first_token_s"]) == (2, 0.3, 0.5)
    assert (found["command_s"], found["command_s_high"], found["peak_mb"]) == (0.75, 0.75, 150.0)
    with pytest.raises(RuntimeError, match=r"got status 3: .*"):
        start.run(["-c", "raise SystemExit(3)"])


@pytest.mark.model
def test_a_real_process_tells_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import start

    _, said = start.run(["-c", start.MODEL])
    found = json.loads(said)
    assert 0 < found["import_s"] + found["load_s"] < found["first_token_s"] and found["bytes"] > 2e8


def test_a_hog_runs_for_a_block_and_rounds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import hogged

    children: list[Any] = []
    popen = hogged.subprocess.Popen
    monkeypatch.setattr(hogged.subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1])
    speeds: list[bool] = []

    def decode() -> float:
        beside = bool(children) and children[-1].poll() is None
        speeds.append(beside)
        return 60.0 if beside else 100.0

    quiet, loud = hogged.measure(decode, 2)
    assert speeds == [False, True, False, False, True] and len(children) == 2
    assert (quiet, loud) == ([100.0, 100.0], [60.0, 60.0]) and hogged.row(quiet, loud)["left"] == 0.6


def test_a_patched_model_is_timed_beside_itself_and_must_write_the_same() -> None:
    pytest.importorskip("transformers")
    from benchmarks import patched

    plain, quick = patched.models(n_layer=1, n_embd=32, n_head=2, vocab_size=80)
    row = patched.measure(plain, quick, batch=2, prompt=3, new=5, rounds=2)
    assert row["equal_tokens"] == 10 and row["patched_tokens_per_s"] > 0 < row["over_unpatched"]
    for weight in quick.parameters():
        weight.data.mul_(-1)
    assert patched.measure(plain, quick, batch=2, prompt=3, new=5, rounds=1)["equal_tokens"] < 10


def test_heads_and_losses_are_the_same_function() -> None:
    from benchmarks import losses

    x, weight, target = losses.data(40, 70, 16)
    exact = torch.nn.functional.cross_entropy(x.double() @ weight.double().T, target).item()
    for name, loss in losses.CONTENDERS.items():
        assert losses.step(loss, (x, weight, target)) == pytest.approx(exact, rel=1e-6), name
        assert x.grad is not None and weight.grad is not None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_a_loss_takes_less_memory_than_its_logits() -> None:
    from benchmarks import losses

    most = {name: losses.memory_apart(name, 512, 20_000, 32) for name in (losses.OURS, losses.NAIVE)}
    assert most[losses.NAIVE] > 512 * 20_000 * 4 > most[losses.OURS]


def test_backward_leaves_out_what_gets_no_gradient(quick: None) -> None:
    options: dict[str, Any] = {"backward": True, "rounds": 1, "dtypes": [torch.float32]}
    rows = bench_ops.run_ops(["linear/1x1536x576*"], **options)
    assert [row.case for row in rows] == ["1x1536x576"]
    with pytest.raises(ValueError, match=r"no gradient to time in linear/\*q4_1"):
        bench_ops.run_ops(["linear/*q4_1"], **options)


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_benchmarks_say_what_there_is(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import ALL, main

    assert main([asked]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*ALL, "--quick"))
