"""A training step of GPT-2 124M (batch 4 x 512, fp32, random weights, no dropout), or of one of another shape or dtype:
ours, a patched Hugging Face model, Hugging Face's own eager and compiled, in turns in one process; and the memory of
each in a process of its own.

A step is forward, backward, clipping of the gradients' norm and AdamW. The rivals get PyTorch's fused AdamW, SDPA and
their own loss; all start from the same weights, and their losses are compared.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptfast
from gptfast import hardware
from gptfast.bench import ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S, Spread
from gptfast.model import GPT, GPTConfig
from gptfast.ops.spec import Cost
from gptfast.train import AdamW

EAGER, COMPILED, PATCHED, OURS = "transformers eager", "transformers compiled", "transformers patched", "gptfast"
ALL = (OURS, PATCHED, COMPILED, EAGER)
LR, CLIP = 3e-4, 1.0
SAMPLE_S = 0.1


@dataclass(frozen=True)
class Shape:
    """A GPT-2, by default the small one, and a batch for it."""

    batch: int = 4
    length: int = 512
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    positions: int = 1024
    dtype: str = "float32"

    def __str__(self) -> str:
        small = (self.layers, self.width, self.vocabulary) == (12, 768, 50257)
        name = "GPT-2 124M" if small else f"GPT-2 with {self.layers} layers of {self.width}, {self.vocabulary} tokens"
        return f"{name}, batch {self.batch} x {self.length}, {self.dtype}"


@dataclass(frozen=True)
class Contender:
    """One training step as a function of ids and targets (B, T), giving the loss."""

    step: Callable[[Tensor, Tensor], float]
    parameters: int


def make(name: str, shape: Shape) -> Contender:
    """The contender by name, from the same seed."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = dict(n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, vocab_size=shape.vocabulary)
    config = GPT2Config(
        **sizes, n_positions=shape.positions, use_cache=False, bos_token_id=0, eos_token_id=0, **dropout
    )
    theirs: Any = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()
    theirs = theirs.to(getattr(torch, shape.dtype))
    if name == OURS:
        model: Any = GPT.from_huggingface_model(theirs).train()
        del theirs
        return _contender(model, model.loss, _ours(model))
    if name == PATCHED:
        gptfast.patch(theirs)

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return run(input_ids=ids, labels=ids, shift_labels=targets).loss

    run = torch.compile(theirs) if name == COMPILED else theirs
    if name == PATCHED:
        return _contender(theirs, loss, _ours(theirs))
    optimiser = torch.optim.AdamW(theirs.parameters(), lr=LR, fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()

    return _contender(theirs, loss, update)


def _ours(model: Any) -> Callable[[], None]:
    optimiser = AdamW(model.parameters(), lr=LR, max_norm=CLIP)

    def update() -> None:
        optimiser.step()
        optimiser.zero_grad()

    return update


def _contender(model: Any, loss: Callable[[Tensor, Tensor], Tensor], update: Callable[[], None]) -> Contender:
    def step(ids: Tensor, targets: Tensor) -> float:
        made = loss(ids, targets)
        made.backward()
        update()
        return made.item()

    return Contender(step, sum(p.numel() for p in model.parameters()))


def data(shape: Shape) -> tuple[Tensor, Tensor]:
    size = shape.batch, shape.length + 1
    ids = torch.randint(0, shape.vocabulary, size, generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def flops(shape: Shape) -> float:
    """Of the matrix products of a step: three times the forward's; a causal row sees half of the keys."""
    sizes: dict[str, Any] = dict(
        vocab_size=shape.vocabulary, n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads
    )
    config = GPTConfig("gpt2", **sizes, context=shape.positions)
    return 3.0 * shape.batch * shape.length * config.flops_per_token((shape.length + 1) // 2)


def memory(name: str, shape: Shape) -> dict[str, Any]:
    """Of this process: the most that a step takes beyond parameters, gradients and optimiser state, in bytes."""
    contender, (ids, targets) = make(name, shape), data(shape)
    contender.step(ids, targets)
    contender.step(ids, targets)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_status("VmRSS")
    reset_peak()
    contender.step(ids, targets)
    # Gradients are freed between steps: they are part of what the step may use.
    held = getattr(torch, shape.dtype).itemsize * contender.parameters
    return {"peak_bytes": memory_status("VmHWM") - before - held}


def reset_peak() -> None:
    """The process's high-water mark (VmHWM) starts again at what it holds now. Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_status(field: str) -> int:
    """A field of /proc/self/status, VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def memory_apart(name: str, shape: Shape) -> int:
    """memory() in a process of its own."""
    options = [f"--{key}={value}" for key, value in asdict(shape).items()] + [f"--threads={torch.get_num_threads()}"]
    command = [sys.executable, "-m", "benchmarks", "train", f"--memory={name}", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak_bytes"]


def measure(names: Sequence[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender: seconds a step, how many times as fast as each rival, peak memory. A sample is one
    step, or as many as the first contender takes a tenth of a second for."""
    ids, targets = data(shape)
    contenders = {name: make(name, shape) for name in names}
    first = {name: [c.step(ids, targets) for _ in range(2)] for name, c in contenders.items()}  # warm-up
    start = time.perf_counter()
    contenders[names[0]].step(ids, targets)
    steps = max(int(SAMPLE_S / (time.perf_counter() - start)), 1)
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in [*names[i % len(names) :], *names[: i % len(names)]]:
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            for _ in range(steps):
                contenders[name].step(ids, targets)
            times[name].append((time.perf_counter() - start) / steps)
    peaks = {name: memory_apart(name, shape) for name in names}
    work = flops(shape)
    unit, size = ("fp32", 4) if shape.dtype == "float32" else ("bf16", 2)
    # By AdamW: its two numbers of fp32 read and written, the parameter too, the gradient read.
    moved = (16.0 + 3 * size) * max(c.parameters for c in contenders.values())
    bound = hardware.roofline(Cost(flops=work, bytes=moved, unit=unit)) if hardware.machine().isa else None
    rows = []
    for name in names:
        spread = Spread.of(times[name])
        row: dict[str, Any] = {
            "contender": name,
            **asdict(shape),
            "threads": torch.get_num_threads(),
            "second_loss": round(first[name][1], 5),
            "step_s": round(spread.median, 5),
            "tokens_per_s": round(shape.batch * shape.length / spread.median, 1),
            "gflops": round(work / spread.median / 1e9, 1),
            "roofline_percent": bound and round(100 * bound / spread.median, 1),
            "peak_mb": round(peaks[name] / 1e6, 1),
        }
        for rival, column in ((EAGER, "eager"), (COMPILED, "compiled")):
            over = ratio(times[rival], times[name]) if rival in times else None
            row |= {f"over_{column}": over and round(over.median, 3), f"over_{column}_low": over and round(over.low, 3)}
            row[f"over_{column}_high"] = over and round(over.high, 3)
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("training step")
    for heading in ("loss after 1", "s", "tokens/s", "GFLOP/s", "roofline", "over eager", "over compiled", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}x"

    for row in rows:
        share = row["roofline_percent"]
        table.add_row(
            *(row["contender"], f"{row['second_loss']:.4f}", f"{row['step_s']:.3g}", f"{row['tokens_per_s']:.0f}"),
            *(f"{row['gflops']:.0f}", "-" if share is None else f"{share:.0f}%"),
            *(times(row["over_eager"]), times(row["over_compiled"]), f"{row['peak_mb']:.0f}"),
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    for name, default in asdict(Shape()).items():
        choices = ("float32", "bfloat16") if name == "dtype" else None
        parser.add_argument(f"--{name}", type=type(default), default=default, choices=choices)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=ALL, nargs="+", default=list(ALL))
    parser.add_argument("--memory", choices=ALL, help="measure the memory of this one alone, in this process")
    parser.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/train.csv, or to this file")
    options = parser.parse_args(argv)
    shape = Shape(**{name: getattr(options, name) for name in asdict(Shape())})
    if any(isinstance(x, int) and x < 1 for x in asdict(shape).values()):
        parser.error("expected positive sizes")
    if shape.width % shape.heads or shape.length > shape.positions:
        parser.error(
            f"expected a width of whole heads and a length of at most {shape.positions} positions, "
            f"got {shape.width} for {shape.heads} heads and {shape.length}"
        )
    with threads_set(options.threads):
        if options.memory:
            print(json.dumps(memory(options.memory, shape)))
            return 0
        if hardware.machine().isa is not None:
            hardware.ceilings(refresh=True)
        rows = measure(options.only, shape, options.rounds)
    show(rows, f"{shape}, {options.threads} threads")
    if options.csv is not None:
        append_csv(Path(options.csv) if options.csv else results_file("train"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
