"""The models that the engines are compared on, and their files in the forms that the engines start from."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch

import gptfast
from benchmarks.generate import Workload, english
from benchmarks.peers.worker import ROOT
from gptfast import LanguageModel
from gptfast.formats.gguf import open_gguf
from gptfast.formats.registry import find_preset_file
from gptfast.model import GPT
from gptfast.model.convert import save_gguf
from gptfast.model.presets import preset

MODELS = ROOT / ".venv-peers" / "models"


@dataclass(frozen=True)
class Subject(ABC):
    """A model: its name on the command line, its title, and how many tokens of context a long prompt has."""

    name: str
    title: str
    long: int

    @property
    def folder(self) -> Path:
        """f32.gguf and folder/, a Hugging Face folder with fp32 weights; model.gguf where the model comes as one."""
        return MODELS / self.name

    @property
    def workloads(self) -> dict[str, Workload]:
        """By name, those of one row first: the peak of memory is theirs."""
        return {
            "512": Workload("512", 512, 2),
            "128": Workload("128", 128, 32),
            "long": Workload("long", self.long, 16),
            "8 x 128": Workload("8 x 128", 128, 16, batch=8),
        }

    @abstractmethod
    def write(self) -> LanguageModel:
        """Makes the files that are missing, and loads the model with exact activations, to judge others' tokens."""

    @abstractmethod
    def prompts(self, lm: LanguageModel) -> dict[str, list[list[int]]]:
        """By workload."""


class SmolLM2(Subject):
    """The package's own file (Q4_1, its embedding Q8_0), on English."""

    def write(self) -> LanguageModel:
        shipped = find_preset_file("smollm2")
        exact = gptfast.load(shipped, activations="exact")
        self.folder.mkdir(parents=True, exist_ok=True)
        link = self.folder / "model.gguf"
        link.unlink(missing_ok=True)
        link.symlink_to(shipped)
        for kind in ("F16", "F32"):
            if not (file := self.folder / f"{kind.lower()}.gguf").exists():
                save_gguf(exact.model, file, kind, open_gguf(shipped).metadata)
        if not (self.folder / "folder").exists():
            exact.model.save_folder(self.folder / "folder")
        assert exact.tokenizer is not None
        for name, content in exact.tokenizer.to_files().items():
            (self.folder / "folder" / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return exact

    def prompts(self, lm: LanguageModel) -> dict[str, list[list[int]]]:
        return {name: english(lm, workload) for name, workload in self.workloads.items()}


class GPT2(Subject):
    """GPT-2's sizes and GPT-2's first weights, N(0, .02) by a fixed seed, on random tokens: trained ones are in no
    package, and speed doesn't see the difference."""

    def write(self) -> LanguageModel:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "folder").exists():
            torch.manual_seed(0)
            GPT(preset("gpt2-124m")).save_folder(self.folder / "folder")
        exact = gptfast.load(self.folder / "folder", activations="exact")
        if not (file := self.folder / "f32.gguf").exists():
            no_words = {"tokenizer.ggml.model": "no_vocab", "gpt2.vocab_size": exact.model.config.vocab_size}
            save_gguf(exact.model, file, "F32", no_words)
        return exact

    def prompts(self, lm: LanguageModel) -> dict[str, list[list[int]]]:
        draw = torch.Generator().manual_seed(0)
        words = lm.model.config.vocab_size
        return {
            name: torch.randint(words, (w.batch, w.prompt), generator=draw).tolist()
            for name, w in self.workloads.items()
        }


SUBJECTS = {
    subject.name: subject
    for subject in (SmolLM2("smollm2", "SmolLM2-135M", 1024), GPT2("gpt2", "GPT-2 124M, random weights", 896))
}
