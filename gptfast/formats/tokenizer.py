"""Text to token ids and back, over the `tokenizers` library, from a tokenizer.json or from a GGUF file's metadata.

Text is encoded without special tokens unless the caller asks for them, so that text from a stranger cannot end a turn
or start one. Decoding goes through the tokens' bytes: the text of a sequence is the concatenation of its bytes, and a
stream gives out whole characters only.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from gptfast.formats.chat import CHATML, ChatTemplate
from gptfast.formats.extras import need
from gptfast.formats.files import FormatError
from gptfast.formats.tokenizer_gguf import guarded, read_parts, write_parts

MAX_JSON = 256 << 20  # bytes of a tokenizer.json
SPACE = "▁"  # how SentencePiece writes a space


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their byte, characters from U+0100 on for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _text_of(token: Any) -> str | None:
    """A special token in a tokenizer_config.json: a string, or an object with `content`."""
    value = token.get("content") if isinstance(token, Mapping) else token
    if value is not None and not isinstance(value, str):
        raise FormatError(f"tokenizer_config.json: expected special tokens as text, got {value!r:.80}")
    return value


def _decoder_types(fast: Any) -> set[str]:
    """The names of the steps of a tokenizer's decoder."""
    state = json.loads(fast.decoder.__getstate__()) if fast.decoder is not None else {}
    return {step.get("type", "") for step in [state, *state.get("decoders", [])]}


