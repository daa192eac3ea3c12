"""`gptfast train STAGE` on files of one's own, one stage's model the next one's beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast.generate import load
from gptfast.model import GPT
from gptfast.train import checkpoint
from gptfast.train.lora import load_adapter, merge_lora
from gptfast.train.presets import PRESETS, RecipePreset
from gptfast.train.run import main

pytest.importorskip("tokenizers")
MODEL = dict(family="llama", n_layer=1, n_embd=32, n_head=2, ffn_dim=48, context=96, norm="rms_norm", positions="rope",
             activation="swiglu", qkv_bias=False, out_bias=False, mlp_bias=False)  # fmt: skip
COMMON = ("--steps", "2", "--json", "--eval-every", "1")


@pytest.fixture(autouse=True)
def preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "test", RecipePreset(MODEL, 300, 4000))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of text, chats and preferences."""
    made = tmp_path_factory.mktemp("data")
    words = ["river", "stone", "cloud", "bird", "apple", "window", "garden", "letter"]
    lines = [f"The {a} saw a {b} near the {c}." for a in words for b in words for c in words[:4]]
    (made / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    chats = [{"prompt": f"Where is the {w}, number {i}?", "response": f"By the {w}."} for i in range(8) for w in words]
    pairs = [
        {"prompt": f"Describe the {w} {i}.", "chosen": f"A fine {w}.", "rejected": f"A bad {w}."}
        for i in range(8)
        for w in words
    ]
    for name, rows in (("chats", chats), ("pairs", pairs)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return made


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward that a name finds."""
    return [float(len(r)) for r in responses]


def train(capsys: pytest.CaptureFixture[str], stage: str, out: Path, *arguments: str) -> dict[str, Any]:
    assert main(stage, ["--out", str(out), *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def base(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = folder / "base"
    if not (out / "model").is_dir():
        found = train(capsys, "pretrain", out, *COMMON, "--preset", "test", "--data", str(folder / "text.txt"),
                      "--batch-tokens", "256")  # fmt: skip
        assert found["steps"] == 2 and found["tokens"] == 512
    return out / "model"


def test_pretrain_goes_on_when_called_again(base: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--preset", "test", "--data", str(folder / "text.txt"), "--batch-tokens", "256")
    again = train(capsys, "pretrain", folder / "base", *COMMON, *given)
    assert again["steps"] == 2 and again["train"]["loss"] > 0
    with pytest.raises(ValueError, match="other dials"):
        main("pretrain", ["--out", str(folder / "base"), *given, "--steps", "3"])


def test_sft_with_and_without_adapters(base: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = ("--init", str(base), "--data", str(folder / "chats.jsonl"), "--batch-size", "8")
    train(capsys, "sft", tmp_path / "sft", *COMMON, *data)
    chatting = load(tmp_path / "sft" / "model")
    assert chatting.chat([{"role": "user", "content": "Where is the bird?"}], max_new_tokens=3, seed=0).token_ids
    train(capsys, "sft", tmp_path / "lora", *COMMON, *data, "--lora-rank", "4")
    assert (tmp_path / "lora" / "adapter" / "adapter_config.json").is_file()
    merged = load(tmp_path / "lora" / "model")
    plain = GPT.from_folder(base)
    wanted = merge_lora(load_adapter(plain, tmp_path / "lora" / "adapter"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged.model(ids), wanted(ids), rtol=0, atol=1e-5)
    assert not torch.equal(merged.model(ids), GPT.from_folder(base)(ids))


def test_preferences(base: Path, folder: Path, tmp_path: Path, capsys: Any) -> None:
    data = ("--init", str(base), "--data", str(folder / "pairs.jsonl"), "--batch-size", "8")
    found = train(capsys, "reward", tmp_path / "reward", *COMMON, *data)
    assert 0 <= found["evaluation"]["accuracy"] <= 1
    found = train(capsys, "dpo", tmp_path / "dpo", *COMMON, *data)
    assert "rewards/margin" in found["train"]
    online = (
        "--init",
        str(base),
        "--data",
        str(folder / "chats.jsonl"),
        "--prompts-per-step",
        "4",
        "--max-new-tokens",
        "4",
    )
    found = train(capsys, "ppo", tmp_path / "ppo", *COMMON, *online, "--reward", str(tmp_path / "reward" / "model"))
    assert "objective/kl" in found["train"]
    function = f"{__name__}:length"
    found = train(
        capsys, "grpo", tmp_path / "grpo", *COMMON, *online, "--reward", function, "--samples-per-prompt", "2"
    )
    assert found["train"]["objective/score"] >= 0
    assert [c.step for c in checkpoint.checkpoints(tmp_path / "grpo")] == [2]


def test_tokenizer(folder: Path, tmp_path: Path, capsys: Any) -> None:
    found = train(
        capsys, "tokenizer", tmp_path / "t", "--data", str(folder / "text.txt"), "--vocab-size", "280", "--json"
    )
    assert found["vocab_size"] == 280 and (tmp_path / "t" / "tokenizer.json").is_file()


def test_what_is_refused(base: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a stage among tokenizer, pretrain, sft"):
        main("bake", [])
    with pytest.raises(FileNotFoundError, match="no model at 'nothing'"):
        main("sft", ["--out", str(tmp_path), "--init", "nothing", "--data", str(folder / "chats.jsonl")])
    with pytest.raises(ValueError, match=r"reward as 'package.module:function'"):
        main("ppo", ["--out", str(tmp_path), "--init", str(base), "--data", str(folder / "chats.jsonl"),
                     "--reward", "no_such:thing"])  # fmt: skip
    with pytest.raises(ValueError, match="a device that this PyTorch can use, got 'nonsense'"):
        main("sft", ["--out", str(tmp_path), "--init", str(base), "--device", "nonsense"])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl.*2"):
        main("sft", ["--out", str(tmp_path), "--init", str(base), "--data", str(tmp_path / "bad.jsonl")])
