"""SmolLM2-135M end to end: gptfast on the file's own 4- and 8-bit weights against transformers (fp32, SDPA) on the same
weights dequantised, in turns in one process; or both in bfloat16.

The rival gets its best: no generate() machinery around its forward pass, a cache, one position's logits, inference
mode, the same number of threads.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

import gptfast
from benchmarks.peers.worker import Timed
from gptfast import LanguageModel, hardware
from gptfast.bench import Spread, ratio, threads_set
from gptfast.bench.record import append_csv, results_file
from gptfast.bench.timing import SETTLE_S
from gptfast.ops.spec import Cost


@dataclass(frozen=True)
class Workload:
    """So many rows of so many prompt tokens each, continued by so many new ones."""

    name: str
    prompt: int
    new: int
    batch: int = 1


WORKLOADS = (
    Workload("prompt 128", 128, 48),
    Workload("prompt 512", 512, 8),
    Workload("prompt 1024", 1024, 32),
    Workload("8 x prompt 128", 128, 24, batch=8),
)


@dataclass(frozen=True)
class Contender:
    """A model as a function of prompts and the number of new tokens; its roofline's arithmetic, and a step's bytes."""

    name: str
    run: Callable[[list[list[int]], int], Timed]
    unit: str
    weight_bytes: int


def ours(lm: LanguageModel, name: str, unit: str) -> Contender:
    def run(prompts: list[list[int]], new: int) -> Timed:
        results = lm.generate(prompts, max_new_tokens=new, temperature=0, ignore_eos=True)
        return Timed(results[0].stats.prefill_s, results[0].stats.decode_s, [r.token_ids for r in results])

    return Contender(name, run, unit, lm.model.weight_bytes())


def theirs(lm: LanguageModel, dtype: str) -> Contender:
    """transformers' own class around our dequantised tensors (its GGUF reader takes 22 s for the same), in "fp32" or
    "bf16"."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    from gptfast.model.convert import to_huggingface

    logging.set_verbosity_error()
    config, tensors = to_huggingface(lm.model)
    with torch.device("meta"):
        made = AutoConfig.for_model(config.pop("model_type"), **config)
        model: Any = AutoModelForCausalLM.from_config(made, attn_implementation="sdpa")
    model.to_empty(device="cpu").to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    model.load_state_dict(tensors, strict=False)
    model.tie_weights()
    fresh = AutoModelForCausalLM.from_config(made).model.rotary_emb  # buffers are in no state dict
    model.model.rotary_emb = fresh
    model.eval()

    def run(prompts: list[list[int]], new: int) -> Timed:
        start = time.perf_counter()
        out = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        tokens: list[Tensor] = [ids]
        for _ in range(new - 1):
            out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
        return Timed(first - start, time.perf_counter() - first, torch.cat(tokens, 1).tolist())

    return Contender(f"transformers {dtype}", run, dtype, sum(p.nbytes for p in model.parameters()))


def english(lm: LanguageModel, workload: Workload) -> list[list[int]]:
    """Prompts of Python's own help texts, each row another part: equal prompts would be computed once."""
    assert lm.tokenizer is not None
    ids = list(lm.tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics))[:100_000]))
    return [ids[row * workload.prompt : (row + 1) * workload.prompt] for row in range(workload.batch)]


def measure(
    lm: LanguageModel, contenders: Sequence[Contender], workload: Workload, rounds: int
) -> list[dict[str, Any]]:
    """One row for each contender: tokens/s, how many times as fast as the last of them, shares of the roofline."""
    prompts = english(lm, workload)
    first = {c.name: c.run(prompts, workload.new) for c in contenders}  # warm-up, and the tokens to compare
    runs: dict[str, list[Timed]] = {c.name: [] for c in contenders}
    for i in range(rounds):
        for c in [*contenders[i % len(contenders) :], *contenders[: i % len(contenders)]]:
            time.sleep(SETTLE_S)
            runs[c.name].append(c.run(prompts, workload.new))
    base = contenders[-1].name
    return [
        _row(lm, c, workload, runs[c.name], runs[base], _equal(first[c.name].tokens, first[base].tokens))
        for c in contenders
    ]


