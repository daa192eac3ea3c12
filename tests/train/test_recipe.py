"""The whole recipe on invented data and a model of a few thousand parameters: every stage, the report, and going on."""

from __future__ import annotations

import io
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gptfast import demo
from gptfast.generate import load
from gptfast.train import data, evaluate, recipe
from gptfast.train.config import from_flags as read_flags
from gptfast.train.config import from_mapping, parser
from gptfast.train.data import Chat, Preference, Rated, Text
from gptfast.train.ppo import PPOConfig
from gptfast.train.presets import PRESETS, RecipePreset, recipe_preset
from gptfast.train.pretrain import PretrainConfig
from gptfast.train.recipe import Recipe

pytest.importorskip("tokenizers")
GOOD, BAD = ("lovely", "great", "fine"), ("awful", "dull", "poor")
QUESTION = [{"role": "user", "content": "Write a sentence about a movie."}]
EXPECTED = {"pretrain": {"steps": 8, "batch_tokens": 256, "micro_tokens": 256, "eval_every": 4, "sample_tokens": 4},
            "sft": {"steps": 6, "batch_size": 8, "eval_every": 3, "sample_tokens": 8},
            "reward": {"steps": 6, "batch_size": 8, "eval_every": 3},
            "ppo": {"steps": 2, "prompts_per_step": 8, "max_new_tokens": 8, "epochs": 1, "minibatches": 2,
                    "eval_every": 1, "save_every": 1}}  # fmt: skip
TINY = RecipePreset(
    dict(family="llama", n_layer=1, n_embd=32, n_head=2, ffn_dim=48, context=160, norm="rms_norm", positions="rope",
         activation="swiglu", qkv_bias=False, out_bias=False, mlp_bias=False), 300, 4000, EXPECTED,
)  # fmt: skip


def sentences(split: str) -> list[Rated]:
    n, first = (60, 0) if split == "train" else (24, 1000)
    return [
        Rated(f"a {words[i % 3]} film {i}", score, "en", "snippets")
        for i in range(first, first + n)
        for words, score in ((GOOD, 2.0), (BAD, -2.0))
    ]


@pytest.fixture(autouse=True)
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(names: Any, split: str) -> list[Text]:
        english = [Text(s.text + " and so on, fellow citizens.", "en", "speeches") for s in sentences(split)]
        return english + [Text(f"春风又绿江南岸，明月{i}照我还。", "zh", "poetry") for i in range(40)]

    def chats(names: Any, split: str) -> list[Chat]:
        return [
            Chat([*QUESTION, {"role": "assistant", "content": s.text}], s.language, "snippets")
            for s in sentences(split)
        ]

    def preferences(names: Any, split: str, seed: int = 0) -> list[Preference]:
        found = sentences(split)
        return [Preference(QUESTION, g.text, b.text, "en", "snippets", 4.0) for g, b in zip(found[::2], found[1::2])]

    for name, made in (
        ("texts", texts),
        ("chats", chats),
        ("preferences", preferences),
        ("fetch", lambda *a, **k: None),
    ):
        monkeypatch.setattr(data, name, made)
    monkeypatch.setattr(data, "rated", lambda names, split: sentences(split))
    monkeypatch.setattr(data, "default_sources", lambda kind, pip_only=None: ["speeches", "poetry"])
    monkeypatch.setattr(evaluate, "vader", lambda: lambda text: sum(word in text for word in GOOD) - 0.5)
    monkeypatch.setitem(PRESETS, "test", TINY)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe") / "whole"


def whole(done: Path) -> dict[str, Any]:
    """The finished recipe; made by the first test that wants it."""
    return Recipe(done, "test", 3, quiet=True).run()


def test_every_stage_runs_and_the_report_has_every_figure(done: Path) -> None:
    found = whole(done)
    assert len(found["checks"]) == 10
    assert set(found["pretrain"]["bits_per_byte"]) == {"en", "zh"}
    assert found["ppo"]["answers"] > 0 and found["reward"]["pairs"] == 24 and found["reward"]["answers"] == 120
    assert json.loads((done / "report.json").read_text()) == json.loads(json.dumps(found))
    page, text = (done / "report.html").read_text(), (done / "report.md").read_text()
    for check in found["checks"]:
        assert check["name"] in text and f"{check['value']:.3f}" in text
    assert "data:image/png;base64," in page and "<script" not in page
    for stage in ("pretrain", "sft", "ppo"):
        assert load(done / stage / "model").generate("a film", max_new_tokens=2, seed=1).token_ids
    assert load(done / "ppo" / "model").chat(QUESTION, max_new_tokens=4, seed=1).token_ids


