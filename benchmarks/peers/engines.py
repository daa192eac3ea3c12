"""The engines, how each is installed in an environment of its own, and the model's files that they start from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gptfast
from benchmarks.peers.worker import ROOT
from gptfast import LanguageModel
from gptfast.formats.gguf import open_gguf
from gptfast.formats.registry import find_preset_file
from gptfast.model.convert import save_gguf

ENVIRONMENTS = ROOT / ".venv-peers"
MODELS = ENVIRONMENTS / "models"


@dataclass(frozen=True)
class Engine:
    """`name`: of its worker, <name>_worker.py, and of its environment. `requires`: from PyPI, itself first; none: this
    environment. `build`: environment variables for pip.
    """

    name: str
    weights: tuple[str, ...]
    requires: tuple[str, ...] = ()
    build: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        return self.requires[0].partition("==")[2] if self.requires else gptfast.__version__

    @property
    def python(self) -> Path:
        return ENVIRONMENTS / self.name / "bin" / "python" if self.requires else Path(sys.executable)


ENGINES = (
    Engine("gptfast", ("int8", "exact")),
    Engine(
        "llama_cpp",
        ("Q4_1", "Q4_0", "Q8_0"),
        ("llama-cpp-python==0.3.36",),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())},
    ),
    Engine("openvino", ("int4", "int8"), ("openvino==2026.4.1", "openvino-genai==2026.4.1", "nncf==3.4.0")),
    Engine("ctranslate2", ("int8",), ("ctranslate2==4.8.5", "safetensors")),
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


def write_sources(lm: LanguageModel) -> None:
    """SmolLM2 as the engines' `prepare` wants it: model.gguf as shipped, f16.gguf, and a folder with fp32 weights."""
    shipped = find_preset_file("smollm2")
    MODELS.mkdir(parents=True, exist_ok=True)
    link, half, folder = MODELS / "model.gguf", MODELS / "f16.gguf", MODELS / "folder"
    link.unlink(missing_ok=True)
    link.symlink_to(shipped)
    if not half.exists():
        save_gguf(lm.model, half, "F16", open_gguf(shipped).metadata)
    if not folder.exists():
        lm.model.save_folder(folder)