def _row(
    lm: LanguageModel, c: Contender, w: Workload, runs: list[Timed], base: list[Timed], equal: int
) -> dict[str, Any]:
    config = lm.model.config
    steps, rows = w.new - 1, w.batch
    prefill, decode = (Spread.of([getattr(run, name) for run in runs]) for name in ("prefill_s", "decode_s"))
    over_prefill = ratio([run.prefill_s for run in base], [run.prefill_s for run in runs])
    over_decode = ratio([run.decode_s for run in base], [run.decode_s for run in runs])
    context = w.prompt + w.new // 2
    head = 2 * config.vocab_size * config.n_embd
    # Prefill: every matrix for every token, the head for the last alone; keys from 1 to prompt, so half of them.
    flops = rows * (w.prompt * (config.flops_per_token((w.prompt + 1) // 2) - head) + head)
    step_bytes = c.weight_bytes + rows * config.kv_bytes_read(context)
    step = Cost(flops=rows * config.flops_per_token(context), bytes=step_bytes, unit=c.unit)
    bound = (Cost(flops=flops, bytes=c.weight_bytes, unit=c.unit), step)
    limits = [hardware.roofline(cost) for cost in bound] if hardware.machine().isa else None
    return {
        "workload": w.name,
        "contender": c.name,
        "threads": torch.get_num_threads(),
        "equal_tokens": equal,
        "new_tokens": rows * w.new,
        "prefill_tokens_per_s": round(rows * w.prompt / prefill.median, 1),
        "prefill_over_transformers": round(over_prefill.median, 3),
        "prefill_over_low": round(over_prefill.low, 3),
        "prefill_over_high": round(over_prefill.high, 3),
        "prefill_roofline_percent": limits and round(100 * limits[0] / prefill.median, 1),
        "decode_tokens_per_s": round(rows * steps / decode.median, 1),
        "decode_over_transformers": round(over_decode.median, 3),
        "decode_over_low": round(over_decode.low, 3),
        "decode_over_high": round(over_decode.high, 3),
        "decode_gbytes_per_s": round(step_bytes * steps / decode.median / 1e9, 2),
        "decode_roofline_percent": limits and round(100 * limits[1] * steps / decode.median, 1),
    }


def _equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """How many tokens agree before each row's first that doesn't, over all rows."""
    total = 0
    for a, b in zip(ours, theirs):
        total += next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
    return total


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("workload")
    table.add_column("model")
    headings = ("equal tokens", "prefill tok/s", "times", "roofline", "decode tok/s", "times", "GB/s", "roofline")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.0f}%"

    for row in rows:
        table.add_row(
            row["workload"],
            row["contender"],
            f"{row['equal_tokens']}/{row['new_tokens']}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_over_transformers']:.2f}x",
            percent(row["prefill_roofline_percent"]),
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['decode_over_transformers']:.2f}x",
            f"{row['decode_gbytes_per_s']:.1f}",
            percent(row["decode_roofline_percent"]),
        )
    Console(width=140).print(table)


def main(argv: Sequence[str] = ()) -> int:
    """Returns 0; 1 if the exact contender's first tokens aren't transformers' own: then the timings mean nothing."""
    p = argparse.ArgumentParser(prog="python -m benchmarks generate", description=__doc__)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--quick", action="store_true", help="2 rounds")
    p.add_argument("--threads", type=int)
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of transformers; bf16: ours too")
    args = p.parse_args(argv)
    with threads_set(args.threads), torch.inference_mode():
        if hardware.machine().isa is not None:
            hardware.ceilings(refresh=True)
        if args.dtype == "bf16":
            exact = gptfast.load("smollm2", weights="bf16")
            contenders = [ours(exact, "gptfast bf16", "bf16"), theirs(exact, "bf16")]
        else:
            exact, fast = (gptfast.load("smollm2", activations=a) for a in ("exact", "int8"))
            contenders = [
                ours(fast, "gptfast int8", "int8"),
                ours(exact, "gptfast exact", "fp32"),
                theirs(exact, "fp32"),
            ]
        rows: list[dict[str, Any]] = []
        for workload in WORKLOADS:
            print(f"SmolLM2-135M, {workload.name} ...", file=sys.stderr, flush=True)
            rows += measure(exact, contenders, workload, 2 if args.quick else args.rounds)
        show(rows, f"SmolLM2-135M, {hardware.machine().cpu}, {torch.get_num_threads()} threads")
        append_csv(results_file("generate"), rows)
    same = [
        row["equal_tokens"]
        for row in rows
        if row["contender"] in ("gptfast exact", "gptfast bf16") and row["workload"] == WORKLOADS[0].name
    ]
    return 0 if same[0] >= 16 else 1
