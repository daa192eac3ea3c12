"""DPO with LoRA on SmolLM2 and real pairs: 30 steps by the command that users type, one run for each seed.

The pairs are sentences of film reviews that people rated (source "snippets"); no pair is learnt from twice. For each
run: how long it took, the training margin of each step (beta times how much further the chosen answer's log-probability
has moved than the rejected one's, mean of the batch), the slope of a straight line through the margins by least squares
with its standard error, and how far the logits of the merged model, of the adapter loaded beside the quantised base,
and of the exported folder are apart on a chat.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.bench.record import append_csv, results_file
from gptfast.generate.load import open_model
from gptfast.train.logs import read_table
from gptfast.train.lora import load_adapter, merged_copy

DIALS = {"steps": 30, "batch-size": 12, "lora-rank": 8, "lr": 5e-4, "warmup": 2, "eval-every": 0, "eval-pairs": 32,
         "log-every": 1, "save-every": 10}  # fmt: skip
TOLERANCE = 1e-3  # of a logit: what SmolLM2's are compared with stored ones by
CHAT = [
    {"role": "user", "content": "What did you think of the movie?"},
    {"role": "assistant", "content": "A warm, funny film that never lets go of you."},
]


def slope(values: Sequence[float]) -> tuple[float, float]:
    """Of a straight line through values one apart, by least squares, and its standard error."""
    y = torch.tensor(values, dtype=torch.float64)
    x = torch.arange(len(values), dtype=torch.float64)
    x -= x.mean()
    found = (x @ (y - y.mean())) / (x @ x)
    rest = y - y.mean() - found * x
    return float(found), float((rest @ rest / (len(values) - 2) / (x @ x)).sqrt())


def command(out: Path, seed: int, source: str, dials: dict[str, Any]) -> list[str]:
    flags = [part for name, value in dials.items() for part in (f"--{name}", str(value))]
    given = ["--init", "smollm2", "--data", source, *flags, "--seed", str(seed), "--out", str(out), "--json"]
    return [sys.executable, "-m", "gptfast", "train", "dpo", *given]


@torch.no_grad()
def apart(out: Path) -> dict[str, float]:
    """The largest differences between the logits of adapter, merged copy and exported folder. Raises RuntimeError
    beyond TOLERANCE, and where the adapter changes nothing."""
    model, tokenizer, _ = open_model("smollm2", None)
    assert tokenizer is not None
    ids = torch.tensor([tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)])
    model.activations = "exact"
    before = model(ids)
    load_adapter(model, out / "adapter")
    wanted = model(ids)
    exported, _, _ = open_model(str(out / "model"), "fp32")
    found = {"merged": merged_copy(model)(ids), "exported": exported(ids)}
    gaps = {name: float((logits - wanted).abs().max()) for name, logits in found.items()}
    moved = float((wanted - before).abs().max())
    if max(gaps.values()) > TOLERANCE or moved <= TOLERANCE:
        raise RuntimeError(f"expected logits within {TOLERANCE} of the adapter's, which moved them by {moved}: {gaps}")
    return {"adapter_moves": moved, **gaps}


def measure(seed: int, folder: Path, source: str, dials: dict[str, Any]) -> dict[str, Any]:
    out = folder / f"dpo-{seed}"
    if out.exists():
        raise ValueError(f"expected a new folder for a run that is timed, got {out}")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command(out, seed, source, dials), stdout=subprocess.PIPE, text=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"the run of seed {seed} ended with {done.returncode}")
    result = json.loads(done.stdout)
    rows = read_table(out / "train.csv")
    margins = [row["rewards/margin"] for row in rows]
    rise, error = slope(margins)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"source": source, "seed": seed, **{n.replace("-", "_"): v for n, v in dials.items()}}
    found |= {"seconds": round(seconds, 1), "cpu_s": round(cpu, 1), "step_s": round(result["step_seconds"], 1)}
    found |= {"tokens": int(result["tokens"]), "margin_first": margins[0], "margin_last": margins[-1]}
    found |= {"slope": rise, "slope_error": error, "heldout_margin": result["evaluation"]["rewards/margin"]}
    found |= {"heldout_accuracy": result["evaluation"]["rewards/accuracy"]}
    return found | apart(out) | {"margins": " ".join(f"{m:.4f}" for m in margins)}


def main(argv: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preferences", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="where the runs go: a folder dpo-SEED for each")
    parser.add_argument("--source", default="snippets")
    parser.add_argument("--csv", nargs="?", const="", help="append to results/<machine>/preferences.csv, or to this")
    o = parser.parse_args(argv)
    for seed in o.seeds:
        row = measure(seed, o.out, o.source, DIALS)
        print(
            f"seed {seed}: {row['seconds']:.0f} s ({row['cpu_s']:.0f} s of CPU), margin {row['margin_first']:.3f} -> "
            f"{row['margin_last']:.3f}, slope {row['slope']:.4f} +- {row['slope_error']:.4f} a step; merged within "
            f"{row['merged']:.1e} of the adapter's logits, which are {row['adapter_moves']:.1f} from the base's",
            flush=True,
        )
        if o.csv is not None:
            append_csv(Path(o.csv) if o.csv else results_file("preferences"), [row])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
