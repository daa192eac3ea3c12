"""Rounds: every workload on every engine in turn, each in a process of its own that is stopped meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from benchmarks.generate import Workload
from benchmarks.peers.engines import MODELS, Engine
from benchmarks.peers.worker import Timed, Worker
from gptfast import LanguageModel
from gptfast.bench import Spread, ratio

WORKLOADS = {  # those of one row first: the peak of memory is theirs
    "512": Workload("512", 512, 2),
    "128": Workload("128", 128, 32),
    "1024": Workload("1024", 1024, 16),
    "8 x 128": Workload("8 x 128", 128, 16, batch=8),
}
COLUMNS = {  # what is reported -> the workload, and whether its prompts or its new tokens count
    "prefill 512": ("512", "prefill"),
    "prefill 128": ("128", "prefill"),
    "decode": ("128", "decode"),
    "decode at 1024": ("1024", "decode"),
    "decode 8 rows": ("8 x 128", "decode"),
}


@dataclass
class Contender:
    """An engine with one kind of weights: what loading it told, its first tokens, and its runs by workload."""

    engine: Engine
    weights: str
    worker: Worker
    load_s: float
    weight_bytes: int
    peak_memory: int = 0
    tokens: dict[str, list[list[int]]] = field(default_factory=dict)
    runs: dict[str, list[Timed]] = field(default_factory=lambda: {name: [] for name in WORKLOADS})

    def rates(self, column: str) -> list[float]:
        """Tokens/s of all rows together, one figure a round."""
        name, phase = COLUMNS[column]
        w = WORKLOADS[name]
        if phase == "prefill":
            return [w.batch * w.prompt / timed.prefill_s for timed in self.runs[name]]
        return [w.batch * (w.new - 1) / timed.decode_s for timed in self.runs[name]]


def start(engine: Engine, weights: str, threads: int, until: ExitStack) -> Contender:
    """Prepares in one process and loads in a fresh one. Raises RuntimeError with the reason where it can't."""
    if not engine.python.exists():
        raise RuntimeError("not installed: run `make bench-peers`")
    module = f"benchmarks.peers.{engine.name}_worker"
    with Worker(engine.python, module) as worker:
        worker.ask("prepare", str(MODELS), weights)
    worker = until.enter_context(Worker(engine.python, module))
    return Contender(engine, weights, worker, **worker.ask("load", str(MODELS), weights, threads))


def run(contender: Contender, prompts: list[list[int]], new: int) -> Timed:
    """One timed run, after a short one that wakes the threads."""
    contender.worker.ask("run", [prompts[0][:8]], 2)
    timed = Timed(**contender.worker.ask("run", prompts, new))
    if any(len(row) != new for row in timed.tokens):
        raise RuntimeError(f"{contender.engine.name}: expected {new} new tokens, got {[*map(len, timed.tokens)]}")
    return timed


def measure(contenders: Sequence[Contender], prompts: dict[str, list[list[int]]], rounds: int) -> None:
    """Fills in the contenders' memory, first tokens (of a round that isn't counted) and runs."""
    for contender in contenders:
        for name, workload in WORKLOADS.items():
            if workload.batch > 1 and not contender.peak_memory:
                contender.peak_memory = contender.worker.ask("peak_memory")["bytes"]
            contender.tokens[name] = run(contender, prompts[name], workload.new).tokens
    for i in range(rounds):
        turn = i % len(contenders)
        for name, workload in WORKLOADS.items():
            print(f"round {i + 1} of {rounds}, {name}", file=sys.stderr, flush=True)
            for contender in [*contenders[turn:], *contenders[:turn]]:
                contender.runs[name].append(run(contender, prompts[name], workload.new))


def surprise(lm: LanguageModel, prompts: list[list[int]], tokens: list[list[int]]) -> float:
    """Mean -log p of continuations under a model, nats a token: high where an engine computes something else."""
    found = [x for prompt, row in zip(prompts, tokens) for x in lm.score(prompt + row).token_logprobs[-len(row) :]]
    return -sum(found) / len(found)


def rows(c: Contender, ours: Contender, read: float, nats: float) -> list[dict[str, Any]]:
    """A contender's row for each column. `read`: bytes/s that this machine reads at most, for the share of it that
    reading the weights once a step comes to."""
    found = []
    for column, (name, phase) in COLUMNS.items():
        rates, base = c.rates(column), ours.rates(column)
        speed, over = Spread.of(rates), ratio(base, rates)
        steps_per_s = speed.median / WORKLOADS[name].batch
        percent = 100 * steps_per_s * c.weight_bytes / read if phase == "decode" else None
        found.append(
            {
                "engine": c.engine.name,
                "version": c.engine.version,
                "weights": c.weights,
                "column": column,
                "rounds": len(rates),
                "tokens_per_s": round(speed.median, 1),
                "low": round(speed.low, 1),
                "high": round(speed.high, 1),
                "gptfast_over": round(over.median, 3),
                "gptfast_over_low": round(over.low, 3),
                "gptfast_over_high": round(over.high, 3),
                "read_percent": percent and round(percent, 1),
                "weight_mb": round(c.weight_bytes / 1e6, 1),
                "peak_mb": round(c.peak_memory / 1e6),
                "load_s": round(c.load_s, 2),
                "nats_per_token": round(nats, 3),
            }
        )
    return found
