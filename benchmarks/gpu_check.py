"""`make gpu-check`: is every op right on this GPU, and how fast? One command, one report.

The tests of the op pages run with `--device cuda`; where NVIDIA's compute-sanitizer is on the path, some under it,
too. Then each case of gpu_cases.py is timed against eager PyTorch, torch.compile of it and, where they apply and are
installed, F.scaled_dot_product_attention, flash-attn, Liger and FlashInfer, and set against the bandwidth and the
matrix rate that this GPU shows. At last whole models generate, and one trains, beside Hugging Face's. Whatever was
found is on disk at once, as report.json and report.md under --out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_rivals
from gptfast.kernels import reason_missing

ROOT = Path(__file__).parents[1]
TIMES = """Median microseconds. bound: bytes at the copy's rate, or operations at the matrix rate; %: how much of the
time that is. error: of the result, as a part of what it may be."""
CONFORMANCE = "tests/ops/test_conformance.py"
TESTS = ("tests/test_graph.py", "tests/test_backends_agree.py", CONFORMANCE, "tests/ops/test_gradients.py")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the report (default: benchmarks/results/<gpu>)")
    parser.add_argument("--tests-s", type=float, default=1800, help="seconds for the tests; 0 leaves them out")
    parser.add_argument("--budget-s", type=float, default=900, help="seconds for the timings; 0 leaves them out")
    parser.add_argument("--sanitizer-s", type=float, default=600, help="seconds for compute-sanitizer; 0 leaves it out")
    parser.add_argument("--models-s", type=float, default=300, help="seconds for whole models; 0 leaves them out")
    parser.add_argument("--only", default="", help="ops whose names contain this")
    parser.add_argument("--workers", type=int, default=8, help="processes that share the tests")
    options = parser.parse_args(argv)
    if (reason := reason_missing("triton")) is not None or not torch.cuda.is_available():
        print(f"gpu-check needs a GPU that PyTorch and Triton can use: {reason or 'PyTorch sees none'}")
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    report = Report(options.out or ROOT / "benchmarks" / "results" / name)
    report.add("environment", environment())
    if options.tests_s:
        run_tests(report, options.tests_s, options.workers, options.only)
    if options.sanitizer_s:
        run_sanitizer(report, options.sanitizer_s, options.only)
    if options.budget_s:
        from benchmarks.gpu_timing import run_timings

        run_timings(report, options.budget_s, options.only)
    if options.models_s and not options.only:
        from benchmarks import gpu_models, gpu_timing

        if "ceilings" not in report.parts:
            report.add("ceilings", gpu_timing.ceilings())
        gpu_models.run_models(report, options.models_s)
    print(f"\n{report.folder}/report.md")
    tests, watched = report.parts.get("tests", {}), report.parts.get("sanitizer", {})
    return int(bool(tests.get("failed") or tests.get("unfinished") or watched.get("errors")))


class Report:
    """What has been found, on disk whenever something is added."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, found: Any) -> None:
        self.parts[part] = found
        (self.folder / "report.json").write_text(json.dumps(self.parts, indent=1) + "\n")
        (self.folder / "report.md").write_text(markdown(self.parts))


