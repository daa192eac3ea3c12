"""The recipe's tokenizer: byte-level BPE on equal bytes of each language and source; conversations as ids with a mask.

BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) over bytes (GPT-2) has no unknown characters. Text is cut
as GPT-4's tokenizer cuts it, but with each digit by itself, so that a small vocabulary isn't spent on numbers.
The `tokenizers` library trains it; files are tokenizer.json and tokenizer_config.json, which Hugging Face's and our own
loaders read.

A conversation is written as

    <|bos|> <|system|>...<|end|> <|user|>...<|end|> <|assistant|>...<|end|> ...

without the spaces. The marks are special tokens that text never becomes, whatever its characters: nobody can forge a
turn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gptfast.formats.extras import need
from gptfast.formats.files import read_json, replacing
from gptfast.formats.tokenizer import Tokenizer
from gptfast.train.data.splits import number
from gptfast.train.data.types import Text

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
TURNS = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (BOS, END, PAD, *TURNS.values())  # ids 0 to 5
# GPT-4's pattern (tiktoken's cl100k_base), digits one at a time: llama.cpp knows this cut by name, as bailingmoe.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('expected roles system, user and assistant, got ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SMALLEST = 256 + len(SPECIALS)  # entries: a byte each, and the marks
LARGEST = 1 << 18


def balanced(texts: Iterable[Text], sample_bytes: int) -> list[str]:
    """As many bytes of each language: `sample_bytes`, or all of the language that has the least. Within a language as
    many of each source; what a short one can't give comes from the others in equal parts.

    A long source doesn't drown the others' words: each source's documents are taken in an order given by their hash, so
    that the sample depends on the set of texts alone, not on their order. The last one is cut between two characters.
    """
    by_language: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for text in texts:
        by_language[text.language][text.source].add(text.text)
    sizes = {
        language: {source: sum(len(t.encode()) for t in found) for source, found in sources.items()}
        for language, sources in by_language.items()
    }
    limit = min([sample_bytes, *(sum(found.values()) for found in sizes.values())])
    sample = []
    for language, sources in sorted(by_language.items()):
        left = limit
        smallest_first = sorted(sources, key=lambda source: (sizes[language][source], source))
        for i, source in enumerate(smallest_first):
            part = min(left // (len(sources) - i), sizes[language][source])
            left -= part
            for text in sorted(sources[source], key=lambda t: (number(t), t)):
                data = text.encode()[:part]
                sample.append(data.decode("utf-8", "ignore"))
                part -= len(data)
                if part == 0:
                    break
    return sample


def train_tokenizer(
    texts: Iterable[Text], folder: str | Path, vocab_size: int = 8192, sample_bytes: int = 4 << 20
) -> Tokenizer:
    """Trains a tokenizer and writes tokenizer.json and tokenizer_config.json. The same texts give the same bytes.

    Args:
        texts: the training split; each language has an equal part in the sample, see `balanced`.
        folder: where the files go; made if it is not there.
        vocab_size: entries, the 256 bytes and six marks among them. Little text may give fewer.
        sample_bytes: of each language, at most.

    Raises:
        ValueError: a vocabulary that is too small or too large, or no text.
        ImportError: the `tokenizers` library is missing.
    """
    if not SMALLEST <= vocab_size <= LARGEST:
        raise ValueError(f"expected vocab_size from {SMALLEST} (bytes and marks) to {LARGEST}, got {vocab_size}")
    sample = balanced(texts, sample_bytes) if (texts := list(texts)) else []
    if not any(sample):
        raise ValueError("expected texts to train a tokenizer on, got none")
    library = need("tokenizers", "models")
    fast = library.Tokenizer(library.models.BPE())
    cut = library.pre_tokenizers.Split(library.Regex(PATTERN), behavior="isolated")
    to_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = library.pre_tokenizers.Sequence([cut, to_bytes])
    fast.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(sample, trainer, length=len(sample))
    fast.post_processor = library.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIALS.index(BOS))]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    files = {"tokenizer.json": fast.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}
    for name, text in files.items():
        with replacing(folder / name) as path:
            path.write_text(text + "\n", encoding="utf-8")
    return read_tokenizer(folder)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in a folder, ours or Hugging Face's. Raises FileNotFoundError or FormatError."""
    folder = Path(folder)
    path, beside, template = (folder / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    if not path.is_file():
        raise FileNotFoundError(f"expected tokenizer.json in {folder}, got none: run `gptfast train tokenizer`")
    config = read_json(beside) if beside.is_file() else None
    return Tokenizer.from_file(path, config, template.read_text(encoding="utf-8") if template.is_file() else None)


def prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The ids of a conversation up to where the assistant's answer begins. Raises ValueError for messages of a wrong
    form, or without a chat template."""
    if tokenizer.chat_template != TEMPLATE:
        return tokenizer.apply_chat_template(messages)
    ids, _ = _ours(tokenizer, messages)
    return [*ids, SPECIALS.index(TURNS["assistant"])]


def conversation(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, and which of them the assistant wrote: its texts and the mark that ends each.

    The ids are those of the tokenizer's chat template, ours or another model's. What a template puts after the mark
    that ends a turn (a line feed, say) is not the assistant's.

    Returns:
        ids: all of them.
        mask: as long, True where a model that answers is trained.

    Raises:
        ValueError: messages of a wrong form, no chat template, or one that writes a turn otherwise once others follow.
    """
    if tokenizer.chat_template == TEMPLATE:
        return _ours(tokenizer, messages)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    mask = [False] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        last = i + 1 == len(messages)
        through = ids if last else tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
        if through[: len(start)] != start or ids[: len(through)] != through:
            raise ValueError(_unsteady(i + 1))
        end = _end(tokenizer, through, len(start))
        mask[len(start) : end] = [True] * (end - len(start))
    return ids, mask


def answer(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], opened: Sequence[int]) -> list[int]:
    """The ids of the assistant's text that ends a conversation and of the mark behind it: what `conversation` marks
    there. opened: what `prompt` gives for the messages before it. Raises ValueError as `conversation` does."""
    if tokenizer.chat_template == TEMPLATE:
        ids, _ = _ours(tokenizer, messages)
    else:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    if ids[: len(opened)] != list(opened):
        raise ValueError(_unsteady(len(messages)))
    return ids[len(opened) : _end(tokenizer, ids, len(opened))]


def _end(tokenizer: Tokenizer, ids: Sequence[int], start: int) -> int:
    """Behind the mark that ends the turn which began at `start`; the end of the ids where there is none."""
    ends = [at for at in range(start, len(ids)) if ids[at] in tokenizer.eos_ids]
    return ends[-1] + 1 if ends else len(ids)


def _unsteady(message: int) -> str:
    return (
        f"expected a chat template that writes message {message} the same whatever follows it, got another: "
        f"a mask of what the assistant wrote can't be made"
    )


def _ours(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
    """What TEMPLATE renders, without Jinja: marks cut the text, so each content is encoded by itself."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError(f"expected a list of messages, at least one, got {messages!r:.80}")
    ids, mask = [SPECIALS.index(BOS)], [False]
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in TURNS or not isinstance(content, str):
            raise ValueError(f"expected messages with a role of {', '.join(TURNS)} and text, got {message!r:.80}")
        said = [*tokenizer.encode(content, add_bos=False), SPECIALS.index(END)]
        ids += [SPECIALS.index(TURNS[role]), *said]
        mask += [False, *[role == "assistant"] * len(said)]
    return ids, mask
