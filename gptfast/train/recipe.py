"""The whole recipe by which ChatGPT is made, at small scale: text, tokenizer, pre-training, fine-tuning, reward model,
PPO, and a report card of what each stage changed.

    <out>/recipe.json      the preset, its dials and the seed
    <out>/tokenizer/       tokenizer.json
    <out>/pretrain/ sft/ reward/ ppo/    each a run (trainer.py) with its model/ that `gptfast.load` takes
    <out>/report.html report.md report.json

Each stage leaves result.json when it is through; a stage that was cut goes on from its newest checkpoint. So the same
command, given again, finishes whatever is left, and what it computes is what an uncut run computes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.formats.files import read_json, replacing
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, GPTConfig
from gptfast.train import data
from gptfast.train.baselines import by_language
from gptfast.train.config import from_mapping
from gptfast.train.data import Chat, Message, Text
from gptfast.train.judges import NaiveBayes, pairwise_accuracy, ranking
from gptfast.train.packing import Corpus, seed_of, shuffled
from gptfast.train.ppo import PPO, PPOConfig
from gptfast.train.presets import RecipePreset, recipe_preset
from gptfast.train.pretrain import Pretrain, PretrainConfig, encode_all, tokenise
from gptfast.train.prompts import completion_ids, prompt_ids
from gptfast.train.ranked import Answer, Ranked, RankedConfig
from gptfast.train.reward_model import RewardEnsemble, RewardModel, read_reward
from gptfast.train.rollout import Rollout
from gptfast.train.sft import SFT, SFTConfig
from gptfast.train.tokenizer import prompt as opened
from gptfast.train.tokenizer import read_tokenizer, train_tokenizer
from gptfast.train.trainer import Result, Stage, Trainer

CONTINUED = {"en": "Fellow citizens of the Senate and House of Representatives, ", "zh": "春风又绿江南岸，"}
ASKED = {
    "en": ("What is AI?", "Who are you?", "Tell me a joke.", "Do you like books?", "Write a sentence about a movie."),
    "zh": ("你是谁？", "什么是ai", "你喜欢音乐吗", "讲个笑话", "你好"),
}
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
CONFIGS = {"pretrain": PretrainConfig, "sft": SFTConfig, "reward": RankedConfig, "ppo": PPOConfig}
RATED = ("snippets",)  # what the reward model and PPO's prompts are made of
MORE_TEXT = ("snippets", "amazon", "nyt", "tweets")  # English of today, beside the speeches


def new_reward(preset: RecipePreset, config: GPTConfig, seed: int) -> RewardModel | RewardEnsemble:
    """A preset's reward model with random weights, drawn by torch's generator, and heads by the seed."""
    models = [
        RewardModel(GPT(config), seed + i, neighbours=preset.reward_neighbours) for i in range(preset.reward_members)
    ]
    return models[0] if len(models) == 1 else RewardEnsemble(models)


class Recipe:
    """One run of the recipe in a folder.

    out      where everything goes; a folder with an unfinished run of the same preset and seed is gone on with
    preset   a name of `presets.PRESETS`
    seed     decides the weights' start, the order of the data, dropout and every sample
    dials    overrule the preset: {"pretrain": {"steps": 100}}
    say      gets a line as each stage begins and ends

    Raises ValueError where the folder holds another run; OSError where data can't be fetched or the disk is full.
    """

    def __init__(
        self,
        out: Path,
        preset: str = "tiny",
        seed: int = 0,
        dials: dict[str, dict[str, Any]] | None = None,
        *,
        tensorboard: bool = False,
        quiet: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.out, self.name, self.seed = Path(out), preset, seed
        self.preset: RecipePreset = recipe_preset(preset)
        self.tensorboard, self.quiet = tensorboard, quiet
        self.say = say or ((lambda text: None) if quiet else print)
        given = dials or {}
        self.dials = {stage: self.preset.stages.get(stage, {}) | given.get(stage, {}) for stage in STAGES[1:-1]}
        self._claim()

    def _claim(self) -> None:
        """The folder is this run's, or empty."""
        file = self.out / "recipe.json"
        mine = {"preset": self.name, "seed": self.seed, "dials": self.dials}
        if file.is_file():
            theirs = read_json(file)
            if theirs != json.loads(json.dumps(mine)):
                was = f"preset {theirs.get('preset')!r} with seed {theirs.get('seed')}"
                raise ValueError(f"{self.out} holds a run of {was} or other dials: give another folder")
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if any(self.out.iterdir()):
            raise ValueError(f"expected an empty folder or an unfinished recipe, got {self.out} with other files")
        _write_json(file, mine)

    def run(self) -> dict[str, Any]:
        """All stages that are left, then the report; report.json's content. Ctrl-C saves and raises
        KeyboardInterrupt."""
        from gptfast.train.report import write_report

        data.fetch(self.sources("text") + self.sources("chat") + list(RATED), progress=self.say)
        data.fetch(MORE_TEXT, progress=self.say)
        for stage in STAGES:
            self.stage(stage)
        return write_report(self)

    def stage(self, name: str) -> dict[str, Any]:
        """One stage, unless it is done; what it found."""
        file = self.out / name / "result.json"
        if file.is_file():
            return read_json(file)
        self.say(f"{name} ...")
        began = time.perf_counter()
        found = getattr(self, f"_{name}")()
        # What earlier processes spent on steps, up to the checkpoint that this one went on from, counts.
        found = {"seconds": time.perf_counter() - began + found.pop("seconds_before", 0.0), **found}
        _write_json(file, found)
        self.say(f"{name} took {found['seconds']:.0f} s")
        return found

    # -- data ------------------------------------------------------------------------------------------------------

    def sources(self, kind: data.Kind) -> list[str]:
        """The preset's sources of this kind, else the defaults."""
        return list(self.preset.texts) if kind == "text" and self.preset.texts else data.default_sources(kind)

    def texts(self, split: str) -> list[Text]:
        """What pre-training reads: in training some English of today beside the sources of text, which alone are held
        out."""
        names = self.sources("text")
        return data.texts([*names, *MORE_TEXT] if split == "train" else names, split)

    def chats(self, split: str) -> list[Chat]:
        """Conversations of fine-tuning. The short ones are few: in training each counts three times."""
        found = []
        for name in self.sources("chat"):
            times = 1 if name in RATED or split != "train" else 3
            found += data.chats([name], split) * times
        return found

    def prompts(self, split: str) -> list[list[Message]]:
        """What PPO asks: for a sentence like those that people rated."""
        return [chat.messages[:-1] for chat in data.chats(RATED, split)]

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.out / "tokenizer")

    def model(self, stage: str) -> GPT:
        """The model that a stage left."""
        return GPT.from_folder(self.out / stage / "model")

    # -- stages ----------------------------------------------------------------------------------------------------

    def _tokenizer(self) -> dict[str, Any]:
        texts = self.texts("train")
        tokenizer = train_tokenizer(texts, self.out / "tokenizer", self.preset.vocab_size, self.preset.sample_bytes)
        found: dict[str, Any] = {"vocab_size": tokenizer.vocab_size}
        held = self.texts("validation")
        found["baselines"] = by_language([t for t in texts if t.source in self.sources("text")], held, primed=False)
        for language in sorted({t.language for t in held}):
            some = "".join(t.text for t in held if t.language == language)[:200_000]
            found[f"bytes_per_token_{language}"] = len(some.encode()) / len(tokenizer.encode(some, add_bos=False))
        return found

    def _pretrain(self) -> dict[str, Any]:
        tokenizer = self.tokenizer()
        config = self._config("pretrain")
        tokens, starts = tokenise(tokenizer, [t.text for t in self.texts("train")], tokenizer.bos_id)
        held = self.texts("validation")
        heldout = {
            language: encode_all(tokenizer, [t.text for t in held if t.language == language], tokenizer.bos_id)
            for language in sorted({t.language for t in held})
        }
        torch.manual_seed(seed_of("weights", self.seed))
        model = GPT(self.preset.config(tokenizer.vocab_size, tokenizer.bos_id, tuple(tokenizer.eos_ids)))
        corpus = Corpus(tokens, starts, model.config.context, config.batch_tokens, config.seed)
        found = self._train(Pretrain(config, model, tokenizer, corpus, heldout, tuple(CONTINUED.values())))
        return found | {"parameters": model.config.parameters(), "corpus_tokens": len(tokens)}

    def _sft(self) -> dict[str, Any]:
        tokenizer, model = self.tokenizer(), self.model("pretrain")
        asked: Sequence[list[Message]] = [
            [{"role": "user", "content": text}] for texts in ASKED.values() for text in texts
        ]
        config = self._config("sft")
        return self._train(SFT(config, model, tokenizer, self.chats("train"), self.chats("validation"), asked))

    def _reward(self) -> dict[str, Any]:
        tokenizer = self.tokenizer()
        torch.manual_seed(seed_of("reward", self.seed))
        ends = tuple(tokenizer.eos_ids)
        config = self.preset.config(tokenizer.vocab_size, tokenizer.bos_id, ends, self.preset.reward_model)
        model = new_reward(self.preset, config, self.seed)
        rated, held = data.rated(RATED, "train"), data.preferences(RATED, "validation", self.seed)
        questions = {chat.messages[-1]["content"]: chat.messages[:-1] for chat in data.chats(RATED, "train")}
        answers = [Answer(questions[r.text], r.text, r.score) for r in rated if r.text in questions]
        found = self._train(Ranked(self._config("reward"), model, tokenizer, answers, held))
        bayes = NaiveBayes(rated)
        found |= {"answers": len(answers), "pairs": len(held)}
        found["naive_bayes"] = pairwise_accuracy(bayes, held)._asdict()
        return found | {"ranking": self._rank(tokenizer, bayes)}

    def _rank(self, tokenizer: Tokenizer, bayes: NaiveBayes) -> dict[str, Any]:
        """All pairs of held-out texts in the reward model's order and in naive Bayes'."""
        rated = data.rated(RATED, "validation")
        questions = {chat.messages[-1]["content"]: chat.messages[:-1] for chat in data.chats(RATED, "validation")}
        rated = [r for r in rated if r.text in questions]
        prompts = [prompt_ids(questions[r.text], tokenizer) for r in rated]
        answers = [completion_ids(questions[r.text], r.text, tokenizer) for r in rated]
        model = read_reward(self.out / "reward" / "model")
        scores = model.rewards(prompts, answers).tolist()
        ratings, theirs = [r.score for r in rated], [bayes(r.text) for r in rated]
        found = {"reward_model": ranking(scores, ratings), "naive_bayes": ranking(theirs, ratings)}
        found["gain"] = ranking(scores, ratings, theirs)
        return {"texts": len(rated)} | {name: it._asdict() for name, it in found.items()}

    def _ppo(self) -> dict[str, Any]:
        tokenizer, model = self.tokenizer(), self.model("sft")
        reward = read_reward(self.out / "reward" / "model")
        config = self._config("ppo")
        prompts, held = self.prompts("train"), self.prompts("validation")
        self.normalise(reward, model, tokenizer, config.max_new_tokens)
        return self._train(PPO(config, model, tokenizer, prompts, reward, heldout=held))

    def normalise(
        self, reward: RewardModel | RewardEnsemble, model: GPT, tokenizer: Tokenizer, max_new_tokens: int
    ) -> None:
        """Scores in standard deviations of what the fine-tuned model writes, from their mean."""
        prompts = self.prompts("train")
        ids = [opened(tokenizer, prompts[i]) for i in shuffled(len(prompts), "normalise", self.seed)[:256]]
        made = Rollout(model, tokenizer)(ids, seed=self.seed, step=-2, max_new_tokens=max_new_tokens)
        reward.normalise(made.prompts, made.responses)

    def _evaluate(self) -> dict[str, Any]:
        from gptfast.train.evaluate import evaluate

        return evaluate(self)

    def _config(self, stage: str) -> Any:
        cls: Any = CONFIGS[stage]
        return from_mapping(cls, {"seed": self.seed, **self.dials[stage]}, f"preset {self.name}, {stage}")

    def _train(self, stage: Stage) -> dict[str, Any]:
        """Trains and says how it went: figures of the last step and evaluation, tokens and seconds of all steps."""
        result: Result = Trainer(stage, self.out / stage.name, tensorboard=self.tensorboard, quiet=self.quiet).run()
        return {"train": result.train, "evaluation": result.evaluation, "steps": result.steps, "flops": result.flops,
                "tokens": result.tokens, "step_seconds": result.step_seconds,
                "seconds_before": max(0.0, result.step_seconds - result.seconds)}  # fmt: skip


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
