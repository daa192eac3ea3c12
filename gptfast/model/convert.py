"""Models from other people's files and back: Hugging Face folders, live transformers models, GGUF files.

`weights` says how a model holds its matrices:
    None                     as they are stored; GGUF's blocks stay blocks
    "fp32", "bf16", "fp16"   in this dtype, and so is everything else
    "q8", "q4"               gptfast's own choice for 8 and for 4 bits: Q8_0 blocks; or Q4_1 blocks fitted to the
                             weights, the embedding and the head in Q8_0. Everything else fp32
    "q8_0", "q4_0", "q4_1"   quantised to these blocks as ggml does (the embedding too), everything else fp32
A fused matrix whose parts are stored in different block formats is held as fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gptfast.formats import blocks
from gptfast.formats.gguf import GGUF, write_gguf
from gptfast.formats.huggingface import read_folder, write_folder
from gptfast.layers import Linear, set_weight
from gptfast.model import gguf as gguf_model
from gptfast.model import huggingface
from gptfast.model.config import GPTConfig
from gptfast.model.gpt import GPT
from gptfast.model.names import Source, first
from gptfast.quantize import Memory, PackedWeight, QuantizedWeight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_1": "Q4_1"}
PACKED_AT_ONCE = 8 << 20  # bytes, which for a moment are in memory twice
OWN = {"q8": ("Q8_0", "Q8_0"), "q4": ("Q4_1", "Q8_0")}  # of the blocks' matrices; of the embedding and the head


class Stored(NamedTuple):
    """A tensor as a file has it: its rows and, where they are blocks, their name in blocks.FORMATS."""

    type: str
    shape: tuple[int, ...]
    rows: Tensor  # plain: `shape`; blocks: (N, bytes of a row) uint8
    heads: int = 0  # blocks alone: whose rows are still as blocks.unpermuted takes them, for packing will order them

    def float32(self) -> Tensor:
        if self.rows.dtype != torch.uint8:
            return self.rows.float()
        rows = blocks.unpermuted(self.rows, self.heads) if self.heads else self.rows
        return blocks.dequantize(rows.reshape(-1), self.type, self.shape)


Read = Callable[[str], Stored]


def from_folder(path: str | os.PathLike[str], weights: str | None = None) -> GPT:
    """The model in a Hugging Face folder. Raises ValueError (FormatError) for one that can't be read or computed."""
    folder = read_folder(path)
    config = GPTConfig.from_huggingface(folder.config).replace(eos_ids=tuple(folder.eos_ids))
    return _from_huggingface(config, folder.tensors, weights)


def from_tensors(config: GPTConfig, tensors: Mapping[str, Tensor], weights: str | None = None) -> GPT:
    """The model of these tensors, which have transformers' names."""
    return _from_huggingface(config, tensors, weights)


def from_huggingface_model(model: nn.Module, weights: str | None = None) -> GPT:
    """A copy of a live transformers model (a ...ForCausalLM or GPT2LMHeadModel)."""
    config: Any = model.config
    return _from_huggingface(GPTConfig.from_huggingface(config.to_dict()), model.state_dict(), weights)


def _from_huggingface(config: GPTConfig, tensors: Mapping[str, Tensor], weights: str | None) -> GPT:
    sources = huggingface.names(config)
    prefix = "transformer." if config.family == "gpt2" else "model."
    bare = f"{prefix}x" if any(name.startswith(prefix) for name in tensors) else prefix

    def stored_name(name: str) -> str:
        return name.removeprefix(bare)

    def read(name: str) -> Stored:
        tensor = tensors[stored_name(name)].detach()
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise ValueError(f"expected tensor {name} in fp32, bf16 or fp16, got {tensor.dtype}")
        return Stored("", tuple(tensor.shape), tensor)

    ignored = {name for name in tensors if name.endswith(huggingface.IGNORED)} | {"lm_head.weight"}
    _check_names({stored_name(n) for source in sources.values() for n in source.names}, tensors.keys(), ignored)
    stored = read(sources["embedding.weight"].names[0]).rows.dtype
    return _build(config, sources, read, weights, stored)


