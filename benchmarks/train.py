"""A training step of GPT-2 124M (batch 4 x 512, fp32, random weights, no dropout): ours, a patched Hugging Face model,
Hugging Face's own eager and compiled, in turns in one process; and the memory of each in a process of its own.

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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Contender:
    """One training step as a function of ids and targets (B, T), giving the loss."""

    step: Callable[[Tensor, Tensor], float]
    parameters: int


def make(name: str, layers: int = 12, **sizes: Any) -> Contender:
    """The contender by name, from the same seed. sizes: of a GPT2Config, where they aren't GPT-2's own."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(n_layer=layers, use_cache=False, bos_token_id=0, eos_token_id=0, **dropout, **sizes)
    theirs: Any = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").train()
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


def data(batch: int, length: int, vocabulary: int = 50257) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (batch, length + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def flops(batch: int, length: int, layers: int = 12) -> float:
    """Of the matrix products of a step: three times the forward's; a causal row sees half of the keys."""
    config = GPTConfig("gpt2", vocab_size=50257, n_layer=layers, n_embd=768, n_head=12, context=1024)
    return 3.0 * batch * length * config.flops_per_token((length + 1) // 2)


def memory(name: str, batch: int, length: int, layers: int) -> dict[str, Any]:
    """Of this process: the most that a step takes beyond parameters, gradients and optimiser state, in bytes."""
    contender, (ids, targets) = make(name, layers), data(batch, length)
    contender.step(ids, targets)
    contender.step(ids, targets)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory_status("VmRSS")
    reset_peak()
    contender.step(ids, targets)
    # Gradients are freed between steps: they are part of what the step may use.
    return {"peak_bytes": memory_status("VmHWM") - before - 4 * contender.parameters}


def reset_peak() -> None:
    """The process's high-water mark (VmHWM) starts again at what it holds now. Linux."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_status(field: str) -> int:
    """A field of /proc/self/status, VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024


def memory_apart(name: str, batch: int, length: int, layers: int) -> int:
    """memory() in a process of its own."""
    options = [f"--batch={batch}", f"--length={length}", f"--layers={layers}", f"--threads={torch.get_num_threads()}"]
    command = [sys.executable, "-m", "benchmarks", "train", f"--memory={name}", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["peak_bytes"]


def measure(names: Sequence[str], batch: int, length: int, layers: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each contender: seconds a step, how many times as fast as each rival, peak memory."""
    ids, targets = data(batch, length)
    contenders = {name: make(name, layers) for name in names}
    first = {name: [c.step(ids, targets) for _ in range(2)] for name, c in contenders.items()}  # warm-up
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in [*names[i % len(names) :], *names[: i % len(names)]]:
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            contenders[name].step(ids, targets)
            times[name].append(time.perf_counter() - start)
    peaks = {name: memory_apart(name, batch, length, layers) for name in names}
    work = flops(batch, length, layers)
    moved = 28.0 * max(c.parameters for c in contenders.values())  # by AdamW: 4 numbers read, 3 written
    bound = hardware.roofline(Cost(flops=work, bytes=moved)) if hardware.machine().isa else None
    rows = []
    for name in names:
        spread = Spread.of(times[name])
        row: dict[str, Any] = {
            "contender": name,
            "batch": batch,
            "length": length,
            "layers": layers,
            "threads": torch.get_num_threads(),
            "second_loss": round(first[name][1], 5),
            "step_s": round(spread.median, 3),
            "tokens_per_s": round(batch * length / spread.median, 1),
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
            *(row["contender"], f"{row['second_loss']:.4f}", f"{row['step_s']:.2f}", f"{row['tokens_per_s']:.0f}"),
            *(f"{row['gflops']:.0f}", "-" if share is None else f"{share:.0f}%"),
            *(times(row["over_eager"]), times(row["over_compiled"]), f"{row['peak_mb']:.0f}"),
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks train", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=ALL, nargs="+", default=list(ALL))
    parser.add_argument("--memory", choices=ALL, help="measure the memory of this one alone, in this process")
    parser.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/train.csv, or to this file")
    options = parser.parse_args(argv)
    with threads_set(options.threads):
        if options.memory:
            print(json.dumps(memory(options.memory, options.batch, options.length, options.layers)))
            return 0
        if hardware.machine().isa is not None:
            hardware.ceilings(refresh=True)
        rows = measure(options.only, options.batch, options.length, options.layers, options.rounds)
    show(rows, f"GPT-2 124M, batch {options.batch} x {options.length}, fp32, {options.threads} threads")
    if options.csv is not None:
        append_csv(Path(options.csv) if options.csv else results_file("train"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
