"""OpenVINO GenAI. Its GGUF reader makes the graph from 16-bit weights, NNCF compresses them: int8 for each channel, or
int4 in groups of 64 with an int8 head.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from time import perf_counter

import numpy as np
import openvino  # pyright: ignore[reportMissingImports]
from openvino_genai import GenerationConfig, LLMPipeline, TokenizedInputs  # pyright: ignore[reportMissingImports]

from benchmarks.peers.worker import Model, Timed, serve

GRAPH = "openvino_model.xml"


def prepare(folder: Path, weights: str) -> None:
    import nncf  # pyright: ignore[reportMissingImports]

    to, part = folder / f"openvino-{weights}", folder / "openvino-part"
    if to.exists():
        return
    LLMPipeline(str(folder / "f16.gguf"), "CPU", enable_save_ov_model=True)  # writes openvino_*.xml beside the file
    modes = {
        "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
        "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64, "ratio": 1.0},
    }
    graph = nncf.compress_weights(openvino.Core().read_model(folder / GRAPH), **modes[weights])
    part.mkdir(exist_ok=True)
    openvino.save_model(graph, part / GRAPH, compress_to_fp16=False)
    for file in folder.glob("openvino_*tokenizer.*"):
        shutil.copy(file, part)
    part.rename(to)


def load(folder: Path, weights: str, threads: int) -> Model:
    path = folder / f"openvino-{weights}"
    # Not the paged back end, its default: that can answer a repeated prompt from its cache.
    pipeline = LLMPipeline(
        str(path), "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads, KV_CACHE_PRECISION="u8"
    )

    def run(prompts: list[list[int]], new: int) -> Timed:
        ids = np.array(prompts)
        inputs = TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        start = perf_counter()
        found = pipeline.generate(inputs, GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False))
        end = perf_counter()
        first = found.perf_metrics.get_ttft().mean / 1e3
        return Timed(first, end - start - first, found.tokens)

    return Model(run, path.joinpath(GRAPH).with_suffix(".bin").stat().st_size)


if __name__ == "__main__":
    serve(prepare, load)