def from_gguf(gguf: GGUF, weights: str | None = None) -> GPT:
    """The model in an open GGUF file. Raises ValueError (FormatError) for one that can't be computed."""
    config = GPTConfig.from_gguf(gguf.metadata, gguf_model.shapes(gguf.tensors))
    if (factors := gguf_model.frequency_factors(gguf)) is not None:
        config = gguf_model.with_frequency_factors(config, factors)
    sources = gguf_model.names(config, gguf.metadata["general.architecture"])
    _check_names({n for source in sources.values() for n in source.names}, gguf.tensors, {"rope_freqs.weight"})

    def read(name: str) -> Stored:
        raw, tensor = gguf.raw(name), gguf.tensors[name]
        if (dtype := blocks.FORMATS[tensor.type].dtype) is not None:
            return Stored(tensor.type, tensor.shape, gguf.float32(name).to(dtype))
        return Stored(tensor.type, tensor.shape, raw.reshape(*tensor.shape[:-1], -1))

    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    quantised = any(tensor.type not in plain for tensor in gguf.tensors.values())
    stored = torch.float32 if quantised else plain[gguf.tensors["token_embd.weight"].type]
    return _build(config, sources, read, weights, stored, gguf.forget)


def _check_names(needed: Collection[str], there: Collection[str], ignored: Collection[str]) -> None:
    if missing := sorted(set(needed) - set(there)):
        raise ValueError(f"expected {len(needed)} tensors by name, missing {first(missing)}")
    if unexpected := sorted(set(there) - set(needed) - set(ignored)):
        raise ValueError(f"expected {len(needed)} tensors by name, got also {first(unexpected)}")


def _build(
    config: GPTConfig,
    sources: dict[str, Source],
    read: Read,
    weights: str | None,
    stored: torch.dtype,
    forget: Callable[[str], None] = lambda name: None,
) -> GPT:
    """stored: the dtype of everything plain where `weights` asks for none. forget: called with the name of each tensor
    that has been read and won't be again."""
    if weights is not None and weights not in (known := [*DTYPES, *OWN, *QUANTISED]):
        raise ValueError(f"expected weights among {', '.join(known)} or None, got {weights!r}")
    model = GPT(config, device="meta")
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert wanted.keys() == sources.keys(), wanted.keys() ^ sources.keys()
    dtype = stored if weights is None else DTYPES.get(weights, torch.float32)
    memory, read_already = Memory(), list[str]()

    def finish() -> None:
        memory.finish()
        while read_already:
            forget(read_already.pop())

    for name, source in sources.items():
        parts = [_ordered(read(n), source, heads) for n, heads in zip(source.names, source.heads)]
        shape = _stacked_shape(parts, name)
        if shape != wanted[name]:
            raise ValueError(f"expected {' and '.join(source.names)} to make {wanted[name]}, got {shape}")
        weight = _held(name, parts, shape, weights, dtype, memory) if _is_matrix(model, name) else _plain(parts, dtype)
        _assign(model, name, weight)
        read_already += source.names
        if memory.pending >= PACKED_AT_ONCE:
            finish()
    finish()
    return model.eval()


def _is_matrix(model: GPT, name: str) -> bool:
    """Whether a parameter multiplies activations: a Linear's weight, or the embedding's."""
    module, _, end = name.rpartition(".")
    return end == "weight" and (module == "embedding" or isinstance(model.get_submodule(module), Linear))


def _ordered(stored: Stored, source: Source, heads: int) -> Stored:
    """The tensor as it stands in our parameter."""
    if source.transposed and stored.rows.dim() == 2:
        return Stored(stored.type, stored.shape[::-1], stored.rows.t())
    if heads:
        if stored.shape[0] % (2 * heads):
            raise ValueError(f"expected {source.names[0]} with rows in multiples of {2 * heads}, got {stored.shape}")
        if stored.rows.dtype == torch.uint8:
            return stored._replace(heads=heads)
        return stored._replace(rows=blocks.unpermuted(stored.rows, heads))
    return stored


def _stacked_shape(parts: list[Stored], name: str) -> tuple[int, ...]:
    if any(not p.shape or p.shape[1:] != parts[0].shape[1:] for p in parts):
        raise ValueError(f"expected parts of {name} that stack, got {', '.join(str(p.shape) for p in parts)}")
    return (sum(p.shape[0] for p in parts), *parts[0].shape[1:])


def _plain(parts: list[Stored], dtype: torch.dtype) -> Tensor:
    """The parts stacked, in this dtype, in memory of their own."""
    rows = [p.float32().to(dtype) if p.rows.dtype == torch.uint8 else p.rows.to(dtype) for p in parts]
    return torch.cat(rows) if len(rows) > 1 else rows[0].clone(memory_format=torch.contiguous_format)


