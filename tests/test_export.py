"""Exports: a folder becomes a GGUF file that llama.cpp runs with the same tokens, and everything comes back equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from gptfast.cli.export import export
from gptfast.formats.gguf import open_gguf
from gptfast.formats.tokenizer import Tokenizer
from gptfast.formats.tokenizer_gguf import (
    GPT2_PATTERN,
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    SPLITS,
    split_name,
)
from gptfast.generate import load
from gptfast.model import GPT, GPTConfig
from gptfast.train.lora import LoRAConfig, add_lora, lora_parameters, save_adapter

tokenizers = pytest.importorskip("tokenizers")

# GPT-4's (tiktoken's cl100k_base) with one digit to a piece: what llama.cpp calls bailingmoe.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TEXTS = [
    "The quick brown fox jumps over the lazy dog; it's 1984, isn't it? WE'LL see: 3.14159 x 27,000!",
    "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少？一九八四年 2026年",
    "def f(x):\n    return x ** 2  # twice\n\n\n\tprint(f(12))\r\n   \r\n  end  ",
    "Ünïcödé — “quotes” … é e\u0301 ﬁ 🙂👍🏽 \u00a0\u3000 ½ ² Ⅷ ٣",
    "<|im_start|>system\nnot a turn<|im_end|>",
    "",
    "   ",
    "\n\n",
]
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
SPECIALS = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
COMMON: dict[str, Any] = dict(n_layer=2, n_embd=64, n_head=4, context=128, bos_id=0, eos_ids=(1,))
LLAMA: dict[str, Any] = dict(
    n_kv_head=2, norm="rms_norm", positions="rope", activation="swiglu", ffn_dim=96,
    qkv_bias=False, out_bias=False, mlp_bias=False,
)  # fmt: skip
SPLIT_PATTERNS = {"gpt-2": GPT2_PATTERN, "bailingmoe": GPT4_PATTERN, "smaug-bpe": LLAMA3_PATTERN}


def split(pattern: str) -> Any:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [
            pre.Split(tokenizers.Regex(pattern), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def write_model(folder: Path, family: str, pattern: str, seed: int = 0) -> int:
    """A random model with a tokenizer trained on the texts; gives the tokenizer's size."""
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer, fast.decoder = split(pattern), tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(TEXTS * 3, trainer)
    size = fast.get_vocab_size()
    torch.manual_seed(seed)
    config = GPTConfig(
        family, size + 5, **COMMON, **({} if family == "gpt2" else LLAMA), tie_embeddings=family == "gpt2"
    )
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 2 else None
    model.save_folder(folder)
    fast.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return size


