"""Texts and folders of a model in training: what it writes now, and what others load later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptfast.formats.tokenizer import Tokenizer
from gptfast.generate import LanguageModel
from gptfast.model import GPT, convert
from gptfast.train.lora import adapted, merged_copy
from gptfast.train.packing import seed_of


def continuations(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, seed: int
) -> list[dict[str, Any]]:
    """What the model writes behind each text, at temperature 0.8 and always with the same seed."""
    lm = LanguageModel(model, tokenizer)
    options: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=0.8, seed=seed_of("samples", seed))
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = lm.generate([start + tokenizer.encode(p, add_bos=False) for p in prompts], **options)
    return [{"prompt": p, "text": g.text} for p, g in zip(prompts, found)]


def answers(
    model: GPT,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[dict[str, str]]],
    max_new_tokens: int,
    seed: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """What the model answers to each conversation, which ends with the user: its text, and whether it ended itself."""
    lm = LanguageModel(model, tokenizer)
    options = {"temperature": 0.8} | options | {"max_new_tokens": max_new_tokens, "seed": seed_of("samples", seed)}
    found = lm.generate([lm.chat_prompt(c) for c in conversations], **options)
    return [
        {"prompt": c[-1]["content"], "text": g.text, "finish_reason": g.finish_reason}
        for c, g in zip(conversations, found)
    ]


def save_model(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face folder with the weights and the tokenizer, which `gptfast.load` and transformers read.
    Adapters are merged into the weights that are written; the model keeps them apart."""
    if adapted(model):
        model = merged_copy(model)
    extra: dict[str, Any] = {"tokenizer.json": tokenizer.to_json(), "tokenizer_config.json": tokenizer.to_config()}
    ends = sorted(tokenizer.eos_ids)
    if ends:
        extra["generation_config.json"] = {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    if tokenizer.chat_template is not None:
        extra["chat_template.jinja"] = tokenizer.chat_template
    convert.save_folder(model, folder, extra)
