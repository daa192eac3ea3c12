"""llama.cpp through the C API that llama-cpp-python binds: the model's file where it has the weights asked for, or what
llama.cpp's own quantiser makes of it. Quantising 4-bit weights again harms the text, not the speed.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from time import perf_counter

import llama_cpp as api  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.peers.worker import Model, Timed, serve

TYPES = {
    "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": api.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0,
}
CONTEXT = 2048  # tokens of all rows together


def _file(folder: Path, weights: str) -> Path:
    comes = folder / "model.gguf"
    if weights in comes.resolve().name:
        return comes
    return folder / (f"llama_cpp-{weights}.gguf" if weights in TYPES else f"{weights.lower()}.gguf")


def prepare(folder: Path, weights: str) -> None:
    file = _file(folder, weights)
    if file.exists():
        return
    part = file.with_suffix(".part")
    options = api.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = TYPES[weights], True
    comes = folder / "model.gguf"
    source = comes if comes.exists() else folder / "f32.gguf"
    if api.llama_model_quantize(str(source).encode(), str(part).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama_model_quantize: {source} to {weights} failed")
    part.rename(file)


def load(folder: Path, weights: str, threads: int) -> Model:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(_file(folder, weights)).encode(), api.llama_model_default_params())
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    @cache
    def context(rows: int):
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = CONTEXT
        options.n_seq_max = rows
        options.n_threads = options.n_threads_batch = threads
        return api.llama_init_from_model(model, options)

    def step(ctx, batch, last: list[int]) -> list[int]:
        """Feeds a batch; the likeliest token after each of these places of it."""
        if status := api.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode: expected status 0, got {status}")
        logits = [np.ctypeslib.as_array(api.llama_get_logits_ith(ctx, i), (vocabulary,)) for i in last]
        return [int(row.argmax()) for row in logits]

    def run(prompts: list[list[int]], new: int) -> Timed:
        rows, ctx = len(prompts), context(len(prompts))
        api.llama_memory_clear(api.llama_get_memory(ctx), True)
        batch = api.llama_batch_init(CONTEXT, 0, 1)
        last = _fill(batch, prompts, [0] * rows)
        start = perf_counter()
        tokens = [step(ctx, batch, last)]
        first = perf_counter()
        for i in range(new - 1):
            last = _fill(batch, [[t] for t in tokens[-1]], [len(p) + i for p in prompts])
            tokens.append(step(ctx, batch, last))
        end = perf_counter()
        api.llama_batch_free(batch)
        return Timed(first - start, end - first, [list(row) for row in zip(*tokens)])

    context(1)
    return Model(run, api.llama_model_size(model))


def _fill(batch, rows: list[list[int]], starts: list[int]) -> list[int]:
    """Puts tokens of each row, from these positions on, into a batch; the places of the rows' last tokens."""
    n, last = 0, []
    for sequence, (row, start) in enumerate(zip(rows, starts)):
        for i, token in enumerate(row):
            batch.token[n], batch.pos[n], batch.n_seq_id[n] = token, start + i, 1
            batch.seq_id[n][0], batch.logits[n] = sequence, i == len(row) - 1
            n += 1
        last.append(n - 1)
    batch.n_tokens = n
    return last


if __name__ == "__main__":
    serve(prepare, load)
