"""One stage from the command line: its data, its model, its dials, and the folder that it runs in.

    gptfast train pretrain --out runs/a --preset tiny --data speeches poetry
    gptfast train sft --out runs/b --init runs/a/model --data chatterbot-en my/chats.jsonl
    gptfast train dpo --out runs/c --init smollm2 --lora-rank 8 --data dpo-en

`torchrun --nproc-per-node 2 -m gptfast train sft ...` runs it in several processes. The same command, given again, goes
on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gptfast.formats.tokenizer import Tokenizer
from gptfast.generate.load import check_device, open_model
from gptfast.model import GPT
from gptfast.train import config as dials
from gptfast.train import data
from gptfast.train.config import StageConfig
from gptfast.train.dpo import DPO, DPOConfig
from gptfast.train.grpo import GRPO, GRPOConfig
from gptfast.train.lora import LoRAConfig, add_lora, save_adapter
from gptfast.train.packing import Corpus, seed_of
from gptfast.train.parallel import KINDS, World
from gptfast.train.ppo import PPO, PPOConfig
from gptfast.train.presets import PRESETS, recipe_preset
from gptfast.train.pretrain import Pretrain, PretrainConfig, encode_all, tokenise
from gptfast.train.recipe import ASKED, CONTINUED
from gptfast.train.reward import Reward, RewardConfig
from gptfast.train.reward_model import RewardModel, read_reward
from gptfast.train.sft import SFT, SFTConfig
from gptfast.train.tokenizer import read_tokenizer, train_tokenizer
from gptfast.train.trainer import Stage, Trainer

# For each stage its dials, what it does, and of which kind its data is.
STAGES: dict[str, tuple[type[StageConfig], str, Any]] = {
    "pretrain": (PretrainConfig, "Next-token prediction over text.", "text"),
    "sft": (SFTConfig, "Fine-tune on conversations: only what the assistant says is learnt.", "chat"),
    "reward": (RewardConfig, "A reward model from pairs of answers.", "preference"),
    "ppo": (PPOConfig, "PPO against a reward model or a Python callable.", "chat"),
    "grpo": (GRPOConfig, "GRPO, Dr. GRPO or RLOO against a reward model or a Python callable.", "chat"),
    "dpo": (DPOConfig, "Preferences without a reward model.", "preference"),
}
ADAPTABLE = ("sft", "dpo", "ppo", "grpo")


def main(stage: str, arguments: Sequence[str]) -> int:
    """Runs a stage; 0, or 130 where it was interrupted and saved. Raises ValueError, OSError and ImportError with one
    sentence."""
    if stage == "tokenizer":
        return _tokenizer(arguments)
    if stage not in STAGES:
        raise ValueError(f"expected a stage among tokenizer, {', '.join(STAGES)}, got {stage!r}")
    cls, about, _ = STAGES[stage]
    parser = dials.parser(cls, f"gptfast train {stage}", about)
    _common(parser, stage)
    given = parser.parse_args(list(arguments))
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.device is not None:
        check_device(given.device)
    preset = recipe_preset(given.preset).stages.get(stage, {}) if given.preset else None
    config = dials.from_flags(cls, given, preset)
    world = World.join(given.parallel, given.device)
    quiet = given.json or not world.first
    made = _make(stage, config, given)
    for module in made.modules.values():
        module.to(world.device)
    trainer = Trainer(made, Path(given.out), world=world, tensorboard=given.tensorboard, quiet=quiet)
    try:
        result = trainer.run()
    except KeyboardInterrupt as error:
        print(f"gptfast: {str(error) or 'stopped'}; the same command goes on", file=sys.stderr)
        return 130
    _export_adapter(made, given)
    if world.first:
        found = {"stage": stage, "out": given.out, **result._asdict()}
        if given.json:
            print(json.dumps(found))
        else:
            speed = f", {result.tokens / result.step_seconds:,.0f} tokens/s" if result.step_seconds else ""
            print(f"{result.steps:,} steps{speed}; {Path(given.out) / 'model'} is ready")
    return 0


def _common(parser: argparse.ArgumentParser, stage: str) -> None:
    """What isn't a dial of one stage."""
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="where the run goes; goes on if it is there")
    add("--preset", metavar="NAME", help=f"dials (and pretrain's model) to begin with: {', '.join(PRESETS)}")
    add("--data", nargs="+", metavar="SOURCE", help="names that `gptfast data list` shows, or files; else the defaults")
    if stage == "pretrain":
        add("--tokenizer", metavar="DIR", help="a folder with tokenizer.json; trained on the data where not given")
        add("--init", metavar="MODEL", help="go on from this model's weights instead of from random ones")
    else:
        add("--init", required=True, metavar="MODEL", help="smollm2, a .gguf file, a Hugging Face folder")
    if stage in ("ppo", "grpo"):
        add("--reward", required=True, metavar="DIR|MODULE:FUNCTION", help="a reward model's folder, or a callable")
    if stage in ADAPTABLE:
        add("--lora-rank", type=int, default=0, metavar="R", help="train adapters of this rank, not the weights (0)")
    add("--parallel", default="ddp", choices=KINDS, help="with torchrun: how processes share the work (ddp)")
    add("--device", metavar="NAME", help="cpu or cuda")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--tensorboard", action="store_true", help="TensorBoard's files too")
    add("--json", action="store_true", help="print one JSON object")


