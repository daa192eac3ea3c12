"""From a program's start to SmolLM2's first token: fresh processes, the file in the system's cache.

Three kinds of process take turns: one that only imports torch, one that loads the model and generates a token after 16,
and `gptfast generate`, the command. What is reported is what they take beyond `import torch`: seconds from the end of
that import for the Python API, the difference of the processes' times in the same round for the command. Memory is the
peak of resident memory, which counts the pages of the mapped file, after the first token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from gptfast import hardware
from gptfast.bench import Spread
from gptfast.bench.record import append_csv, results_file

PROMPT = 16  # tokens
MEMORY = """
import json, sys, time
def peak():  # of this process alone: getrusage begins with what its parent had
    try:
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
"""
BARE = f"{MEMORY}\nimport torch\nprint(json.dumps({{'bytes': peak()}}))"
MODEL = f"""{MEMORY}
import torch
start, before = time.perf_counter(), peak()
import gptfast
gptfast.load
imported = time.perf_counter()
lm = gptfast.load("smollm2")
loaded = time.perf_counter()
lm.generate(list(range(1000, 1000 + {PROMPT})), max_new_tokens=1, temperature=0)
first = time.perf_counter()
print(json.dumps({{"import_s": imported - start, "load_s": loaded - imported, "first_token_s": first - start,
                  "bytes": peak()}}))
"""
WORDS = "one two three four five six seven eight nine ten eleven twelve red green blue black"
COMMAND = ("-m", "gptfast", "generate", "--max-new-tokens", "1", "--temperature", "0", "--prompt", WORDS)
COLUMNS = ("import_s", "load_s", "first_token_s", "command_s", "peak_mb")

Run = Callable[[Sequence[str]], tuple[float, str]]


def run(arguments: Sequence[str]) -> tuple[float, str]:
    """Python with these arguments: the seconds of its whole life, and what it printed."""
    # Modules compiled before, as an installation has them.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"expected a process that ends well, got status {done.returncode}: {done.stderr[-500:]}")
    return seconds, done.stdout


def measure(rounds: int, run: Run = run) -> dict[str, list[float]]:
    """Of each column, a sample for each round; the first round of all is not counted: it fills the caches."""
    samples: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for i in range(rounds + 1):
        bare_s, said = run(["-c", BARE])
        bare_bytes = json.loads(said)["bytes"]
        found = json.loads(run(["-c", MODEL])[1])
        command_s, _ = run(COMMAND)
        if i:
            found |= {"command_s": command_s - bare_s, "peak_mb": (found["bytes"] - bare_bytes) / 1e6}
            for name in COLUMNS:
                samples[name].append(found[name])
    return samples


def row(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles."""
    cells: dict[str, Any] = {"threads": hardware.machine().threads, "rounds": len(samples["load_s"])}
    for name in COLUMNS:
        spread = Spread.of(samples[name])
        parts = {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}
        cells |= {column: round(value, 1 if name == "peak_mb" else 4) for column, value in parts.items()}
    return cells


def show(found: dict[str, Any], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("beyond import torch", "median", "quartiles"):
        table.add_column(heading, justify="left" if heading.startswith("beyond") else "right")
    names = ("import gptfast", "load", f"first token after {PROMPT}", "the command's whole life", "peak memory")
    for name, column in zip(names, COLUMNS):
        unit, digits = ("MB", 0) if column == "peak_mb" else ("s", 3)
        low, high = (f"{found[f'{column}_{end}']:.{digits}f}" for end in ("low", "high"))
        table.add_row(name, f"{found[column]:.{digits}f} {unit}", f"{low} - {high}")
    Console(width=100).print(table)


def main(argv: Sequence[str] = ()) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks start", description=__doc__)
    p.add_argument("--rounds", type=int, default=11)
    p.add_argument("--quick", action="store_true", help="3 rounds")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = p.parse_args(argv)
    found = row(measure(3 if args.quick else args.rounds))
    if args.json:
        print(json.dumps(found))
    else:
        show(found, f"SmolLM2-135M from a fresh process, {hardware.machine().cpu}, {found['rounds']} rounds")
    append_csv(results_file("start"), [found])
    return 0
