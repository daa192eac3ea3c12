"""The byte-level BPE tokenizer that a GGUF file carries in its metadata, as an object of the `tokenizers` library; and
the metadata that carries one.

Metadata keys and meanings: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer. The split patterns are
those of the models' own tokenizer.json files. llama.cpp knows splits by name alone (src/llama-vocab.cpp): a tokenizer
that cuts text in another way can't be written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from gptfast.formats.extras import need
from gptfast.formats.files import FormatError
from gptfast.formats.gguf import Typed

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # of tokenizer.ggml.token_type
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
QWEN2_PATTERN = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL


class Split(NamedTuple):
    """How text is cut before BPE."""

    patterns: tuple[str, ...]  # applied one after the other; each match is a piece, and so is what lies between
    nfc: bool = False
    ignore_merges: bool = False  # a piece that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file doesn't say


SPLITS = {
    "gpt-2": Split((GPT2_PATTERN,)),
    "smollm": Split((r"\p{N}", GPT2_PATTERN)),
    "qwen2": Split((QWEN2_PATTERN,), nfc=True),
    "llama-bpe": Split((LLAMA3_PATTERN,), ignore_merges=True, add_bos=True),
    # The same as qwen2's and llama-bpe's, without what else those names mean.
    "bailingmoe": Split((QWEN2_PATTERN,)),
    "smaug-bpe": Split((LLAMA3_PATTERN,)),
    # llama.cpp's for files that name none: symbols apart, GPT-2's rule, then digits in threes.
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")),
}
SPLITS |= {"gpt2": SPLITS["gpt-2"], "llama3": SPLITS["llama-bpe"], "llama-v3": SPLITS["llama-bpe"]}


class Parts(NamedTuple):
    """What the metadata says."""

    fast: Any  # tokenizers.Tokenizer
    vocab_size: int
    ids: dict[str, int]  # "bos", "eos", "eot", "eom", "unknown", "padding": those that are given
    add_bos: bool
    chat_template: str | None


def guarded(what: str, make: Callable[[], Any]) -> Any:
    """The result of a call into the `tokenizers` library; its errors and panics become FormatError."""
    try:
        return make()
    except (ImportError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust arrives as a BaseException of a class that cannot be imported
        raise FormatError(f"{what}: {str(error)[:200]}") from None


def _get(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    value = metadata.get(key, default)
    if value is not default and type(value) is not kind:
        raise FormatError(f"expected {key} as {kind.__name__}, got {type(value).__name__}")
    return value


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = _get(metadata, key, list, [])
    if not all(type(v) is kind for v in values):
        raise FormatError(f"expected {key} as an array of {kind.__name__}")
    return values


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for i, text in enumerate(_list(metadata, "tokenizer.ggml.merges", str)):
        left, _, right = text.partition(" ")
        if not left or not right or " " in right:
            raise FormatError(f"expected tokenizer.ggml.merges as pairs with one space, got {text!r:.80} at {i}")
        merges.append((left, right))
    return merges


def _pre_tokenizer(split: Split) -> Any:
    library, pre = need("tokenizers", "models"), need("tokenizers.pre_tokenizers", "models")
    steps = [pre.Split(library.Regex(pattern), "isolated") for pattern in split.patterns]
    return pre.Sequence([*steps, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def read_parts(metadata: Mapping[str, Any]) -> Parts:
    """The tokenizer in a GGUF file's metadata. Raises FormatError where it is malformed or of another kind."""
    model = _get(metadata, "tokenizer.ggml.model", str)
    if model != "gpt2":
        raise FormatError(f"expected tokenizer.ggml.model 'gpt2' (byte-level BPE), got {model!r:.80}")
    name = _get(metadata, "tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        raise FormatError(f"expected tokenizer.ggml.pre as one of {', '.join(SPLITS)}, got {name!r:.80}")
    split, tokens = SPLITS[name], _list(metadata, "tokenizer.ggml.tokens", str)
    vocab = {token: i for i, token in enumerate(tokens)}
    if not tokens or len(vocab) < len(tokens):
        raise FormatError(f"expected tokenizer.ggml.tokens all different, got {len(tokens)} with {len(vocab)} texts")
    types = _list(metadata, "tokenizer.ggml.token_type", int)
    if types and len(types) != len(tokens):
        raise FormatError(f"expected {len(tokens)} values in tokenizer.ggml.token_type, got {len(types)}")
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        id = _get(metadata, f"tokenizer.ggml.{kind}_token_id", int)
        if id is not None:
            if not 0 <= id < len(tokens):
                raise FormatError(f"expected tokenizer.ggml.{kind}_token_id below {len(tokens)}, got {id}")
            ids[kind] = id
    library, models = need("tokenizers", "models"), need("tokenizers.models", "models")
    merges = _merges(metadata)
    fast = guarded(
        "tokenizer.ggml.merges",
        lambda: library.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split.ignore_merges)),
    )
    if split.nfc:
        fast.normalizer = need("tokenizers.normalizers", "models").NFC()
    fast.pre_tokenizer = _pre_tokenizer(split)
    fast.decoder = need("tokenizers.decoders", "models").ByteLevel()
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} if types else set(ids.values())
    added = sorted(special | {i for i, kind in enumerate(types) if kind == USER_DEFINED})
    made = [library.AddedToken(tokens[i], normalized=False, special=i in special) for i in added if tokens[i]]
    guarded("tokenizer.ggml.tokens", lambda: fast.add_tokens(made))
    return Parts(
        fast=fast,
        vocab_size=len(tokens),
        ids=ids,
        add_bos=_get(metadata, "tokenizer.ggml.add_bos_token", bool, split.add_bos),
        chat_template=_get(metadata, "tokenizer.chat_template", str),
    )


