"""Runs that are cut: killed, interrupted, out of disk, damaged; and what goes on from them is what never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import pretrain, trace

from gptfast.formats.files import FormatError
from gptfast.generate import load
from gptfast.train import checkpoint
from gptfast.train.logs import read_table
from gptfast.train.parallel import World
from gptfast.train.trainer import Trainer
from tests.processes import together

pytest.importorskip("safetensors")
RUN = """
import sys
from pathlib import Path
from tiny_training import pretrain
from gptfast.train.trainer import Trainer
Trainer(pretrain(**eval(sys.argv[2])), Path(sys.argv[1]), quiet=True).run()
"""
HERE = Path(__file__).parent


def start(run: Path, **dials: Any) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, str(run), repr(dials)], env=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never cut."""
    run = tmp_path_factory.mktemp("whole")
    result = Trainer(pretrain(), run, quiet=True).run()
    assert result.steps == 12
    return run


def weights(run: Path, step: int = 12) -> bytes:
    return (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()


def test_a_run_learns_and_leaves_a_model_that_loads(whole: Path) -> None:
    losses = [float(loss) for _, loss in trace(whole)]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    evaluations = read_table(whole / "evaluations.csv")
    assert [e["step"] for e in evaluations] == [0, 4, 8, 12]
    assert evaluations[-1]["bits_per_byte_en"] < evaluations[0]["bits_per_byte_en"]
    assert [c.step for c in checkpoint.checkpoints(whole)] == [10, 12]  # keep=2
    lm = load(whole / "model")
    again = lm.generate("the cat", max_new_tokens=4, temperature=0.8, seed=1)
    assert again.text
    texts = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [t["step"] for t in texts] == [0, 4, 8, 12]


@pytest.mark.parametrize("at", [1, 5, 6])
def test_going_on_is_bit_equal(whole: Path, tmp_path: Path, at: int) -> None:
    """Cut in this process after any step, by an error."""

    class Cut(Exception):
        pass

    def cut(step: int, found: dict[str, float]) -> None:
        if step == at:
            raise Cut

    with pytest.raises(Cut):
        Trainer(pretrain(), tmp_path, quiet=True, on_step=cut).run()
    Trainer(pretrain(), tmp_path, quiet=True).run()
    assert trace(tmp_path) == trace(whole)
    assert weights(tmp_path) == weights(whole)
    for name in ("evaluations.csv", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_ctrl_c_saves(tmp_path: Path) -> None:
    process = start(tmp_path, steps=5000, save_every=0, eval_every=0)
    while not (tmp_path / "train.csv").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    (saved,) = checkpoint.checkpoints(tmp_path)
    assert 0 < saved.step < 5000
    assert not checkpoint.damage(saved)
    assert len(trace(tmp_path)) == saved.step


def test_a_full_disk_keeps_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer(pretrain(steps=2), tmp_path, quiet=True).run()
    stage = pretrain(steps=2)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_flush", full)
    with pytest.raises(OSError, match="step 3 was not saved: No space left on device; older ones are kept"):
        checkpoint.save(tmp_path, 3, stage.modules, None, {})
    assert [c.step for c in checkpoint.checkpoints(tmp_path)] == [2]
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """The log's file can't grow: one sentence, and the checkpoints are whole."""
    Trainer(pretrain(steps=2), tmp_path, quiet=True).run()
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.csv").symlink_to("/dev/full")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    with pytest.raises(OSError, match="No space left"):
        Trainer(pretrain(steps=2), tmp_path, quiet=True).run()
    assert all(not checkpoint.damage(c) for c in checkpoint.checkpoints(tmp_path))


def test_damaged_checkpoints_are_passed_over(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "step-00000012" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    found = checkpoint.latest(run)
    assert found is not None and found.step == 10
    Trainer(pretrain(), run, quiet=True).run()
    assert trace(run) == trace(whole)
    for step in (10, 12):
        (run / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors").unlink()
    with pytest.raises(FormatError, match="none of its 2 checkpoints is whole"):
        checkpoint.latest(run)


def test_another_runs_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(ValueError, match=r"other dials \(lr 0.003 then, 0.001 now\)"):
        Trainer(pretrain(lr=1e-3), run, quiet=True).run()
    Trainer(pretrain(keep=3), run, quiet=True).run()  # that changes nothing that is computed


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path: Path) -> None:
    stage = pretrain(steps=3, eval_every=0)
    with torch.no_grad():
        stage.model.norm.weight[0] = float("nan")
    with pytest.raises(RuntimeError, match="the loss of step 0 is nan: nothing was updated"):
        Trainer(stage, tmp_path, quiet=True).run()


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    Trainer(pretrain(steps=2), tmp_path, quiet=True, tensorboard=True).run()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def _process(rank: int, size: int, kind: str, run: str, meet: str, steps: int, family: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    world = World(rank, size, kind)
    stage = pretrain(steps=steps, dropout=0.0, family=family)
    Trainer(stage, Path(run), quiet=True, world=world).run()
    # No teardown: a DDP reducer that holds the last reference to a gloo group joins its thread with Python's lock held,
    # which that thread may be waiting for (PyTorch 2.13).
    dist.barrier()
    os._exit(0)


def _together(size: int, kind: str, run: Path, steps: int, family: str = "gpt2") -> None:
    with tempfile.TemporaryDirectory() as folder:
        together(_process, size, kind, str(run), f"{folder}/meet", steps, family, processes=size)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize(("kind", "family"), [("ddp", "gpt2"), ("fsdp", "llama")])
def test_two_processes_train_as_one_and_saves_load_in_either(kind: str, family: str, tmp_path: Path) -> None:
    """Within 1e-5, and a checkpoint of two goes on in one, one of one in two."""
    alone = tmp_path / "alone"
    Trainer(pretrain(steps=6, dropout=0.0, family=family), alone, quiet=True).run()
    wanted = [float(loss) for _, loss in trace(alone)]

    two = tmp_path / "two"
    _together(2, kind, two, 6, family)
    got = [float(loss) for _, loss in trace(two)]
    assert max(abs(g - w) for g, w in zip(got, wanted, strict=True)) <= 1e-5

    texts = [(run / "samples.jsonl").read_text() for run in (alone, two)]
    assert texts[0] == texts[1]
    assert load(two / "model").generate("the cat", max_new_tokens=4, temperature=0).text

    for run in (alone, two):  # the last steps again, with another number of processes
        shutil.rmtree(run / "checkpoints" / "step-00000006")
        assert checkpoint.checkpoints(run)[-1].step == 4
    Trainer(pretrain(steps=6, dropout=0.0, family=family), two, quiet=True).run()
    _together(2, kind, alone, 6, family)
    for run in (alone, two):
        got = [float(loss) for _, loss in trace(run)]
        assert max(abs(g - w) for g, w in zip(got, wanted, strict=True)) <= 1e-5
