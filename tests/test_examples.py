"""Every example runs, as a newcomer would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_it_runs(path: Path) -> None:
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    offline = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=offline, timeout=300)
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr


def test_there_are_some() -> None:
    assert len(EXAMPLES) >= 4
