"""Rounds: every workload on every engine in turn, each in a process of its own that is stopped meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.generate import Workload
from benchmarks.peers.engines import Engine
from benchmarks.peers.models import Subject
from benchmarks.peers.worker import Timed, Worker
from gptfast import LanguageModel, hardware
from gptfast.bench import Spread, ratio

READINGS = 10  # of memory, at least: the best is what decoding is compared with
COLUMNS = {  # what is reported -> the workload, and whether its prompts or its new tokens count
    "prefill 512": ("512", "prefill"),
    "prefill 128": ("128", "prefill"),
    "decode": ("128", "decode"),
    "decode long": ("long", "decode"),
    "decode 8 rows": ("8 x 128", "decode"),
}


@dataclass
class Contender:
    """An engine with one kind of weights: what loading it told, its first tokens, and its runs by workload."""

    engine: Engine
    weights: str
    bits: int
    worker: Worker
    load_s: float
    weight_bytes: int
    peak_memory: int = 0
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    runs: dict[str, list[Timed]] = field(default_factory=dict)

    def rates(self, column: str, workloads: Mapping[str, Workload]) -> list[float]:
        """Tokens/s of all rows together, one figure a round."""
        name, phase = COLUMNS[column]
        w = workloads[name]
        if phase == "prefill":
            return [w.batch * w.prompt / timed.prefill_s for timed in self.runs[name]]
        return [w.batch * (w.new - 1) / timed.decode_s for timed in self.runs[name]]


def start(subject: Subject, engine: Engine, weights: str, bits: int, threads: int, until: ExitStack) -> Contender:
    """Prepares in one process and loads in a fresh one. Raises RuntimeError with the reason where it can't."""
    if not engine.python.exists():
        raise RuntimeError("not installed: run `make bench-peers`")
    module, folder = f"benchmarks.peers.{engine.name}_worker", str(subject.folder)
    with Worker(engine.python, module) as worker:
        worker.ask("prepare", folder, weights)
    worker = until.enter_context(Worker(engine.python, module))
    return Contender(engine, weights, bits, worker, **worker.ask("load", folder, weights, threads))


def run(contender: Contender, prompts: list[list[int]], new: int) -> Timed:
    """One timed run, after a short one that wakes the threads."""
    contender.worker.ask("run", [prompts[0][:8]], 2)
    timed = Timed(**contender.worker.ask("run", prompts, new))
    if any(len(row) != new for row in timed.tokens):
        raise RuntimeError(f"{contender.engine.name}: expected {new} new tokens, got {[*map(len, timed.tokens)]}")
    return timed


def warm_up(
    contender: Contender, workloads: Mapping[str, Workload], prompts: Mapping[str, list[list[int]]]
) -> Contender:
    """A first run of everything, which isn't counted: the contender's memory and its first tokens."""
    for name, workload in workloads.items():
        if workload.batch > 1 and not contender.peak_memory:
            contender.peak_memory = contender.worker.ask("peak_memory")["bytes"]
        contender.tokens[name] = run(contender, prompts[name], workload.new).tokens
    return contender


def one_round(
    contenders: Sequence[Contender],
    workloads: Mapping[str, Workload],
    prompts: Mapping[str, list[list[int]]],
    first: int,
    threads: int,
) -> list[float]:
    """Every workload on every contender, in turns that begin with number `first`; what a plain reader of memory got
    between them, bytes/s."""
    turn, read = first % len(contenders), []
    for name, workload in workloads.items():
        read.append(hardware.read_rate(threads))
        for contender in [*contenders[turn:], *contenders[:turn]]:
            contender.runs.setdefault(name, []).append(run(contender, prompts[name], workload.new))
    return read


def measure(
    contenders: Sequence[Contender],
    workloads: Mapping[str, Workload],
    prompts: Mapping[str, list[list[int]]],
    rounds: int,
    threads: int,
) -> float:
    """Fills in the contenders' runs; the best of the READINGS or more, bytes/s."""
    read: list[float] = []
    for i in range(rounds):
        print(f"{contenders[0].bits} bits, round {i + 1} of {rounds}", file=sys.stderr, flush=True)
        read += one_round(contenders, workloads, prompts, i, threads)
    return max(read + [hardware.read_rate(threads) for _ in range(len(read), READINGS)])


def surprise(lm: LanguageModel, prompts: list[list[int]], tokens: list[list[int]]) -> float:
    """Mean -log p of continuations under a model, nats a token: high where an engine computes something else."""
    found = [x for prompt, row in zip(prompts, tokens) for x in lm.score(prompt + row).token_logprobs[-len(row) :]]
    return -sum(found) / len(found)


def rows(
    c: Contender, ours: Contender, workloads: Mapping[str, Workload], read: float, nats: float
) -> list[dict[str, Any]]:
    """A contender's row for each column. `ours`: gptfast with weights of as many bits. `read`: bytes/s that the reader
    got at most, for the share of it that reading the weights once a step comes to."""
    found = []
    for column, (name, phase) in COLUMNS.items():
        rates = c.rates(column, workloads)
        speed, over = Spread.of(rates), ratio(ours.rates(column, workloads), rates)
        steps_per_s = speed.median / workloads[name].batch
        percent = 100 * steps_per_s * c.weight_bytes / read if phase == "decode" else None
        found.append(
            {
                "bits": c.bits,
                "engine": c.engine.name,
                "version": c.engine.version,
                "weights": c.weights,
                "column": column,
                "prompt": workloads[name].prompt,
                "rounds": len(rates),
                "tokens_per_s": round(speed.median, 1),
                "low": round(speed.low, 1),
                "high": round(speed.high, 1),
                "gptfast_over": round(over.median, 3),
                "gptfast_over_low": round(over.low, 3),
                "gptfast_over_high": round(over.high, 3),
                "read_gbytes_per_s": round(read / 1e9, 1),
                "read_percent": percent and round(percent, 1),
                "weight_mb": round(c.weight_bytes / 1e6, 1),
                "peak_mb": round(c.peak_memory / 1e6),
                "load_s": round(c.load_s, 2),
                "nats_per_token": round(nats, 3),
            }
        )
    return found