def environment() -> dict[str, Any]:
    """What this was measured on."""
    import triton

    here = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    found = {
        "gpu": here.name,
        "architecture": f"sm_{here.major}{here.minor}" if torch.version.cuda else getattr(here, "gcnArchName", ""),
        "memory GiB": round(here.total_memory / 2**30, 1),
        "multiprocessors": here.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
    print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
    return found


def run_tests(report: Report, seconds: float, workers: int, only: str) -> None:
    """The op pages' tests on the GPU, in a process of their own that is stopped when its time is up."""
    record = report.folder / "tests.jsonl"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *TESTS, "--device", "cuda", "--record", str(record)]
    command += ["-m", "not slow"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    if only:
        command += ["-k", only]
    began = time.monotonic()
    with (report.folder / "tests.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and time.monotonic() - began < seconds:
            time.sleep(1)
            if int(time.monotonic() - began) % 15 == 0:
                print("tests:", dict(Counter(r["outcome"] for r in recorded(record))), flush=True)
    unfinished = process.poll() is None
    if unfinished:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    results = recorded(record)
    counts = Counter(r["outcome"] for r in results)
    failures = [{"test": r["test"], "why": r["why"]} for r in results if r["outcome"] == "failed"]
    found = {
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "unfinished": unfinished,
        "seconds": round(time.monotonic() - began),
        "failures": failures,
        "skips": dict(Counter(r["why"][:200] for r in results if r["outcome"] == "skipped")),
    }
    if not results:
        found["log"] = (report.folder / "tests.log").read_text()[-3000:]
    report.add("tests", found)
    counted = ", ".join(f"{found[k]} {k}" for k in ("passed", "failed", "skipped"))
    print(f"tests: {counted} in {found['seconds']} s{', stopped before the end' * unfinished}")
    for failure in failures[:40]:
        print(f"  {failure['test']}: {failure['why'][:300]}")


def run_sanitizer(report: Report, seconds: float, only: str) -> None:
    """Cases of the ops in fp32 under compute-sanitizer's memcheck, one process, as far as the time goes: it makes
    kernels ten to a hundred times as slow."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        report.add("sanitizer", {"missing": "compute-sanitizer isn't on the path; it comes with the CUDA toolkit"})
        return
    log = report.folder / "sanitizer.log"
    command = [tool, "--tool", "memcheck", "--target-processes", "all", "--print-limit", "20", sys.executable]
    command += ["-m", "pytest", "-p", "no:xdist", CONFORMANCE, "--device", "cuda", "-m", "not slow", "-x"]
    command += ["-k", f"float32 and ({only})" if only else "float32"]
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
    errors, took = sanitized(log.read_text()), round(time.monotonic() - began)
    report.add("sanitizer", {"errors": errors, "seconds": took})
    print(f"compute-sanitizer: {len(errors)} errors in {took} s")


def sanitized(log: str) -> list[str]:
    """The first lines of the errors that compute-sanitizer tells of."""
    said = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    return [line for line in said if re.match(r"Invalid|Out-of|Misaligned|Program hit|Race|Leaked", line)][:40]


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def markdown(parts: dict[str, Any]) -> str:
    """The report as a page."""
    lines = ["# GPU check", ""]
    lines += [f"- {key}: {value}" for key, value in parts.get("environment", {}).items()]
    if tests := parts.get("tests"):
        counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped"))
        lines += ["", "## Tests", "", f"{counts} in {tests['seconds']} s{', unfinished' * tests['unfinished']}", ""]
        lines += [f"- `{f['test']}`: {f['why'].splitlines()[0] if f['why'] else ''}" for f in tests["failures"]]
    if watched := parts.get("sanitizer"):
        said = watched.get("missing") or f"{len(watched['errors'])} errors in {watched['seconds']} s"
        lines += ["", "## compute-sanitizer", "", said, "", *(f"- {error}" for error in watched.get("errors", ()))]
    if ceilings := parts.get("ceilings"):
        lines += ["", "## What this GPU shows", ""]
        lines += [f"- {key}: {value:,.0f}" for key, value in ceilings.items()]
    for part in ("generation", "training"):
        if rows := parts.get(part):
            names = list(dict.fromkeys(name for row in rows for name in row))
            lines += ["", f"## {part.capitalize()}", "", "|" + "|".join(names) + "|", "|" + "---|" * len(names)]
            lines += ["|" + "|".join(_cell(row.get(name)) for name in names) + "|" for row in rows]
    if rows := parts.get("timings"):
        names = ["op", "case", "dtype", "pass", "us", "eager", "compiled", "sdpa", "x eager", "x compiled", "x sdpa"]
        rivals = [name for name in gpu_rivals.NAMES if any(row.get(name) for row in rows)]
        names += [*rivals, *(f"x {name}" for name in rivals), "bound", "%", "error", "note"]
        lines += ["", "## Timings", "", TIMES, "", "|" + "|".join(names) + "|", "|" + "---|" * len(names)]
        lines += ["|" + "|".join(_cell(row.get(name)) for name in names) + "|" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")[:160]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
