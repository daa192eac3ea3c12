"""One door for every kind of model."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from gptfast import uncollected
from gptfast.formats.gguf import open_gguf
from gptfast.formats.huggingface import Folder, read_folder
from gptfast.formats.registry import PRESETS, find_preset_file
from gptfast.formats.tokenizer import Tokenizer
from gptfast.generate.cache import CACHE_DTYPES
from gptfast.generate.language_model import LanguageModel
from gptfast.model import GPT


def load(
    name_or_path: str | os.PathLike[str] | nn.Module,
    *,
    weights: str | None = None,
    activations: str | None = None,
    kv_cache: str | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    tokenizer: Tokenizer | None = None,
) -> LanguageModel:
    """A language model that is ready to generate.

    Where it runs on the CPU's kernels its float matrices are packed for them and are no parameters (GPT.pack): a model
    to train is made by GPT.from_folder and its like.

    name_or_path  a name of a model that comes as a package ("smollm2"), a .gguf file, a Hugging Face folder
                  (config.json, *.safetensors, tokenizer.json), a live transformers model, or a GPT
    weights       None = as stored; "fp32", "bf16", "fp16", "q8" and "q4" (gptfast's own choice of blocks), "q8_0",
                  "q4_0", "q4_1" (GGUF's, as ggml quantises): gptfast.model.convert
    activations   None = the fast choice for the weights, "exact" or "int8"
    kv_cache      the dtype that keys and values are kept in: "fp32", "bf16", "fp16" or "int8"; None = bf16 where
                  activations are rounded to int8, else the activations' own
    backend       passed to every op; None = the best that is here
    tokenizer     instead of the one beside the weights; a live model has none of its own

    Raises FileNotFoundError, ValueError (FormatError) and ImportError with one sentence that says what is missing.
    """
    if kv_cache is not None and kv_cache not in CACHE_DTYPES:
        raise ValueError(f"load: expected kv_cache None or one of {', '.join(CACHE_DTYPES)}, got {kv_cache!r}")
    if device is not None:
        check_device(device)
    with uncollected():
        model, found, name = open_model(name_or_path, weights)
    if device is not None:
        model = model.to(device)
    model.activations, model.backend = activations, backend
    lm = LanguageModel(model.eval(), tokenizer or found, name=name, kv_cache=kv_cache)
    if model is not name_or_path and lm.backend == "cpu":
        model.pack()
    return lm


def open_model(
    source: str | os.PathLike[str] | nn.Module, weights: str | None = None
) -> tuple[GPT, Tokenizer | None, str]:
    """The model with its matrices as parameters (or quantised, as stored), its tokenizer and its name: what `load`
    makes a LanguageModel of. Arguments and errors as there."""
    if isinstance(source, GPT):
        if weights is not None:
            raise ValueError("load: a GPT has its weights already: expected weights=None")
        return source, None, "GPT"
    if isinstance(source, nn.Module):
        return GPT.from_huggingface_model(source, weights=weights), None, type(source).__name__
    path = Path(source)
    if str(source) in PRESETS:
        path = find_preset_file(str(source))
    if path.is_dir():
        folder = read_folder(path)
        return GPT.from_folder(path, weights=weights), _folder_tokenizer(folder), path.name
    if path.suffix == ".gguf" and path.is_file():
        gguf = open_gguf(path)
        with ThreadPoolExecutor(1) as other:  # the tokenizer is Python and Rust, the weights are C++: both cores work
            tokenizer = other.submit(Tokenizer.from_gguf, gguf.metadata)
            return GPT.from_gguf(gguf, weights=weights), tokenizer.result(), path.stem
    if path.exists():
        raise ValueError(f"expected a .gguf file or a folder with config.json, got {path}")
    raise FileNotFoundError(
        f"no model at {str(source)!r}: expected a .gguf file, a Hugging Face folder, or one of {', '.join(PRESETS)}"
    )


def check_device(device: torch.device | str) -> None:
    """Raises ValueError where tensors can't be there: PyTorch says it by AssertionError, RuntimeError or not at all."""
    why = "it holds no values"
    try:
        if torch.empty(0, device=device).device.type != "meta":
            return
    except (AssertionError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
    raise ValueError(f"expected a device that this PyTorch can use, got {str(device)!r}: {why}")


def _folder_tokenizer(folder: Folder) -> Tokenizer | None:
    if folder.tokenizer_file is None:
        return None
    return Tokenizer.from_file(
        folder.tokenizer_file, folder.tokenizer_config, folder.chat_template, eos_ids=folder.eos_ids
    )
