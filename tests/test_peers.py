"""The comparison with other engines: its protocol with a worker process, its figures, its table and picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import report
from benchmarks.peers.engines import ENGINES, Engine
from benchmarks.peers.measure import COLUMNS, WORKLOADS, Contender, rows, run
from benchmarks.peers.worker import ROOT, Timed, Worker

ECHO = """
from benchmarks.peers.worker import Model, Timed, serve

def prepare(folder, weights):
    print("chatter of a library")
    if weights == "none":
        raise ValueError("no such weights")

def load(folder, weights, threads):
    return Model(lambda prompts, new: Timed(0.5, 0.25, [p[:new] for p in prompts]), 1000 * threads)

serve(prepare, load)
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    with Worker(Path(sys.executable), "echo_worker") as started:
        yield started


def state(worker: Worker) -> str:
    return Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_answers_and_is_stopped_between_requests(worker: Worker) -> None:
    assert worker.ask("prepare", "folder", "q8") == {}
    loaded = worker.ask("load", "folder", "q8", 2)
    assert loaded["weight_bytes"] == 2000 and loaded["load_s"] >= 0
    assert state(worker) == "T"
    contender = Contender(ENGINES[0], "q8", worker, **loaded)
    assert run(contender, [[1, 2, 3, 4], [5, 6, 7, 8]], 2) == Timed(0.5, 0.25, [[1, 2], [5, 6]])
    assert worker.ask("peak_memory")["bytes"] > 1 << 20
    with pytest.raises(RuntimeError, match=r"expected 9 new tokens, got \[2\]"):
        run(contender, [[1, 2]], 9)


def test_a_worker_that_ends_says_why(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such weights"):
        worker.ask("prepare", "folder", "none")


def contender(name: str, seconds: list[float]) -> Contender:
    """One whose rounds take so long, in each phase."""
    made = Contender(Engine(name, ("q8",), (f"{name}==1.2",)), "q8", None, 0.5, 10**8, 2 * 10**8)  # type: ignore[arg-type]
    made.runs = {name: [Timed(s, s, []) for s in seconds] for name in WORKLOADS}
    return made


def test_rates_and_ratios_are_of_the_same_round() -> None:
    """The machine is half as fast from the second round on: each round says 2x."""
    ours, theirs = contender("gptfast", [1.0, 2.0, 2.0]), contender("other", [2.0, 4.0, 4.0])
    found = {row["column"]: row for row in rows(theirs, ours, 25e9, 1.5)}
    assert list(found) == list(COLUMNS)
    assert found["prefill 512"]["tokens_per_s"] == 512 / 4 and found["prefill 512"]["read_percent"] is None
    assert all(row["gptfast_over"] == row["gptfast_over_low"] == 2.0 for row in found.values())
    eight = found["decode 8 rows"]
    new = WORKLOADS["8 x 128"].new - 1
    assert eight["tokens_per_s"] == 8 * new / 4
    assert eight["read_percent"] == pytest.approx(100 * new / 4 * 1e8 / 25e9, abs=0.05)
    assert eight["version"] == "1.2" and eight["peak_mb"] == 200


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = contender("gptfast", [1.0, 1.0]), contender("other", [3.0, 3.0])
    found = [row for c in (ours, theirs) for row in rows(c, ours, 25e9, 1.5)]
    best = report.best_rival(found, "decode")
    assert best is not None and best["engine"] == "other"
    report.show(found, {"third": "not installed"}, "title")
    printed = capsys.readouterr().out
    assert "3.00x" in printed and "no third: not installed" in printed
    report.plot(found, tmp_path / "peers.png", "title")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")
