"""onnxruntime-genai, from what its own builder makes of a Hugging Face folder: int4 in groups of 32, its products with
activations in int8, or fp32. The builder knows no GPT-2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime_genai as api  # pyright: ignore[reportMissingImports]

from benchmarks.peers.worker import Model, Timed, serve

OPTIONS = {"int4": ["int4_accuracy_level=4", "int4_block_size=32"], "fp32": []}


def prepare(folder: Path, weights: str) -> None:
    kind = json.loads((folder / "folder" / "config.json").read_text())["model_type"]
    if kind == "gpt2":
        raise RuntimeError("its builder knows no GPT-2")
    to, part = folder / f"onnxruntime_genai-{weights}", folder / "onnxruntime_genai-part"
    if to.exists():
        return
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", weights, "-e", "cpu"]
    command += ["-i", str(folder / "folder"), "-o", str(part), "-c", str(folder / "onnxruntime_genai-cache")]
    if OPTIONS[weights]:
        command += ["--extra_options", *OPTIONS[weights]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["its builder failed"])[-1])
    part.rename(to)


def load(folder: Path, weights: str, threads: int) -> Model:
    path = folder / f"onnxruntime_genai-{weights}"
    config = api.Config(str(path))
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = api.Model(config)

    def run(prompts: list[list[int]], new: int) -> Timed:
        length = len(prompts[0]) + new
        options = api.GeneratorParams(model)
        # A shortest length as long as the longest: the end of a text ends nothing.
        options.set_search_options(
            batch_size=len(prompts), min_length=length, max_length=length, do_sample=False, early_stopping=False
        )
        generator = api.Generator(model, options)
        ids = np.array(prompts, dtype=np.int32)
        start = perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        end = perf_counter()
        tokens = [generator.get_sequence(i)[len(prompts[0]) :].tolist() for i in range(len(prompts))]
        return Timed(first - start, end - first, tokens)

    return Model(run, sum(file.stat().st_size for file in path.glob("*.onnx.data")))


if __name__ == "__main__":
    serve(prepare, load)