# Ways to write one pattern: GPT-4's own has possessive quantifiers, which forbid only what couldn't match anyway, the
# contractions in another order, and one line break where the whitespace before it has taken all others.
SAME = (
    *(("?+", "?"), ("++", "+"), ("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS)),
    *(("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS), (r"\s*[\r\n]|", r"\s*[\r\n]+|")),
)


def _canonical(pattern: str) -> str:
    for way, usual in SAME:
        pattern = pattern.replace(way, usual)
    return pattern


def _patterns(step: Any) -> list[str]:
    """The split patterns of a step of a tokenizer.json's pre-tokenizer, in order."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        return [pattern for part in step["pretokenizers"] for pattern in _patterns(part)]
    if kind == "Split" and "Regex" in step["pattern"] and step["behavior"] == "Isolated" and not step["invert"]:
        return [_canonical(step["pattern"]["Regex"])]
    if kind == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return [GPT2_PATTERN] if step["use_regex"] else []
    raise ValueError(f"expected a pre-tokenizer of regex splits and bytes for a GGUF file, got {json.dumps(step):.200}")


def split_name(state: Mapping[str, Any]) -> str:
    """llama.cpp's name of the way in which a tokenizer, given as the contents of its tokenizer.json, cuts text.

    Raises ValueError where llama.cpp has no name for it.
    """
    normalizer = state.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ValueError(f"expected no normalizer, or NFC, for a GGUF file, got {normalizer.get('type')}")
    patterns = tuple(_patterns(state.get("pre_tokenizer")))
    ignore_merges = bool(state["model"].get("ignore_merges"))
    for name, split in SPLITS.items():
        if (split.patterns, split.nfc, split.ignore_merges) == (patterns, normalizer is not None, ignore_merges):
            return name
    known = "gpt-2, smollm, qwen2, llama-bpe"
    how = " then ".join(patterns) + (", merges ignored for whole tokens" if ignore_merges else "")
    raise ValueError(f"expected a way to cut text that llama.cpp has a name for ({known}), got {how}")


def write_parts(
    fast: Any,
    vocab_size: int,
    *,
    ids: Mapping[str, int | None],
    eos_ids: Iterable[int] = (),
    add_bos: bool = False,
    chat_template: str | None = None,
) -> dict[str, Any]:
    """The metadata that carries a tokenizer: the inverse of read_parts.

    Args:
        fast: a tokenizers.Tokenizer, byte-level BPE.
        vocab_size: rows of the model's embedding; ids that the tokenizer doesn't know become unused tokens.
        ids: of "bos", "eos", "unknown" and "padding", those that there are.
        eos_ids: all that end a text; the first other than eos is written as the end of a turn.
        add_bos: whether a text begins with BOS.
        chat_template: Jinja text.

    Raises:
        ValueError: a tokenizer of another kind, or one that llama.cpp has no name for.
    """
    state = json.loads(fast.to_str())
    model = state["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(state.get("decoder")):
        raise ValueError(f"expected a byte-level BPE tokenizer for a GGUF file, got {model.get('type')}")
    odd = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(k)]
    if odd:
        raise ValueError(f"expected plain BPE for a GGUF file, got {odd[0]} {model[odd[0]]!r}")
    name = split_name(state)
    texts = {id: text for text, id in fast.get_vocab(with_added_tokens=True).items()}
    if max(texts) >= vocab_size:
        raise ValueError(f"expected token ids below {vocab_size}, the rows of the model's embedding, got {max(texts)}")
    added = {entry["id"]: CONTROL if entry["special"] else USER_DEFINED for entry in state["added_tokens"]}
    tokens = [texts.get(id, f"[unused {id}]") for id in range(vocab_size)]
    types = [added.get(id, NORMAL) if id in texts else UNUSED for id in range(vocab_size)]
    turns = sorted(set(eos_ids) - {ids.get("eos")})
    given = {**ids, "eot": turns[0] if turns else None}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed("int32", types),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
        "tokenizer.ggml.add_bos_token": add_bos,
        **{f"tokenizer.ggml.{kind}_token_id": id for kind, id in given.items() if id is not None},
    }
    if chat_template is not None:
        metadata["tokenizer.chat_template"] = chat_template
    return metadata
