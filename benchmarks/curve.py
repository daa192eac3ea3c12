"""The same small GPT-2, from the same weights, on the same batches of real text: ours and a patched Hugging Face model
against Hugging Face's own in eager fp32. Losses at every tenth step, and how far apart they are.

Bytes are the tokens. Without --text it reads Python's own help texts.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from benchmarks.train import EAGER, OURS, PATCHED, Contender, Shape, make
from gptfast.bench import threads_set

ALLOWED = 1e-3


def batches(text: bytes, batch: int, length: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """ids and targets (B, T) from places drawn with a fixed seed."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(steps):
        starts = torch.randint(0, data.shape[0] - length - 1, (batch, 1), generator=generator)
        rows = data[starts + torch.arange(length + 1)].long()
        made.append((rows[:, :-1].contiguous(), rows[:, 1:].contiguous()))
    return made


def run(contenders: dict[str, Contender], data: Sequence[tuple[Tensor, Tensor]]) -> list[dict[str, float]]:
    """The losses of each, for every tenth step and the last."""
    rows = []
    for step, (ids, targets) in enumerate(data, 1):
        losses = {name: c.step(ids, targets) for name, c in contenders.items()}
        if step % 10 == 0 or step == len(data):
            rows.append({"step": step, **losses})
            apart = max(abs(losses[name] - losses[EAGER]) for name in losses)
            print(f"\rstep {step} of {len(data)}: loss {losses[EAGER]:.4f}, {apart:.1e} apart", end="", file=sys.stderr)
    print(file=sys.stderr)
    return rows


def main(argv: Sequence[str] = ()) -> int:
    """Returns 1 if a loss is further than 1e-3 from eager PyTorch's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks curve", description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", help="files; their bytes one after another")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--csv", type=Path, help="write the losses there")
    options = parser.parse_args(argv)
    if options.text:
        text = b"\n".join(path.read_bytes() for path in sorted(options.text))
    else:
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    shape = Shape(
        layers=options.layers,
        width=options.width,
        heads=options.width // 64,
        vocabulary=256,
        positions=options.length,
    )
    with threads_set(options.threads):
        contenders = {name: make(name, shape) for name in (OURS, PATCHED, EAGER)}
        rows = run(contenders, batches(text, options.batch, options.length, options.steps))
    worst = {name: max(abs(row[name] - row[EAGER]) for row in rows) for name in (OURS, PATCHED)}
    print(f"{len(text)} bytes of text, {options.steps} steps: loss {rows[0][EAGER]:.4f} -> {rows[-1][EAGER]:.4f}")
    for name, apart in worst.items():
        print(f"{name}: at most {apart:.1e} from {EAGER} at every tenth step (allowed: {ALLOWED:g})")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: round(v, 6) for k, v in row.items()} for row in rows)
    return int(max(worst.values()) > ALLOWED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
