"""What the recipe's stages leave, read by transformers: logits, scores, tokens of both languages, the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from gptfast.cli.export import export
from gptfast.formats.tokenizer import Tokenizer
from gptfast.generate import load
from gptfast.model import GPT
from gptfast.ops.spec import tolerance
from gptfast.train.data import Chat, Text
from gptfast.train.presets import recipe_preset
from gptfast.train.prompts import completion_ids, prompt_ids
from gptfast.train.reward_model import RewardModel
from gptfast.train.sft import SFT, SFTConfig
from gptfast.train.tokenizer import train_tokenizer
from gptfast.train.trainer import Trainer
from tests.test_huggingface_parity import exact

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
ENGLISH = [f"The members of the {w} said that they would pay {i} dollars for it.\n" for i in range(60) for w in "abc"]
CHINESE = [f"子曰：学而时习之，不亦说乎？有朋自远方来，第{i}章。" for i in range(100)]
TEXTS = [
    "It's 1984, isn't it? WE'LL see: 3.14159 x 27,000!",
    "春眠不觉晓，处处闻啼鸟。一九八四年 2026年",
    " \n\n\tx  🙂\r\n",
    "",
]
ASKED = [{"role": "user", "content": "学而 what is 12?"}]
CHAT = [*ASKED, {"role": "assistant", "content": "The members said: 不亦说乎？"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the recipe's own shape and tokenizer after a few steps of fine-tuning: the stage's folder."""
    folder = tmp_path_factory.mktemp("run")
    texts = [Text(t, "en", "x") for t in ENGLISH] + [Text(t, "zh", "x") for t in CHINESE]
    words = train_tokenizer(texts, folder / "tokenizer", vocab_size=500)
    torch.manual_seed(0)
    model = GPT(recipe_preset("tiny").config(words.vocab_size, words.bos_id, tuple(words.eos_ids)))
    chats = [Chat([*ASKED, {"role": "assistant", "content": t}], "en", "x") for t in ENGLISH[:8] + CHINESE[:8]]
    config = SFTConfig(steps=3, batch_size=8, lr=3e-3, warmup=0, eval_every=0, save_every=0, sample_tokens=0)
    Trainer(SFT(config, model, words, chats), folder, quiet=True).run()
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by `gptfast export`."""
    app = typer.Typer()
    app.command()(export)
    to = tmp_path_factory.mktemp("export") / "hf"
    done = CliRunner().invoke(app, [str(run / "model"), str(to)])
    assert done.exit_code == 0, done.output
    return to


def text(tokenizer: Tokenizer) -> Tensor:
    return torch.tensor([tokenizer.encode(TEXTS[0] + TEXTS[1] + " " + ENGLISH[0] + CHINESE[0])[:120]])


@pytest.mark.parametrize("kind", ["the stage's folder", "exported"])
def test_logits(kind: str, run: Path, exported: Path) -> None:
    folder = run / "model" if kind != "exported" else exported
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = load(folder, weights="fp32")
    assert ours.tokenizer is not None and theirs.config.bos_token_id == ours.tokenizer.bos_id
    ids = text(ours.tokenizer)
    with torch.no_grad():
        plain, wanted = theirs.eval()(ids).logits, exact(theirs)(ids).logits
        got = ours.model(ids)
    assert float(wanted.std()) > 0.1, "logits that are nearly equal prove nothing"
    assert float((got.double() - wanted).abs().max()) <= tolerance(plain, wanted)
    found = theirs.generate(ids[:, :20], max_new_tokens=16, do_sample=False)[0, 20:].tolist()
    assert ours.generate(ids[0, :20].tolist(), max_new_tokens=16, temperature=0).token_ids == found


@pytest.mark.parametrize("kind", ["the stage's folder", "exported"])
def test_tokens_and_chat_template(kind: str, run: Path, exported: Path) -> None:
    folder = run / "model" if kind != "exported" else exported
    ours, theirs = load(folder).tokenizer, transformers.AutoTokenizer.from_pretrained(folder)
    assert ours is not None and ours.chat_template == theirs.chat_template
    for content in TEXTS + ENGLISH[:5] + CHINESE[:5]:
        assert theirs(content)["input_ids"] == ours.encode(content)
        assert theirs.decode(ours.encode(content, add_bos=False)) == content
    for opened in (True, False):
        options: dict[str, Any] = dict(add_generation_prompt=opened)
        assert theirs.apply_chat_template(CHAT, tokenize=False, **options) == ours.render_chat_template(CHAT, **options)
        found = theirs.apply_chat_template(CHAT, return_dict=False, **options)
        assert found == ours.apply_chat_template(CHAT, **options)
    assert {theirs.bos_token_id, theirs.eos_token_id} == {ours.bos_id, ours.eos_id}
    assert theirs.pad_token_id == ours.pad_id


def test_a_reward_models_score(run: Path, tmp_path: Path) -> None:
    """The number at the last token, of sequences of several lengths side by side too."""
    base = load(run / "model", weights="fp32")
    tokenizer = base.tokenizer
    assert tokenizer is not None
    model = RewardModel(GPT.from_folder(run / "model"), seed=2).eval()
    model.save_folder(tmp_path, tokenizer)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and theirs.config.num_labels == 1
    prompt = prompt_ids(ASKED, tokenizer)
    answers = [completion_ids(ASKED, answer, tokenizer) for answer in ENGLISH[:8] + CHINESE[:8] + ["no"]]
    sequences = [prompt + answer for answer in answers]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    padded = words.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        plain = torch.cat([theirs.eval()(torch.tensor([s])).logits[:, 0] for s in sequences])
        wanted = torch.cat([exact(theirs)(torch.tensor([s])).logits[:, 0] for s in sequences])
        together = theirs(**padded).logits[:, 0]
        got = model.rewards([prompt] * len(answers), answers)  # not normalised yet: mean 0, deviation 1
    assert got.unique().numel() > 8
    for scores in (got, together):
        assert float((scores.double() - wanted).abs().max()) <= tolerance(plain, wanted)
