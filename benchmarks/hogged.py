"""SmolLM2-135M decoding while another process computes on one of the cores, against the same in quiet, in turns.

The neighbour is pinned to the last of this process's cores where the system can do that, and is started and ended in
every round. Half of the speed is what its core's loss would cost with two cores; whoever waits for threads that have
lost theirs gets a tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import gptfast
from gptfast import hardware
from gptfast.bench import Spread, ratio, threads_set
from gptfast.bench.record import append_csv, results_file

NEW = 64  # tokens
HOG = """
import os, sys
if len(sys.argv) > 1:
    os.sched_setaffinity(0, {int(sys.argv[1])})
print("on", flush=True)
while True:
    pass
"""


@contextmanager
def hog() -> Iterator[None]:
    """Another process that keeps one core busy for the length of a block."""
    core = [str(max(os.sched_getaffinity(0)))] if hasattr(os, "sched_getaffinity") else []
    with subprocess.Popen([sys.executable, "-c", HOG, *core], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it is running
            yield
        finally:
            process.kill()


def measure(decode: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Tokens/s of each round in quiet and beside a hog; which comes first changes with the round."""
    decode()  # records the step
    quiet, loud = [], []
    for i in range(rounds):
        for beside in (False, True) if i % 2 else (True, False):
            if beside:
                with hog():
                    loud.append(decode())
            else:
                quiet.append(decode())
    return quiet, loud


def row(quiet: Sequence[float], loud: Sequence[float]) -> dict[str, Any]:
    """Medians, and the quartiles of the share of the quiet speed that is left."""
    left = ratio(loud, quiet)
    return {
        "threads": torch.get_num_threads(),
        "rounds": len(quiet),
        "new_tokens": NEW,
        "quiet_tokens_per_s": round(Spread.of(quiet).median, 1),
        "hogged_tokens_per_s": round(Spread.of(loud).median, 1),
        "left": round(left.median, 3),
        "left_low": round(left.low, 3),
        "left_high": round(left.high, 3),
    }


def main(argv: Sequence[str] = ()) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks hogged", description=__doc__)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--quick", action="store_true", help="3 rounds")
    p.add_argument("--threads", type=int)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    args = p.parse_args(argv)
    with threads_set(args.threads):
        lm = gptfast.load("smollm2")

        def decode() -> float:
            found = lm.generate(list(range(1000, 1032)), max_new_tokens=NEW, temperature=0, ignore_eos=True)
            return found.stats.decode_tokens / found.stats.decode_s

        found = row(*measure(decode, 3 if args.quick else args.rounds))
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"SmolLM2-135M, {hardware.machine().cpu}, {found['threads']} threads: {found['quiet_tokens_per_s']} "
            f"tokens/s in quiet, {found['hogged_tokens_per_s']} beside a process that keeps a core busy: "
            f"{found['left']:.0%}, quartiles {found['left_low']:.0%} - {found['left_high']:.0%}"
        )
    append_csv(results_file("hogged"), [found])
    return 0