def _tokenizer(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="gptfast train tokenizer", description="Byte-level BPE with turns' marks.")
    parser.add_argument("--out", required=True, metavar="DIR", help="where tokenizer.json goes")
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="sources of text; else the defaults")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="entries (8192)")
    parser.add_argument("--sample-bytes", type=int, default=4 << 20, metavar="N", help="of each language (4194304)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(list(arguments))
    texts = data.texts(_sources(given, "text"), "train")
    made = train_tokenizer(texts, given.out, given.vocab_size, given.sample_bytes)
    found = {"out": given.out, "vocab_size": made.vocab_size, "documents": len(texts)}
    print(
        json.dumps(found) if given.json else f"{given.out}: {made.vocab_size:,} tokens, from {len(texts):,} documents"
    )
    return 0


def _sources(given: argparse.Namespace, kind: Any) -> list[str]:
    """Sources by name, fetched if they aren't here."""
    names = list(given.data or data.default_sources(kind))
    known = [n for n in names if n in data.SOURCES]
    if known:
        data.fetch(known, progress=lambda line: print(line, file=sys.stderr))
    return names


def _make(stage: str, config: Any, given: argparse.Namespace) -> Stage:
    """The stage with its model and data."""
    if stage == "pretrain":
        return _pretrain(config, given)
    names = _sources(given, STAGES[stage][2])
    if stage == "reward":
        model, tokenizer = _initial(given.init, "fp32")
        pairs = [data.preferences(names, split, config.seed) for split in ("train", "validation")]
        return Reward(config, RewardModel(model, config.seed), tokenizer, *pairs)
    model, tokenizer = _initial(given.init, None if given.lora_rank else "fp32")
    if given.lora_rank:
        add_lora(model, LoRAConfig(rank=given.lora_rank, alpha=2.0 * given.lora_rank), seed=config.seed)
    if stage == "dpo":
        return DPO(
            config,
            model,
            tokenizer,
            *(data.preferences(names, split, config.seed) for split in ("train", "validation")),
        )
    train, held = (data.chats(names, split) for split in ("train", "validation"))
    if stage == "sft":
        asked = [[{"role": "user", "content": text}] for texts in ASKED.values() for text in texts]
        return SFT(config, model, tokenizer, train, held, asked)
    prompts, held_prompts = ([chat.messages[:-1] for chat in chats] for chats in (train, held))
    reward: Any = given.reward
    if ":" not in given.reward or Path(given.reward).is_dir():
        reward = read_reward(given.reward)
    made: Callable[..., Stage] = PPO if stage == "ppo" else GRPO
    return made(config, model, tokenizer, prompts, reward, heldout=held_prompts)


def _pretrain(config: PretrainConfig, given: argparse.Namespace) -> Stage:
    names = _sources(given, "text")
    train, held = (data.texts(names, split) for split in ("train", "validation"))
    out = Path(given.out)
    if given.init:
        model, tokenizer = _initial(given.init, "fp32")
    else:
        preset = recipe_preset(given.preset or "tiny")
        folder = Path(given.tokenizer) if given.tokenizer else out / "tokenizer"
        if given.tokenizer or (folder / "tokenizer.json").is_file():
            tokenizer = read_tokenizer(folder)
        else:
            tokenizer = train_tokenizer(train, folder, preset.vocab_size, preset.sample_bytes)
        torch.manual_seed(seed_of("weights", config.seed))
        model = GPT(preset.config(tokenizer.vocab_size, tokenizer.bos_id, tuple(tokenizer.eos_ids)))
    tokens, starts = tokenise(tokenizer, [t.text for t in train], tokenizer.bos_id)
    heldout = {
        language: encode_all(tokenizer, [t.text for t in held if t.language == language], tokenizer.bos_id)
        for language in sorted({t.language for t in held})
    }
    corpus = Corpus(tokens, starts, model.config.context, config.batch_tokens, config.seed)
    return Pretrain(config, model, tokenizer, corpus, heldout, tuple(CONTINUED.values()))


def _initial(source: str, weights: str | None) -> tuple[GPT, Tokenizer]:
    """The model to begin with, its matrices as parameters unless they stay quantised, and its tokenizer."""
    model, tokenizer, name = open_model(source, weights)
    if tokenizer is None:
        raise ValueError(f"expected a model with a tokenizer, got {name} without one")
    return model, tokenizer


def _export_adapter(made: Stage, given: argparse.Namespace) -> None:
    """With LoRA, the adapter by itself too, in PEFT's files. All processes call it."""
    if getattr(given, "lora_rank", 0):
        model: Any = made.modules["model"]
        whole = made.whole(model)
        if whole is not None and made.world.first:
            save_adapter(whole, Path(given.out) / "adapter")
