"""gptfast on the package's own file, through its public functions. `weights` names the activations: int8 or exact."""

from __future__ import annotations

from pathlib import Path

import torch

import gptfast
from benchmarks.peers.worker import Model, Timed, serve


def prepare(folder: Path, weights: str) -> None:
    """The file is used as it comes."""


def load(folder: Path, weights: str, threads: int) -> Model:
    torch.set_num_threads(threads)
    lm = gptfast.load(folder / "model.gguf", activations=weights)

    def run(prompts: list[list[int]], new: int) -> Timed:
        rows = lm.generate(prompts, max_new_tokens=new, temperature=0, ignore_eos=True)
        return Timed(rows[0].stats.prefill_s, rows[0].stats.decode_s, [row.token_ids for row in rows])

    return Model(run, lm.model.weight_bytes())


if __name__ == "__main__":
    serve(prepare, load)