def test_a_cut_recipe_goes_on_to_the_same_report(done: Path, tmp_path: Path) -> None:
    """Everything but how long it took, after PPO's last checkpoint and all that follows is lost."""
    wanted = whole(done)
    run = tmp_path / "cut"
    shutil.copytree(done, run)
    for path in (run / "ppo" / "result.json", run / "evaluate" / "result.json", run / "report.json"):
        path.unlink()
    shutil.rmtree(run / "ppo" / "checkpoints" / "step-00000002")
    shutil.rmtree(run / "ppo" / "model")
    found = whole(run)
    for name in ("pretrain", "sft", "reward", "ppo", "samples", "checks"):
        assert found[name] == wanted[name], name


def test_folders_of_others_are_refused(done: Path, tmp_path: Path) -> None:
    whole(done)
    with pytest.raises(ValueError, match="another folder"):
        Recipe(done, "test", 4, quiet=True)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty folder or an unfinished recipe"):
        Recipe(tmp_path, "test", 0, quiet=True)
    with pytest.raises(ValueError, match="expected a preset among tiny, taste, gpt2-124m"):
        Recipe(tmp_path / "new", "huge", 0, quiet=True)


def test_the_demo_shows_every_stage(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = whole(done)
    monkeypatch.setattr(Recipe, "run", lambda self: found)
    page = io.StringIO()
    demo.taste(Console(file=page, width=100))
    shown = page.getvalue()
    for stage in ("tokenizer", "pretrain", "sft", "reward", "ppo"):
        assert f"{stage} " in shown
    assert f"en {found['pretrain']['bits_per_byte']['en']:.2f}" in shown
    assert "pre-trained" in shown and "fine-tuned" in shown and "after PPO" in shown


def test_the_demo_goes_on_without_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: Recipe) -> None:
        raise OSError("pip could not fetch vaderSentiment")

    monkeypatch.setattr(Recipe, "run", unreachable)
    page = io.StringIO()
    demo.taste(Console(file=page, width=100))
    assert "left out: pip could not fetch vaderSentiment" in page.getvalue()


def test_presets_have_dials_that_exist() -> None:
    kinds: dict[str, Any] = recipe.CONFIGS
    for name in PRESETS:
        for stage, dials in recipe_preset(name).stages.items():
            from_mapping(kinds[stage], dials, name)
        assert recipe_preset(name).config(1000, 0, (1,)).vocab_size == 1000


def test_dials_from_yaml_and_flags(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "dials.yaml"
    file.write_text("steps: 7\nlr: 1e-3\nseed: 2\n")
    made = parser(PretrainConfig, "test", "").parse_args(["--config", str(file), "--steps", "9"])
    config = read_flags(PretrainConfig, made, {"warmup": 3, "seed": 5})
    assert (config.steps, config.lr, config.seed, config.warmup) == (9, 1e-3, 2, 3)
    for text, message in (
        ("stepz: 3", "dials.yaml: there is no dial 'stepz'"),
        ("steps: many", "dials.yaml: steps: expected a whole number, got 'many'"),
        ("steps: 0", "dials.yaml: steps: expected at least 1, got 0"),
        ("lr: .nan", "dials.yaml: lr: expected a finite number"),
        ("- 3", "expected names with values, got list"),
        ("a: [", "dials.yaml: expected YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_flags(PretrainConfig, parser(PretrainConfig, "test", "").parse_args(["--config", str(file)]))


def test_the_learning_rate_rises_and_falls() -> None:
    config = PretrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [config.learning_rate(step) for step in range(111)]
    assert rates[0] == pytest.approx(1 / 11) and rates[9] == pytest.approx(10 / 11) and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert PPOConfig().learning_rate(50) == PPOConfig().lr  # constant