def _held(
    name: str, parts: list[Stored], shape: tuple[int, ...], weights: str | None, dtype: torch.dtype, memory: Memory
) -> Tensor | QuantizedWeight:
    """A matrix as `weights` asks for."""
    if weights in QUANTISED or weights in OWN:
        kind = QUANTISED[weights] if weights in QUANTISED else OWN[weights][name in ("embedding.weight", "head.weight")]
        if any(p.type != kind for p in parts):
            raw = blocks.quantize(torch.cat([p.float32() for p in parts]), kind, fit=weights in OWN)
            return QuantizedWeight.from_blocks(raw, kind.lower(), shape, memory=memory)
    elif weights is not None or parts[0].rows.dtype != torch.uint8 or len({p.type for p in parts}) > 1:
        return _plain(parts, dtype)
    rows, heads = [p.rows for p in parts], [p.heads for p in parts]
    return QuantizedWeight.from_parts(rows, parts[0].type.lower(), shape, heads=heads, memory=memory)


def _assign(model: GPT, name: str, weight: Tensor | QuantizedWeight) -> None:
    module, _, end = name.rpartition(".")
    if end == "weight":
        set_weight(model.get_submodule(module), weight)
    else:
        assert isinstance(weight, Tensor)
        model.get_submodule(module).register_parameter(end, nn.Parameter(weight))


def to_huggingface(model: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json's contents and the tensors, as transformers names them; quantised weights as fp32."""
    config = huggingface.write_config(model.config) | {"torch_dtype": str(model.dtype).removeprefix("torch.")}
    tensors: dict[str, Tensor] = {}
    for name, source in huggingface.names(model.config).items():
        value = _value(model, name)
        tensor = value.dequantize() if isinstance(value, QuantizedWeight) else value.detach()
        parts = _split(model, tensor.t() if source.transposed else tensor, source)
        tensors.update(zip(source.names, parts))
    return config, tensors


def save_folder(
    model: GPT, path: str | os.PathLike[str], extra: Mapping[str, Any] | None = None, **options: Any
) -> None:
    """Writes a Hugging Face folder. `extra` and `options`: as gptfast.formats.huggingface.write_folder has them."""
    config, tensors = to_huggingface(model)
    write_folder(path, config, {name: t.contiguous() for name, t in tensors.items()}, extra, **options)


def save_gguf(
    model: GPT, path: str | os.PathLike[str], kind: str | None = None, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes a GGUF file.

    kind      the format of the matrices, a name in blocks.FORMATS; all else is fp32 then. None: everything as held
    metadata  written too, a tokenizer's for example
    """
    tensors: dict[str, Any] = {}
    for name, source in gguf_model.names(model.config, gguf_model.architecture(model.config)).items():
        wanted = "F32" if kind is not None and not _is_matrix(model, name) else kind
        type, rows, columns = _rows(_value(model, name), wanted)
        for theirs, part, heads in zip(source.names, _split(model, rows, source), source.heads):
            part = blocks.permuted(part, heads) if heads else part
            tensors[theirs] = part if type is None else (part.reshape(-1), type, (part.shape[0], columns))
    write_gguf(path, gguf_model.write_config(model.config) | dict(metadata or {}), tensors)


def _value(model: GPT, name: str) -> Tensor | QuantizedWeight:
    module, _, end = name.rpartition(".")
    value = getattr(model.get_submodule(module), end)
    if isinstance(value, PackedWeight):
        return value.unpack()
    assert isinstance(value, Tensor | QuantizedWeight)
    return value


def _split(model: GPT, rows: Tensor, source: Source) -> Sequence[Tensor]:
    """The rows of a parameter as the tensors that it is made of."""
    return rows.split(part_sizes(model.config, source, rows.shape[0]))


def part_sizes(config: GPTConfig, source: Source, rows: int) -> list[int]:
    """How many of a parameter's rows belong to each tensor that it is made of."""
    return {1: [rows], 2: [rows // 2] * 2, 3: list(config.qkv_rows)}[len(source.names)]


def _rows(value: Tensor | QuantizedWeight, kind: str | None) -> tuple[str | None, Tensor, int]:
    """(block format or None, rows of stored blocks or values, values in a row) of a parameter in the format `kind`."""
    if isinstance(value, QuantizedWeight):
        held = QUANTISED[value.kind]
        if kind in (None, held):
            return held, value.to_blocks().reshape(value.shape[0], -1), value.shape[1]
        value = value.dequantize()
    value = value.detach()
    if kind is None:
        return None, value, 0
    if (dtype := blocks.FORMATS[kind].dtype) is not None:
        return None, value.to(dtype), 0
    return kind, blocks.quantize(value, kind).reshape(value.shape[0], -1), value.shape[1]
