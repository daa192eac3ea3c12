"""transformers in fp32, eager, its SDPA attention; one position's logits, a cache, no generate() around it."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.peers.worker import Model, Timed, serve


def prepare(folder: Path, weights: str) -> None:
    """It reads the Hugging Face folder."""


def load(folder: Path, weights: str, threads: int) -> Model:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / "folder", dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    ).eval()

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> Timed:
        start = perf_counter()
        out = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        first = perf_counter()
        tokens: list[Tensor] = [ids]
        for _ in range(new - 1):
            out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(ids)
        return Timed(first - start, perf_counter() - first, torch.cat(tokens, 1).tolist())

    return Model(run, sum(p.nbytes for p in model.parameters()))


if __name__ == "__main__":
    serve(prepare, load)
