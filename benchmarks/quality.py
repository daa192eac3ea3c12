"""What each way of holding weights, rounding activations and keeping keys and values costs in quality: SmolLM2-135M on
English text (Python's own help texts) against the same weights in fp32. KL is the mean of KL(fp32 || this) over
positions, in nats.

The package's weights are 4-bit already: Q4_1 blocks give them back exactly, so "q4" is measured as lossless here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import gptfast
from gptfast import hardware
from gptfast.bench.record import append_csv, results_file
from gptfast.generate.cache import CACHE_DTYPES, KVCache

WAYS = (
    *((None, "int8"), ("bf16", "exact"), ("fp16", "exact"), ("q8", "exact"), ("q8", "int8"), ("q4", "int8")),
    *(("q4_1", "int8"), ("q4_0", "int8")),
)
CACHES = ("fp16", "bf16", "int8")  # under fp32 weights and activations
SHIPPED = (None, "int8", "bf16")  # what loading the package without a word gives
ROW = 512  # tokens that see one another


def log_probs(lm: gptfast.LanguageModel, rows: Tensor, kv_cache: str = "fp32") -> Tensor:
    """Of all positions; with fp32 no cache is needed: it changes nothing."""
    dtype = CACHE_DTYPES[kv_cache]
    caches = [None if kv_cache == "fp32" else KVCache(lm.model.config, 1, ROW, dtype) for _ in rows]
    return torch.cat([lm.model(row[None], cache).log_softmax(-1) for row, cache in zip(rows, caches)])


def perplexity(found: Tensor, rows: Tensor) -> float:
    return found[:, :-1].gather(2, rows[:, 1:, None]).mean().neg().exp().item()


def measure(tokens: int) -> list[dict[str, Any]]:
    """A row for fp32 and for each of CACHES and WAYS."""
    exact = gptfast.load("smollm2", weights="fp32")
    assert exact.tokenizer is not None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    rows = torch.tensor(exact.tokenizer.encode(text)[:tokens]).view(-1, ROW)
    wanted = log_probs(exact, rows)
    results = []
    kept = [("fp32", "exact", name) for name in ("fp32", *CACHES)]
    for weights, activations, kv_cache in (*kept, *[(*way, "fp32") for way in WAYS], SHIPPED):
        print(f"{weights or 'as stored'}, {activations}, {kv_cache} ...", file=sys.stderr, flush=True)
        if weights == "fp32":
            lm = exact
        elif weights is None:
            lm = gptfast.load("smollm2", activations=activations)
        else:
            lm = gptfast.load("smollm2", weights=weights, activations=activations)
        found = log_probs(lm, rows, kv_cache)
        results.append(
            {
                "weights": weights or "as stored (Q4_1, head Q8_0)",
                "activations": activations,
                "kv_cache": kv_cache,
                "tokens": rows.numel(),
                "perplexity": round(perplexity(found, rows), 3),
                "mean_kl": float(f"{(wanted.exp() * (wanted - found)).sum(-1).mean().item():.3g}"),
                "same_top1_percent": round(100 * (wanted.argmax(-1) == found.argmax(-1)).double().mean().item(), 2),
                "weight_mb": round(lm.model.weight_bytes() / 1e6, 1),
            }
        )
    return results


def main(argv: Sequence[str] = ()) -> int:
    from rich.console import Console
    from rich.table import Table

    p = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    p.add_argument("--tokens", type=int, default=4096, help=f"a multiple of {ROW}")
    args = p.parse_args(argv)
    if args.tokens < ROW or args.tokens % ROW:
        p.error(f"--tokens: expected a multiple of {ROW}, got {args.tokens}")
    with torch.inference_mode():
        results = measure(args.tokens)
    table = Table(title=f"SmolLM2-135M, {args.tokens:,} tokens, {hardware.machine().cpu}", title_justify="left")
    for name in results[0]:
        table.add_column(
            name.replace("_", " "), justify="left" if name in ("weights", "activations", "kv_cache") else "right"
        )
    for row in results:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    append_csv(results_file("quality"), results)
    return 0
