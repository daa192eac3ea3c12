"""OpenVINO GenAI. The graph is its GGUF reader's, or openvino_gpt2's; NNCF compresses it: int8 for each channel, or
int4 in groups of 64 with an int8 head. fp32 is the graph as it is, whose weights the reader keeps in 16 bits on disk.
"""

from __future__ import annotations

import json
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
    part.mkdir(exist_ok=True)
    modes = {
        "int8": {"mode": nncf.CompressWeightsMode.INT8_ASYM},
        "int4": {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": 64, "ratio": 1.0},
    }
    graph = _graph(folder, part)
    openvino.save_model(
        nncf.compress_weights(graph, **modes[weights]) if weights in modes else graph,
        part / GRAPH,
        compress_to_fp16=False,
    )
    part.rename(to)


def _graph(folder: Path, to: Path) -> openvino.Model:
    """The graph, before its weights are compressed; what belongs to it is put in `to`."""
    config = folder / "folder" / "config.json"
    if json.loads(config.read_text())["model_type"] == "gpt2":
        from benchmarks.peers.openvino_gpt2 import graph

        shutil.copy(config, to)
        return graph(folder / "folder")
    LLMPipeline(str(folder / "f16.gguf"), "CPU", enable_save_ov_model=True)  # writes openvino_*.xml beside the file
    for file in folder.glob("openvino_*tokenizer.*"):
        shutil.copy(file, to)
    return openvino.Core().read_model(folder / GRAPH)


def load(folder: Path, weights: str, threads: int) -> Model:
    path = folder / f"openvino-{weights}"
    exact = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}
    # Not the paged back end, its default: that can answer a repeated prompt from its cache.
    pipeline = LLMPipeline(
        *(str(path), "CPU"),
        **dict(ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads),
        **(exact if weights == "fp32" else {"KV_CACHE_PRECISION": "u8"}),
    )

    def run(prompts: list[list[int]], new: int) -> Timed:
        ids = np.array(prompts)
        inputs = TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        start = perf_counter()
        found = pipeline.generate(inputs, GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False))
        end = perf_counter()
        first = found.perf_metrics.get_ttft().mean / 1e3
        return Timed(first, end - start - first, found.tokens)

    stored = path.joinpath(GRAPH).with_suffix(".bin").stat().st_size
    values = sum(p.stat().st_size for p in (folder / "folder").glob("*.safetensors"))
    return Model(run, values if weights == "fp32" else stored)


if __name__ == "__main__":
    serve(prepare, load)
