"""Times models on every engine that is installed, in turns, each in a process of its own; a first round isn't counted.
Medians, and ratios round by round, among engines whose weights have as many bits.

"of reading" is the rate at which decoding reads the weights, of what a plain reader got at most in the same run. "nats"
tells whether an engine computes the model at all: the mean -log p of its greedy tokens under gptfast's exact model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.peers import report
from benchmarks.peers.engines import BITS, ENGINES, Engine, install
from benchmarks.peers.measure import Contender, measure, rows, start, surprise, warm_up
from benchmarks.peers.models import SUBJECTS, Subject
from gptfast import LanguageModel, hardware
from gptfast.bench.record import append_csv, environment, results_file


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--install", action="store_true", help="first make the engines' environments in .venv-peers")
    p.add_argument("--model", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS], help="default: all")
    p.add_argument("--bits", nargs="+", type=int, choices=BITS, default=BITS, help="of the weights; default: all")
    p.add_argument("--engines", nargs="+", choices=[e.name for e in ENGINES[1:]], help="beside gptfast; default: all")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--json", action="store_true", help="print a JSON object for each model instead of the tables")
    args = p.parse_args(argv)
    engines = [e for e in ENGINES if e is ENGINES[0] or not args.engines or e.name in args.engines]
    missing = {e.name: reason for e in engines if args.install and (reason := install(e))}
    for name in args.model:
        compare(SUBJECTS[name], [e for e in engines if e.name not in missing], missing, args)
    return 0


def compare(subject: Subject, engines: Sequence[Engine], missing: dict[str, str], args: argparse.Namespace) -> None:
    """Measures, shows and records one model. missing: why engines aren't here; those of this model are added."""
    exact, missing = subject.write(), dict(missing)
    found = [row for bits in args.bits for row in compare_bits(subject, exact, bits, engines, missing, args)]
    title = f"{subject.title}, {hardware.machine().cpu}, {args.threads} threads"
    if args.json:
        print(json.dumps({**environment(), "missing": missing, "rows": found}))
    else:
        report.show(found, missing, title)
    file = results_file(f"peers-{subject.name}")
    append_csv(file, found)
    report.plot(found, file.with_suffix(".png"), title)


def compare_bits(
    subject: Subject,
    exact: LanguageModel,
    bits: int,
    engines: Sequence[Engine],
    missing: dict[str, str],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The rows of all engines with weights of so many bits, no others being loaded."""
    prompts, workloads = subject.prompts(exact), subject.workloads
    with ExitStack() as until:
        contenders: list[Contender] = []
        for engine, weights in [(e, w) for e in engines for w in e.weights.get(bits, ())]:
            try:
                c = start(subject, engine, weights, bits, args.threads, until)
                contenders.append(warm_up(c, workloads, prompts))
            except RuntimeError as error:
                missing[f"{engine.name} {weights}"] = str(error)
        read = measure(contenders, workloads, prompts, args.rounds, args.threads)
    found = []
    for c in contenders:
        nats = surprise(exact, prompts["128"], c.tokens["128"])
        found += rows(c, contenders[0], workloads, read, nats)
    return [{"threads": args.threads} | row for row in found]


if __name__ == "__main__":
    sys.exit(main())
