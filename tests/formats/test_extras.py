"""The formats import, and GGUF files read and write, with torch alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptfast.formats.extras import need

TORCH_ALONE = """
import sys
for name in ("numpy", "tokenizers", "safetensors", "jinja2"):
    sys.modules[name] = None  # an import of it fails
import torch
from gptfast.formats import chat, gguf, huggingface, registry, tokenizer
gguf.write_gguf(sys.argv[1], {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]}, {"x": torch.ones(4)})
file = gguf.open_gguf(sys.argv[1])
assert file.float32("x").equal(torch.ones(4))
try:
    tokenizer.Tokenizer.from_gguf(file.metadata)
except ImportError as error:
    print(error)
"""


def test_torch_alone_is_enough_for_gguf(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TORCH_ALONE, str(tmp_path / "a.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "this needs the package tokenizers: run `pip install 'gptfast-kernels[models]'`"


def test_missing_extras_are_named() -> None:
    with pytest.raises(ImportError, match=r"run `pip install 'gptfast-kernels\[models\]'`"):
        need("no_such_module.part", "models")
