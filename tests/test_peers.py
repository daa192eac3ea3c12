"""The comparison with other engines: its protocol with a worker process, its figures, its table and picture."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers import report
from benchmarks.peers.engines import ENGINES, Engine
from benchmarks.peers.measure import COLUMNS, READINGS, Contender, measure, rows, run, warm_up
from benchmarks.peers.models import SUBJECTS
from benchmarks.peers.worker import ROOT, Timed, Worker
from gptfast.formats.gguf import open_gguf
from gptfast.model.presets import preset

WORKLOADS = SUBJECTS["smollm2"].workloads

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
    contender = Contender(ENGINES[0], "q8", 8, worker, **loaded)
    assert run(contender, [[1, 2, 3, 4], [5, 6, 7, 8]], 2) == Timed(0.5, 0.25, [[1, 2], [5, 6]])
    assert worker.ask("peak_memory")["bytes"] > 1 << 20
    with pytest.raises(RuntimeError, match=r"expected 9 new tokens, got \[2\]"):
        run(contender, [[1, 2]], 9)


def test_a_worker_that_ends_says_why(worker: Worker) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such weights"):
        worker.ask("prepare", "folder", "none")


def test_every_round_of_every_workload_is_counted_but_the_first(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = iter([7e9, 9e9] + [8e9] * READINGS)
    monkeypatch.setattr("benchmarks.peers.measure.hardware.read_rate", lambda threads: next(read))
    prompts = {name: [[1] * w.new] * w.batch for name, w in WORKLOADS.items()}
    c = Contender(ENGINES[0], "q8", 8, worker, **worker.ask("load", "folder", "q8", 2))
    warm_up(c, WORKLOADS, prompts)
    assert not c.runs and [*c.tokens] == [*WORKLOADS] and c.peak_memory > 1 << 20
    assert measure([c], WORKLOADS, prompts, 2, 1) == 9e9
    assert {name: len(runs) for name, runs in c.runs.items()} == dict.fromkeys(WORKLOADS, 2)
    assert len([*read]) == 2, f"the reader ran less than {READINGS} times"


def contender(name: str, seconds: list[float], bits: int = 8) -> Contender:
    """One whose rounds take so long, in each phase."""
    engine = Engine(name, {bits: ("q8",)}, (f"{name}==1.2",))
    made = Contender(engine, f"q{bits}", bits, None, 0.5, 10**8, 2 * 10**8)  # type: ignore[arg-type]
    made.runs = {name: [Timed(s, s, []) for s in seconds] for name in WORKLOADS}
    return made


def test_rates_and_ratios_are_of_the_same_round() -> None:
    """The machine is half as fast from the second round on: each round says 2x."""
    ours, theirs = contender("gptfast", [1.0, 2.0, 2.0]), contender("other", [2.0, 4.0, 4.0])
    found = {row["column"]: row for row in rows(theirs, ours, WORKLOADS, 25e9, 1.5)}
    assert list(found) == list(COLUMNS)
    assert found["prefill 512"]["tokens_per_s"] == 512 / 4 and found["prefill 512"]["read_percent"] is None
    assert all(row["gptfast_over"] == row["gptfast_over_low"] == 2.0 for row in found.values())
    eight = found["decode 8 rows"]
    new = WORKLOADS["8 x 128"].new - 1
    assert eight["tokens_per_s"] == 8 * new / 4
    assert eight["read_percent"] == pytest.approx(100 * new / 4 * 1e8 / 25e9, abs=0.05)
    assert eight["version"] == "1.2" and eight["peak_mb"] == 200


def test_the_table_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Engines compete with those of as many bits, whatever others reach."""
    found = []
    for bits, times in ((8, 3.0), (4, 0.5)):
        ours, theirs = contender("gptfast", [1.0, 1.0], bits), contender("other", [times, times], bits)
        found += [row for c in (ours, theirs) for row in rows(c, ours, WORKLOADS, 25e9, 1.5)]
    best = report.best_rival(report.by_bits(found)[8], "decode")
    assert best is not None and best["engine"] == "other"
    report.show(found, {"third": "not installed"}, "title")
    printed = capsys.readouterr().out
    assert "3.00x" in printed and "0.50x" in printed and "no third: not installed" in printed
    report.plot(found, tmp_path / "peers.png", "title")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_without_a_package_is_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = preset("tiny").replace(vocab_size=97)
    monkeypatch.setattr("benchmarks.peers.models.preset", lambda name: tiny)
    logits = []
    for place in ("one", "two"):
        monkeypatch.setattr("benchmarks.peers.models.MODELS", tmp_path / place)
        subject = SUBJECTS["gpt2"]
        lm = subject.write()
        prompts = subject.prompts(lm)
        assert {name: (len(p), len(p[0])) for name, p in prompts.items()} == {
            name: (w.batch, w.prompt) for name, w in subject.workloads.items()
        }
        assert len({tuple(row) for row in prompts["8 x 128"]}) == 8
        logits.append(lm.model(torch.tensor([prompts["128"][0]])))
        again = open_gguf(subject.folder / "f32.gguf")
        assert again.metadata["tokenizer.ggml.model"] == "no_vocab" and again.metadata["gpt2.vocab_size"] == 97
    assert torch.equal(*logits)
