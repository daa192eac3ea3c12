"""`generate()` of Hugging Face's GPT-2 124M (fp32, random weights, SDPA), as it is and patched, in turns.

Both write greedily, and must write the same tokens before anything is timed. The patched
layers run on PyTorch's own threads, unless OMP_WAIT_POLICY or GOMP_SPINCOUNT is set: a column says how it was.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gptfast
from gptfast import hardware
from gptfast.bench import Spread, ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S

BATCHES = (1, 8)


def models(**sizes: Any) -> tuple[Any, Any]:
    """The model as it is, and a patched one of the same weights. sizes: of a GPT2Config, where they aren't GPT-2's."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **sizes)
    plain: Any = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa").eval()
    quick = copy.deepcopy(plain)
    quick.tie_weights()
    gptfast.patch(quick)
    return plain, quick


def generate(model: Any, ids: Tensor, new: int) -> Tensor:
    with torch.inference_mode():
        mask = torch.ones_like(ids)
        made = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    return made[:, ids.shape[1] :]


def measure(plain: Any, quick: Any, batch: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    """One row: tokens/s of both, and how many times as fast the patched one is, round by round."""
    ids = torch.randint(plain.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(1))
    wanted, got = (generate(model, ids, new) for model in (plain, quick))
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            time.sleep(SETTLE_S)
            start = time.perf_counter()
            generate((plain, quick)[which], ids, new)
            times[which].append(time.perf_counter() - start)
    over = ratio(*times)
    before, after = (batch * new / Spread.of(taken).median for taken in times)
    return {
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "equal_tokens": int((wanted == got).sum()),
        "tokens_per_s": round(before, 2),
        "patched_tokens_per_s": round(after, 2),
        "over_unpatched": round(over.median, 3),
        "over_unpatched_low": round(over.low, 3),
        "over_unpatched_high": round(over.high, 3),
    }


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("rows", "tokens", "equal", "as it is, tok/s", "patched, tok/s", "times", "quartiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            *(f"{row['batch']}", f"{row['prompt_tokens']} + {row['new_tokens']}", f"{row['equal_tokens']}"),
            *(f"{row['tokens_per_s']:.1f}", f"{row['patched_tokens_per_s']:.1f}", f"{row['over_unpatched']:.2f}x"),
            f"{row['over_unpatched_low']:.2f}-{row['over_unpatched_high']:.2f}",
        )
    Console(width=120).print(table)


def main(argv: Sequence[str] = ()) -> int:
    """Returns 0; 1 if the patched model wrote something else."""
    p = argparse.ArgumentParser(prog="python -m benchmarks patched", description=__doc__)
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    p.add_argument("--prompt", type=int, default=32)
    p.add_argument("--new", type=int, default=32)
    p.add_argument("--threads", type=int)
    p.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/patched.csv, or to this file")
    args = p.parse_args(argv)
    with threads_set(args.threads):
        plain, quick = models()
        rows = [measure(plain, quick, batch, args.prompt, args.new, args.rounds) for batch in args.batch]
        show(rows, f"GPT-2 124M generate(), {hardware.machine().cpu}, {torch.get_num_threads()} threads")
    if args.csv is not None:
        append_csv(Path(args.csv) if args.csv else results_file("patched"), rows)
    return int(any(row["equal_tokens"] != row["batch"] * row["new_tokens"] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