class Tokenizer:
    """A tokenizer. Reading it from several threads is safe: nothing changes after construction but caches.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id, unk_id, pad_id: ids, or None where the tokenizer has none.
        eos_ids: every id that ends a text or a turn.
        special_ids: ids that stand for no text.
        add_bos: whether `encode` puts the BOS token first unless told otherwise.
        chat_template: Jinja text, or None.
    """

    def __init__(
        self,
        fast: Any,
        *,
        vocab_size: int | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Iterable[int] = (),
        unk_id: int | None = None,
        pad_id: int | None = None,
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        """`fast` is a tokenizers.Tokenizer, byte-level or SentencePiece-like. Raises FormatError for another kind."""
        steps = _decoder_types(fast)
        self._byte_level = "ByteLevel" in steps
        if not self._byte_level and not steps & {"ByteFallback", "Metaspace", "Replace"}:
            raise FormatError(f"expected a byte-level or SentencePiece-like tokenizer, got one that decodes by {steps}")
        self._strips_space = not self._byte_level and bool(steps & {"Strip", "Metaspace"})
        self._fast, self._plain = fast, _without_markers(fast)
        added = fast.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.vocab_size = vocab_size or max([fast.get_vocab_size(with_added_tokens=True) - 1, *added]) + 1
        self._markers = [token.content for token in added.values() if _is_marker(token)]
        self._normalized_markers = any(token.normalized for token in added.values() if _is_marker(token))
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = bos_id, eos_id, unk_id, pad_id
        self.add_bos = add_bos and bos_id is not None
        has_chatml = {"<|im_start|>", "<|im_end|>"} <= set(self._added.values())
        self.chat_template = CHATML if chat_template is None and has_chatml else chat_template
        ends = {*eos_ids, *([] if eos_id is None else [eos_id])}
        if has_chatml and "<|im_end|>" in (self.chat_template or ""):
            ends.add(fast.token_to_id("<|im_end|>"))  # files often name only the end of a document
        if any(not 0 <= id < self.vocab_size for id in ends):
            raise FormatError(f"expected end-of-text ids below {self.vocab_size}, got {sorted(ends)}")
        self.eos_ids = frozenset(ends)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        tokenizer_config: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        *,
        eos_ids: Iterable[int] = (),
    ) -> Tokenizer:
        """From a tokenizer.json and what stands beside it.

        Args:
            path: the tokenizer.json.
            tokenizer_config: tokenizer_config.json: bos_token, eos_token, unk_token, pad_token, add_bos_token.
            chat_template: instead of tokenizer_config's.
            eos_ids: more ids that end a text, as generation_config.json lists them.

        Raises:
            FormatError: a malformed file.
        """
        path, config = Path(path), tokenizer_config or {}
        if path.stat().st_size > MAX_JSON:
            raise FormatError(f"{path.name}: expected at most {MAX_JSON} bytes, got {path.stat().st_size}")
        library = need("tokenizers", "models")
        fast = guarded(path.name, lambda: library.Tokenizer.from_buffer(path.read_bytes()))
        fast.no_padding()
        fast.no_truncation()
        ids = {}
        for kind in ("bos", "eos", "unk", "pad"):
            text = _text_of(config.get(f"{kind}_token"))
            ids[kind] = None if text is None else fast.token_to_id(text)
        start = guarded(path.name, lambda: fast.encode("", add_special_tokens=True).ids)
        add_bos = config.get("add_bos_token")
        template = config.get("chat_template") if chat_template is None else chat_template
        return cls(
            fast,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            eos_ids=eos_ids,
            unk_id=ids["unk"],
            pad_id=ids["pad"],
            add_bos=add_bos if isinstance(add_bos, bool) else ids["bos"] is not None and start[:1] == [ids["bos"]],
            chat_template=template if isinstance(template, str) else None,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From a GGUF file's metadata. Raises FormatError where it is malformed or not byte-level BPE."""
        parts = read_parts(metadata)
        return cls(
            parts.fast,
            vocab_size=parts.vocab_size,
            bos_id=parts.ids.get("bos"),
            eos_id=parts.ids.get("eos"),
            eos_ids={id for kind, id in parts.ids.items() if kind in ("eot", "eom")},
            unk_id=parts.ids.get("unknown"),
            pad_id=parts.ids.get("padding"),
            add_bos=parts.add_bos,
            chat_template=parts.chat_template,
        )

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The metadata that carries this tokenizer in a GGUF file of a model with so many rows in its embedding.

        Raises ValueError for a tokenizer that isn't byte-level BPE or cuts text as llama.cpp can't.
        """
        return write_parts(
            self._fast,
            vocab_size,
            ids={"bos": self.bos_id, "eos": self.eos_id, "unknown": self.unk_id, "padding": self.pad_id},
            eos_ids=self.eos_ids,
            add_bos=self.add_bos,
            chat_template=self.chat_template,
        )

    def to_files(self) -> dict[str, Any]:
        """tokenizer.json (text) and tokenizer_config.json (an object), by name, as Hugging Face's folders have them."""
        named = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            **{f"{kind}_token": self._fast.id_to_token(id) for kind, id in named.items() if id is not None},
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return {"tokenizer.json": self._fast.to_str(pretty=True), "tokenizer_config.json": config}

    def encode(self, text: str, parse_special: bool = False, add_bos: bool | None = None) -> list[int]:
        """The ids of a text.

        Args:
            text: any text.
            parse_special: read the texts of special tokens as those tokens. Not for text from strangers.
            add_bos: put the BOS token first; None = as the tokenizer's own config says.
        """
        fast = self._fast if parse_special else self._plain
        try:
            ids = fast.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            got = "a lone surrogate" if isinstance(text, str) else type(text).__name__
            raise ValueError(f"expected text of valid Unicode, got {got}") from None
        with_bos = self.add_bos if add_bos is None else add_bos
        if with_bos and self.bos_id is None:
            raise ValueError("expected a tokenizer with a BOS token for add_bos=True, got one without")
        return [self.bos_id, *ids] if with_bos and self.bos_id is not None else ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode(text, add_bos=False)` of each text, by all cores. Raises ValueError as there."""
        found: list[list[int]] = []
        for first in range(0, len(texts), 256):  # what the library returns is much larger than the ids
            some = list(texts[first : first + 256])
            try:
                encoded = self._plain.encode_batch(some, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                return found + [self.encode(text, add_bos=False) for text in texts[first:]]  # says which and why
            found += [e.ids for e in encoded]
        return found

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; for a special token, those of its name; b"" beyond the vocabulary.

        Models pad their vocabulary, so an id beyond the tokenizer's is not an error; a negative one is.
        """
        found = self._bytes.get(id)
        if found is None:
            if id < 0:
                raise ValueError(f"expected a token id of at least 0, got {id}")
            found = self._bytes[id] = self._find_bytes(id)
        return found

    def _find_bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._fast.id_to_token(id) if id < self.vocab_size else None
        if token is None:
            return b""
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of a sequence; bytes that are not UTF-8 become U+FFFD."""
        stream = StreamDecoder(self, skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def to_json(self) -> str:
        """The contents of a tokenizer.json that reads back as this tokenizer."""
        return self._fast.to_str(pretty=True)

    def to_config(self) -> dict[str, Any]:
        """The contents of the tokenizer_config.json beside it, as transformers reads it; without the chat template."""
        named = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        texts = {f"{kind}_token": self._fast.id_to_token(id) for kind, id in named.items() if id is not None}
        return {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos, **texts}

    @cached_property
    def _chat(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ValueError("expected a tokenizer with a chat template, got one without: use a plain prompt")
        named = {"bos": self.bos_id, "unk": self.unk_id, "pad": self.pad_id, "eos": self.eos_id}
        variables = {f"{kind}_token": self._fast.id_to_token(id) for kind, id in named.items() if id is not None}
        split = self._normalized_markers and self._fast.normalizer is not None
        return ChatTemplate(self.chat_template, self._markers, variables, always_split=split)

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text that `apply_chat_template` encodes."""
        pieces = self._chat.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        return "".join(text for text, _ in pieces)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The ids of a conversation. Special tokens come from the template alone, never from a message's text.

        Args:
            messages: objects with `role` and `content` (text, or a list of text parts), and what else templates read.
            add_generation_prompt: end with the start of the assistant's turn.
            tools: JSON schemas of functions, for templates that know them.
            variables: more names for the template, such as enable_thinking.

        Raises:
            ValueError: no template, malformed messages, or messages that the template refuses.
        """
        ids: list[int] = []
        pieces = self._chat.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)
        for text, trusted in pieces:
            ids += self.encode(text, parse_special=trusted, add_bos=False)
        return ids


def _is_marker(token: Any) -> bool:
    """Whether an added token may come from the program alone: it is special, or a turn mark not called so by its file.

    Other added tokens (a run of spaces, <think>) are vocabulary, and any text may contain them.
    """
    return token.special or re.fullmatch(r"<[|｜].*[|｜]>", token.content) is not None


def _without_markers(fast: Any) -> Any:
    """The same tokenizer, sharing its vocabulary, that reads markers as plain text."""
    library = need("tokenizers", "models")
    plain = library.Tokenizer(fast.model)
    if fast.normalizer is not None:
        plain.normalizer = fast.normalizer
    if fast.pre_tokenizer is not None:
        plain.pre_tokenizer = fast.pre_tokenizer
    added = fast.get_added_tokens_decoder()
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    tokens = [
        library.AddedToken(t.content, special=_is_marker(t), **{flag: getattr(t, flag) for flag in flags})
        for _, t in sorted(added.items())
    ]
    guarded("added tokens", lambda: plain.add_tokens(tokens))
    if {id: t.content for id, t in plain.get_added_tokens_decoder().items()} != {
        i: t.content for i, t in added.items()
    }:
        state = json.loads(fast.to_str())  # ids with gaps, which only the library's own JSON keeps
        for entry in state["added_tokens"]:
            entry["special"] = _is_marker(added[entry["id"]])
        plain = guarded("added tokens", lambda: library.Tokenizer.from_str(json.dumps(state)))
    plain.encode_special_tokens = True
    return plain


class StreamDecoder:
    """Decodes a stream of ids into text, in time linear in its length.

    A character whose bytes are not all there is held back; bytes that can no longer become one give U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer._strips_space

    def push(self, id: int) -> str:
        """The text that has become certain with this token; often "" in the middle of a character."""
        if id in self._skip:
            return ""
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(id)))

    def flush(self) -> str:
        """What was held back, as U+FFFD. The decoder then stands at the start of a new text."""
        text = self._stripped(self._utf8.decode(b"", final=True))
        self._strip = self._tokenizer._strips_space
        return text

    def _stripped(self, text: str) -> str:
        """SentencePiece-like tokenizers put a space before a text; it is no part of it."""
        if not self._strip or not text:
            return text
        self._strip = False
        return text.removeprefix(" ")
