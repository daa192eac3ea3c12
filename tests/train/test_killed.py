"""Every stage, killed by SIGKILL at random moments, always goes on; what it leaves is what an uncut run leaves, bit for
bit: every step's figures, evaluations, samples, weights, moments and the exported model.

Half of the moments are drawn from the run's time, half from what it does to files: before something is opened, made,
renamed or removed. Most of that is saving.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_training import figures

from gptfast.train import checkpoint

pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="expected Linux's clocks of processes")
HERE = Path(__file__).parent
STEPS = 4
DIALS: dict[str, Any] = dict(steps=STEPS, save_every=1, eval_every=2, log_every=1)
STAGES = ("pretrain", "sft", "reward", "ranked", "ppo", "grpo", "dpo", "dpo with adapters")
FEW = 2
MANY = 50  # of all stages together


def kill(process: int, seconds: float) -> None:
    """When it has worked for so long: its own processor time, for a busy machine has no say in where that is."""
    with contextlib.suppress(OSError):  # it has ended
        while time.clock_gettime((~process << 3) | 2) < seconds:  # Linux's clock of another process
            time.sleep(0.0005)
        os.kill(process, signal.SIGKILL)


class Forks:
    """tests/train/cut.py, from which runs are forked."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        pipes: Any = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.process = subprocess.Popen([sys.executable, str(HERE / "cut.py")], **pipes)

    def run(self, stage: str, run: Path, *, last: int = 0, seconds: float | None = None) -> int:
        """How a run ended: 0, or -9 where it was killed, after `seconds` of work or before change number `last`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        job = {"stage": stage, "run": str(run), "dials": DIALS, "last": last}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        process = int(self.process.stdout.readline())
        if seconds is not None:
            kill(process, seconds)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    made = Forks()
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait()


def content(run: Path) -> dict[str, Any]:
    """All that a run leaves, but for how long things took."""
    newest = run / "checkpoints" / f"step-{STEPS:08d}"
    state = json.loads((newest / "state.json").read_text())
    state["spent"].pop("seconds")
    files = [run / "samples.jsonl", run / "evaluations.csv", *newest.glob("*.safetensors"), *(run / "model").rglob("*")]
    found = {str(f.relative_to(run)): f.read_bytes() for f in files if f.is_file()}
    return found | {
        "figures": figures(run),
        "state": state,
        "checkpoints": [c.step for c in checkpoint.checkpoints(run)],
    }


@pytest.mark.parametrize("kills", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_gone_on(stage: str, kills: int, forks: Forks, tmp_path: Path) -> None:
    if kills == MANY:  # this stage's part
        at = STAGES.index(stage)
        kills = MANY * (at + 1) // len(STAGES) - MANY * at // len(STAGES)
    assert forks.run(stage, tmp_path / "whole") == 0
    measured = json.loads((tmp_path / "whole.json").read_text())
    wanted = content(tmp_path / "whole")
    assert len(wanted["figures"]) == STEPS and len({row["loss"] for row in wanted["figures"]}) == STEPS

    moments = random.Random(f"{stage} {kills}")
    killed = saving = runs = 0
    while killed < kills:
        run = tmp_path / f"cut-{runs}"
        runs += 1
        code = -9
        while code:
            drawn: dict[str, Any] = {}
            if killed < kills:
                late = moments.random()
                drawn = {"seconds": late * measured["cpu_seconds"]}
                if killed % 2 == 0:
                    drawn = {"last": 1 + int(late * measured["changes"])}
            code = forks.run(stage, run, **drawn)
            assert code in (0, -9) and (code == 0 or drawn)
            killed += code != 0
            saving += code != 0 and any((run / "checkpoints").glob(".*"))
        assert content(run) == wanted
        assert not list(run.rglob("*.part")), "something half written is left"
    print(f"{stage}: {killed} kills in {runs} runs, {saving} of them inside a save")
