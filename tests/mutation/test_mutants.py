"""Is the suite able to fail? A bug is put into a copy of Triton's kernels, and cases of the suite, interpreted in a
process of their own, must find it: each of the kinds that kernels have, and each caught by what was made to catch it.

On demand: `make test-mutants`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import where

ROOT = Path(__file__).parents[2]
CONFORMANCE = "tests/ops/test_conformance.py::test_every_backend_means_the_same"
GRADIENTS = "tests/ops/test_gradients.py::test_every_gradient"


@dataclass(frozen=True)
class Mutant:
    """A bug: `old`, which stands once in kernels/triton/<file>, becomes `new`. `case` must find it and say `found`."""

    name: str
    file: str
    old: str
    new: str
    case: str
    found: str


MUTANTS = [
    Mutant(
        *("off-by-one-mask", "attention_scores.py"),
        *("last = tl.minimum(last, i + (shift + right))", "last = tl.minimum(last, i + (shift + right) - 1)"),
        *(f"{CONFORMANCE}[attention-1x130x37-h2.1-d16-causal-return_lse-float32]", r"max \|error\|"),
    ),
    Mutant(
        *("unmasked-store", "mlp.py"),
        "tl.store(y + row * C + col, (s * p).to(y.dtype.element_ty), mask=inside)",
        "tl.store(y + row * C + col, (s * p).to(y.dtype.element_ty))",
        *(f"{CONFORMANCE}[bias_gelu-3x7x33-nobias-bfloat16]", r"lanes of a store are outside"),
    ),
    Mutant(
        *("wrong-base-of-the-log-sum-exp", "attention_scores.py"),
        *("level + tl.log(some))", "level + tl.log2(some))"),
        *(f"{CONFORMANCE}[attention-1x130x37-h2.1-d16-causal-return_lse-float32]", r"max \|error\|"),
    ),
    Mutant(
        *("race-between-programs", "mlp.py"),
        *("tl.store(dbias + tl.program_id(0).to(tl.int64) * C + cols,", "tl.store(dbias + cols,"),
        *(f"{GRADIENTS}[bias_gelu-9x1000-large-float32]", r"program .* writes .* wrote"),
    ),
    Mutant(
        *("accumulated-in-bf16", "linear.py"),
        'part = tl.dot(w.to(TYPE), v.to(TYPE), part, input_precision="ieee")',
        'part = tl.dot(w.to(TYPE), v.to(TYPE), part, input_precision="ieee").to(tl.bfloat16).to(tl.float32)',
        "tests/ops/test_triton.py::test_sums_of_16_bit_numbers_are_fp32[linear-17x48x3072-bfloat16]",
        r"assert .*all\(\)",
    ),
]


def copied(at: Path) -> Path:
    """The package, its kernels and its tests, in a folder of their own."""
    for name in ("gptfast", "kernels", "tests"):
        shutil.copytree(ROOT / name, at / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copy(ROOT / "pyproject.toml", at)
    return at


def run(folder: Path, cases: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *cases]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_bug_has_its_place_and_its_case(mutant: Mutant) -> None:
    """What `make test` can say at once: that neither has moved since the mutants last ran."""
    assert (ROOT / "kernels" / "triton" / mutant.file).read_text().count(mutant.old) == 1
    file, _, test = mutant.case.partition("::")
    assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text()


needs_triton = pytest.mark.skipif(not where.on_the_cpu(), reason="it starts interpreted sessions of its own")


@needs_triton
@pytest.mark.slow
def test_without_a_bug_the_cases_pass(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run(copied(tmp_path), sorted({m.case for m in MUTANTS}))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1], "a case that is skipped finds nothing"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_bug_is_found(mutant: Mutant, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    source = copied(tmp_path) / "kernels" / "triton" / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: say anew where the bug goes"
    source.write_text(text.replace(mutant.old, mutant.new))
    done = run(tmp_path, [mutant.case])
    assert done.returncode == 1, f"{mutant.name} survived: {done.stdout[-4000:]}{done.stderr[-2000:]}"
    assert re.search(mutant.found, done.stdout), f"{mutant.name} failed, but otherwise than said: {done.stdout[-4000:]}"