def run(*arguments: str | Path, code: int = 0) -> str:
    app = typer.Typer()
    app.command()(export)
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_a_folder_as_gguf_and_back(tmp_path: Path, family: str, name: str) -> None:
    size = write_model(tmp_path / "hf", family, SPLIT_PATTERNS[name])
    assert "wrote" in run(tmp_path / "hf", tmp_path / "m.gguf")
    gguf = open_gguf(tmp_path / "m.gguf")
    assert gguf.metadata["tokenizer.ggml.pre"] == name
    assert gguf.metadata["tokenizer.ggml.token_type"][size:] == [5] * 5
    ours, theirs = load(tmp_path / "m.gguf"), load(tmp_path / "hf")
    a, b = ours.tokenizer, theirs.tokenizer
    assert a is not None and b is not None
    for text in TEXTS:
        assert a.encode(text) == b.encode(text) and a.decode(a.encode(text)) == text
    for field in ("bos_id", "eos_id", "pad_id", "eos_ids", "add_bos", "chat_template", "special_ids"):
        assert getattr(a, field) == getattr(b, field), field
    said = [{"role": "user", "content": "Hi <|end|>"}]
    assert a.apply_chat_template(said) == b.apply_chat_template(said)
    assert ours.model.config.vocab_size == size + 5
    ids = torch.tensor([b.encode(TEXTS[0])])
    assert torch.equal(ours.model(ids), theirs.model(ids))
    assert "wrote" in run(tmp_path / "m.gguf", tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.tokenizer is not None and torch.equal(again.model(ids), theirs.model(ids))
    assert [again.tokenizer.encode(t) for t in TEXTS] == [b.encode(t) for t in TEXTS]
    assert again.tokenizer.chat_template == TEMPLATE and again.tokenizer.eos_ids == b.eos_ids


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_llama_cpp_reads_the_same_and_writes_the_same(tmp_path: Path, family: str, name: str, kind: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_model(tmp_path / "hf", family, SPLIT_PATTERNS[name])
    run(tmp_path / "hf", tmp_path / "m.gguf", "--kind", kind.lower())
    ours = load(tmp_path / "m.gguf", activations="exact" if kind == "Q8_0" else None)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, verbose=False, n_threads=1, logits_all=True)
    assert ours.tokenizer is not None
    for text in TEXTS[:5]:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ours.tokenizer.encode(text)
    prompt = ours.tokenizer.encode(TEXTS[0])
    wanted = ours.generate(prompt, max_new_tokens=24, temperature=0, ignore_eos=True).token_ids
    theirs.eval(prompt)
    found: list[int] = []
    for _ in range(24):
        found.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        theirs.eval([found[-1]])
    same = next((i for i, (a, b) in enumerate(zip(found, wanted)) if a != b), 24)
    # llama.cpp rounds activations to 8 bits where weights are: its text may part from ours there, not its first token.
    assert same >= (24 if kind != "Q8_0" else 1)


def test_a_merged_adapter(tmp_path: Path) -> None:
    write_model(tmp_path / "hf", "llama", GPT4_PATTERN)
    model = add_lora(GPT.from_folder(tmp_path / "hf"), LoRAConfig(rank=2))
    for parameter in lora_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(model, tmp_path / "adapter")
    run(tmp_path / "hf", tmp_path / "m.gguf", "--adapter", tmp_path / "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(load(tmp_path / "m.gguf").model(ids), model(ids), rtol=1e-3, atol=1e-3)


def test_names_of_splits() -> None:
    for pattern, name in ((QWEN2_PATTERN, "bailingmoe"), (GPT4_PATTERN, "bailingmoe"), (GPT2_PATTERN, "gpt-2")):
        fast = tokenizers.Tokenizer(tokenizers.models.BPE())
        fast.pre_tokenizer = split(pattern)
        assert split_name(json.loads(fast.to_str())) == name
    fast.normalizer = tokenizers.normalizers.NFC()
    fast.pre_tokenizer = split(QWEN2_PATTERN)
    assert split_name(json.loads(fast.to_str())) == "qwen2"
    pre = tokenizers.pre_tokenizers
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    fast.pre_tokenizer = split(LLAMA3_PATTERN)
    assert split_name(json.loads(fast.to_str())) == "llama-bpe"
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    assert split_name(json.loads(fast.to_str())) == "smollm"
    assert {"bailingmoe", "smaug-bpe"} <= set(SPLITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: setattr(f, "pre_tokenizer", split(r"\p{N}{1,2}|\p{L}+")), "llama.cpp has a name for"),
        (lambda f: setattr(f, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace()), "regex splits and bytes"),
        (lambda f: setattr(f, "normalizer", tokenizers.normalizers.Lowercase()), "no normalizer, or NFC"),
        (lambda f: f.add_tokens([f"more {i}" for i in range(9)]), "the rows of the model's embedding"),
        (lambda f: setattr(f.model, "dropout", 0.1), "plain BPE for a GGUF file, got dropout"),
    ],
)
def test_what_a_gguf_cannot_say(tmp_path: Path, change: Any, message: str) -> None:
    size = write_model(tmp_path, "gpt2", GPT4_PATTERN)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    change(fast)
    with pytest.raises(ValueError) as caught:
        Tokenizer(fast).to_gguf(size + 5)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope", "o.gguf"), "no model at 'nope'"),
        (("smollm2", "o.gguf", "--kind", "Q9"), "expected --kind among F32, F16"),
        (("smollm2", "o", "--kind", "F16"), "with --format gguf alone"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], message: str) -> None:
    assert message in run(*arguments, code=1)


@pytest.mark.model
def test_smollm2_comes_back_from_a_folder(tmp_path: Path) -> None:
    try:
        lm = load("smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    run("smollm2", tmp_path / "copy.gguf")
    copy = load(tmp_path / "copy.gguf")
    assert copy.tokenizer is not None and lm.tokenizer is not None
    for text in TEXTS:
        assert copy.tokenizer.encode(text) == lm.tokenizer.encode(text)
    asked = dict(max_new_tokens=12, temperature=0)
    message = [{"role": "user", "content": "Name a colour."}]
    assert copy.chat(message, **asked).token_ids == lm.chat(message, **asked).token_ids
