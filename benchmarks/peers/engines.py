"""The engines, how each is installed in an environment of its own, and the weights that each is timed with."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import gptfast
from benchmarks.peers.worker import ROOT

ENVIRONMENTS = ROOT / ".venv-peers"
BITS = (4, 8, 32)  # of a weight: engines are compared among those of the same


@dataclass(frozen=True)
class Engine:
    """`name`: of its worker, <name>_worker.py, and of its environment. `weights`: what it calls them, by their bits.
    `requires`: from PyPI, itself first; none: this environment. `build`: environment variables for pip.
    """

    name: str
    weights: Mapping[int, tuple[str, ...]]
    requires: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        if self.requires:
            return self.requires[0].partition("==")[2]
        return gptfast.__version__ if self.name == "gptfast" else metadata.version(self.name)

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python" if self.requires else Path(sys.executable)


ENGINES = (
    Engine("gptfast", {4: ("q4",), 8: ("q8",), 32: ("fp32",)}),
    Engine(
        "llama_cpp",
        {4: ("Q4_1", "Q4_0"), 8: ("Q8_0",), 32: ("F32",)},
        ("llama-cpp-python==0.3.36",),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())},
    ),
    Engine(
        "openvino",
        {4: ("int4",), 8: ("int8",), 32: ("fp32",)},
        ("openvino==2026.4.1", "openvino-genai==2026.4.1", "nncf==3.4.0", "safetensors"),
    ),
    Engine(
        "onnxruntime_genai",
        {4: ("int4",), 32: ("fp32",)},
        (
            *("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx==1.23.2", "onnx-ir==1.1.0"),
            *("torch", "transformers"),  # its builder reads the model with them; constraints/ pins these
        ),
    ),
    Engine("ctranslate2", {8: ("int8",), 32: ("float32",)}, ("ctranslate2==4.8.5", "safetensors")),
    Engine("transformers", {32: ("fp32",)}),
)


def install(engine: Engine) -> str | None:
    """Makes an engine's environment or completes it; None, or why that failed. llama.cpp compiles for a quarter of an
    hour the first time."""
    if not engine.requires:
        return None
    pip = [str(engine.python), "-m", "pip", "install", "-q", "-c", "constraints/cpu.txt", *engine.requires]
    for command in ([sys.executable, "-m", "venv", str(ENVIRONMENTS / engine.name)], pip):
        done = subprocess.run(command, cwd=ROOT, env=os.environ | engine.build, capture_output=True, text=True)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"{command[2]} failed"])[-1]
    return None
