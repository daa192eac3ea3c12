"""Times SmolLM2-135M on every engine that is installed, in turns, each in a process of its own; a first round isn't
counted. Medians, and ratios round by round.

"of reading" is the rate at which decoding reads the weights, of what this machine reads at most. "nats" tells whether
an engine computes the model at all: the mean -log p of its greedy tokens under gptfast's exact model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import torch

import gptfast
from benchmarks.generate import english
from benchmarks.peers import report
from benchmarks.peers.engines import ENGINES, install, write_sources
from benchmarks.peers.measure import WORKLOADS, measure, rows, start, surprise
from gptfast import hardware
from gptfast.bench.record import append_csv, environment, results_file


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--install", action="store_true", help="first make the engines' environments in .venv-peers")
    p.add_argument("--engines", nargs="+", choices=[e.name for e in ENGINES[1:]], help="beside gptfast; default: all")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = p.parse_args(argv)
    engines = [e for e in ENGINES if not e.requires or not args.engines or e.name in args.engines]
    missing = {e.name: reason for e in engines if args.install and (reason := install(e))}
    exact = gptfast.load("smollm2", activations="exact")
    write_sources(exact)
    prompts = {name: english(exact, workload) for name, workload in WORKLOADS.items()}
    read = hardware.ceilings(refresh=True).best("dram", args.threads)
    contenders = []
    with ExitStack() as until:
        for engine in engines:
            for weights in engine.weights if engine.name not in missing else ():
                try:
                    contenders.append(start(engine, weights, args.threads, until))
                except RuntimeError as error:
                    missing[f"{engine.name} {weights}"] = str(error)
        measure(contenders, prompts, args.rounds)
    found = []
    for c in contenders:
        found += rows(c, contenders[0], read, surprise(exact, prompts["128"], c.tokens["128"]))
    title = f"SmolLM2-135M, {hardware.machine().cpu}, {args.threads} threads, reads {read / 1e9:.1f} GB/s at most"
    if args.json:
        print(json.dumps({**environment(), "read_bytes_per_s": read, "missing": missing, "rows": found}))
    else:
        report.show(found, missing, title)
    recorded = [{"threads": args.threads, "read_gbytes_per_s": round(read / 1e9, 1)} | row for row in found]
    append_csv(results_file("peers"), recorded)
    report.plot(found, results_file("peers").with_suffix(".png"), title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
