"""`gptfast export`: a model in another format."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from gptfast.cli.console import out, reported, waiting
from gptfast.formats.gguf import open_gguf
from gptfast.formats.huggingface import read_folder
from gptfast.formats.registry import PRESETS, find_preset_file
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, convert

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
HELD = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BESIDE = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


class Format(str, Enum):
    """What can be written."""

    huggingface = "huggingface"
    gguf = "gguf"


@reported
def export(
    model: Annotated[str, typer.Argument(help="smollm2, a .gguf file or a Hugging Face folder.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="The folder, or the .gguf file, to write.")],
    format: Annotated[
        Format | None, typer.Option("--format", "-f", help="By OUT's name where not given: a GGUF file ends in .gguf.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", "-k", help=f"Of a GGUF file's matrices: {', '.join(KINDS)}. As held if not.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A folder with a LoRA adapter, which is merged.")] = None,
) -> None:
    """Write a model as a Hugging Face folder or as a GGUF file, its tokenizer with it."""
    format = format or (Format.gguf if to.suffix == ".gguf" else Format.huggingface)
    if kind is not None and kind.upper() not in KINDS:
        raise ValueError(f"expected --kind among {', '.join(KINDS)}, got {kind}")
    if kind is not None and format is Format.huggingface:
        raise ValueError(f"expected --kind with --format gguf alone, got {kind} for a Hugging Face folder")
    with waiting(f"loading {model}"):
        gpt, tokenizer, folder = _open(model)
        if adapter is not None:
            from gptfast.train.lora import load_adapter, merge_lora

            merge_lora(load_adapter(gpt, adapter))
    with waiting(f"writing {to}"):
        if format is Format.gguf:
            save_gguf(gpt, to, tokenizer, kind)
        else:
            save_folder(gpt, to, tokenizer, folder)
    size = sum(f.stat().st_size for f in ([to] if to.is_file() else to.iterdir()))
    out.print(f"wrote {to}: {gpt.config.parameters():,} parameters, {size / 1e6:,.1f} MB", soft_wrap=True)
    if tokenizer is None:
        out.print("there was no tokenizer to write with it", style="dim")


def _open(model: str) -> tuple[GPT, Tokenizer | None, Path | None]:
    """The model with its own matrices, its tokenizer, and its folder where it is one."""
    path = find_preset_file(model) if model in PRESETS else Path(model)
    if path.is_dir():
        found = read_folder(path)
        file, beside = found.tokenizer_file, (found.tokenizer_config, found.chat_template)
        tokenizer = None if file is None else Tokenizer.from_file(file, *beside, eos_ids=found.eos_ids)
        return GPT.from_folder(path), tokenizer, path
    if path.suffix == ".gguf" and path.is_file():
        gguf = open_gguf(path)
        there = "tokenizer.ggml.model" in gguf.metadata
        return GPT.from_gguf(gguf), Tokenizer.from_gguf(gguf.metadata) if there else None, None
    raise FileNotFoundError(f"no model at {model!r}: expected a .gguf file, a folder, or one of {', '.join(PRESETS)}")


def save_gguf(model: GPT, path: Path, tokenizer: Tokenizer | None, kind: str | None = None) -> None:
    """Writes a GGUF file that llama.cpp runs. kind None: the matrices as they are held, all else fp32."""
    metadata: dict[str, Any] = {"general.name": path.stem}
    if tokenizer is not None:
        metadata |= tokenizer.to_gguf(model.config.vocab_size)
    held = None if model.dtype == torch.float32 else HELD[model.dtype]  # llama.cpp's norms are fp32
    path.parent.mkdir(parents=True, exist_ok=True)
    convert.save_gguf(model, path, held if kind is None else kind.upper(), metadata)


def save_folder(model: GPT, path: Path, tokenizer: Tokenizer | None, source: Path | None) -> None:
    """Writes a Hugging Face folder, with the tokenizer's files of the folder that the model came from, or made of the
    GGUF file's."""
    extra: dict[str, Any] = {}
    if source is not None:
        extra = {name: source / name for name in BESIDE if (source / name).is_file()}
    elif tokenizer is not None:
        extra = tokenizer.to_files()
    convert.save_folder(model, path, extra)
