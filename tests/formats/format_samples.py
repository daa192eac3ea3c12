"""Small synthetic model files for the tests of gptfast.formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptfast.formats.blocks import quantize
from gptfast.formats.gguf import Typed, write_gguf

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "i m", "u s", "e r", "us er", "Ċ Ċ"]
SMOLLM_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_alphabet() -> list[str]:
    """GPT-2's 256 characters, in the order of their bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def vocabulary() -> list[str]:
    return [*SPECIALS, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def tokenizer_metadata(pre: str = "smollm") -> dict[str, Any]:
    """The tokenizer keys of a GGUF file: every byte and a few merges."""
    tokens = vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": SMOLLM_TEMPLATE,
    }


def every_scalar() -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "a.u8": Typed("uint8", 255),
        "a.i8": Typed("int8", -128),
        "a.u16": Typed("uint16", 65535),
        "a.i16": Typed("int16", -32768),
        "a.u32": 4294967295,
        "a.i32": -7,
        "a.u64": 1 << 63,
        "a.i64": Typed("int64", -(1 << 63)),
        "a.f32": 0.5,
        "a.f64": Typed("float64", 1e300),
        "a.bool": True,
        "a.text": "naïve 🙂",
        "a.empty": "",
        "a.bools": [True, False],
        "a.floats": [0.25, -1.5],
        "a.nested": [[1, 2], [3]],
        "a.bytes": Typed("uint8", [1, 2, 3]),
        "a.nothing": [],
    }


def tensors() -> dict[str, Any]:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    made: dict[str, Any] = {"vector": x[0], "half": x.half(), "brain": x.bfloat16(), "cube": x.reshape(3, 2, 32)}
    return made | {f"blk.{i}": (quantize(x, t), t, (3, 64)) for i, t in enumerate(("Q8_0", "Q4_0", "Q4_1"))}


def write_samples(folder: Path) -> list[Path]:
    """Files of a few KB that between them hold every kind of field."""
    contents = [
        ("scalars", every_scalar(), {}, 3),
        ("tensors", {"general.alignment": 64, "llama.block_count": 2}, tensors(), 3),
        ("tokenizer", tokenizer_metadata(), {"token_embd.weight": torch.zeros(2, 2)}, 2),
        ("all", every_scalar() | tokenizer_metadata("llama-bpe"), tensors(), 3),
    ]
    for name, metadata, made, version in contents:
        write_gguf(folder / f"{name}.gguf", metadata, made, version=version)
    return [folder / f"{name}.gguf" for name, *_ in contents]
