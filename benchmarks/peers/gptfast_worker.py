"""gptfast through its public functions: "q4" is SmolLM2's own file as it comes, "fp32" is exact."""

from __future__ import annotations

from pathlib import Path

import torch

import gptfast
from benchmarks.peers.worker import Model, Timed, serve


def prepare(folder: Path, weights: str) -> None:
    """It reads the model's own files."""


def load(folder: Path, weights: str, threads: int) -> Model:
    torch.set_num_threads(threads)
    comes = folder / "model.gguf"
    lm = gptfast.load(comes if comes.exists() else folder / "folder", weights=weights)

    def run(prompts: list[list[int]], new: int) -> Timed:
        rows = lm.generate(prompts, max_new_tokens=new, temperature=0, ignore_eos=True)
        return Timed(rows[0].stats.prefill_s, rows[0].stats.decode_s, [row.token_ids for row in rows])

    return Model(run, lm.model.weight_bytes())


if __name__ == "__main__":
    serve(prepare, load)
