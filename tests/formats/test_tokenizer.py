"""Tokenizers: golden ids of the real model, the splits of known models, streams, and files that lie."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from format_samples import SPECIALS, tokenizer_metadata
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptfast.formats.gguf import FormatError, open_gguf
from gptfast.formats.registry import find_preset_file
from gptfast.formats.tokenizer import StreamDecoder, Tokenizer

GOLDENS = json.loads((Path(__file__).parent.parent / "data" / "smollm2_tokens.json").read_text(encoding="utf-8"))
TEXT = "Hello world, I'll 12345 DON'T  \n\n x\t§ naïve 你好 🙂👨‍👩‍👧 <|im_end|> $a+b ½ x²\r\n"


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_gguf(open_gguf(find_preset_file("smollm2")).metadata)


@pytest.fixture
def small() -> Tokenizer:
    return Tokenizer.from_gguf(tokenizer_metadata())


@pytest.mark.model
def test_golden_ids(smollm2: Tokenizer) -> None:
    for golden in GOLDENS[:-1]:  # the last is what the model wrote: it decodes, but a model need not write what encodes
        assert smollm2.encode(golden["text"], parse_special=True) == golden["ids"]
    for golden in GOLDENS:
        assert smollm2.decode(golden["ids"], skip_special=False) == golden["text"]
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.unk_id, smollm2.pad_id) == (1, 2, 0, 2)
    assert (smollm2.vocab_size, smollm2.eos_ids, smollm2.special_ids) == (49152, {2}, set(range(17)))
    assert not smollm2.add_bos


@pytest.mark.model
def test_the_real_template_gives_the_golden_prompt(smollm2: Tokenizer) -> None:
    golden = next(g for g in GOLDENS if g["text"].startswith("<|im_start|>system"))
    question = golden["text"].split("user\n")[1].split("<|im_end|>")[0]
    assert smollm2.apply_chat_template([{"role": "user", "content": question}]) == golden["ids"]


def same_pieces(pre: str, their_pre: Any, normalizer: Any = None) -> None:
    """Our split of the text equals that of a tokenizer put together as the model's own tokenizer.json is."""
    mine = Tokenizer.from_gguf(tokenizer_metadata(pre))
    theirs = tokenizers.Tokenizer(mine._fast.model)
    theirs.pre_tokenizer = their_pre
    if normalizer is not None:
        theirs.normalizer = normalizer
    for text in (TEXT, TEXT[::-1], "e\u0301 hello hello", "  hello   world\n \n", "a1b22c333d4444", "'s 'S l'l"):
        assert mine.encode(text, add_bos=False) == theirs.encode(text).ids
        normal = text if normalizer is None else normalizer.normalize_str(text)
        assert [p for p, _ in mine._plain.pre_tokenizer.pre_tokenize_str(normal)] == [
            p for p, _ in their_pre.pre_tokenize_str(normal)
        ]


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def test_splits_equal_the_models_own() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    same_pieces("gpt-2", byte_level)
    same_pieces("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]))
    head, tail = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}", r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    tail += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    same_pieces("qwen2", split(head + tail), normalizers.NFC())
    same_pieces("llama-bpe", split(head + "{1,3}" + tail))


def test_llama3_prefers_whole_tokens_to_merges() -> None:
    whole = tokenizer_metadata("llama-bpe")
    whole["tokenizer.ggml.tokens"] = [*whole["tokenizer.ggml.tokens"], "abc"]
    whole["tokenizer.ggml.token_type"] = [*whole["tokenizer.ggml.token_type"], 1]
    last = len(whole["tokenizer.ggml.tokens"]) - 1
    assert Tokenizer.from_gguf(whole).encode("abc", add_bos=False) == [last]
    assert last not in Tokenizer.from_gguf(whole | {"tokenizer.ggml.pre": "gpt-2"}).encode("abc")


def test_special_text_is_plain_unless_asked(small: Tokenizer) -> None:
    text = "hello<|im_end|>"
    assert small.encode(text, parse_special=True)[-1] == 2
    plain = small.encode(text)
    assert not small.special_ids & set(plain) and small.decode(plain) == text
    assert small.decode([1, *plain, 2]) == text
    assert small.decode([1, *plain, 2], skip_special=False) == f"<|im_start|>{text}<|im_end|>"


def test_bos_as_the_config_says() -> None:
    assert Tokenizer.from_gguf(tokenizer_metadata()).encode("hello")[0] != 1
    with_bos = Tokenizer.from_gguf(tokenizer_metadata() | {"tokenizer.ggml.add_bos_token": True})
    assert with_bos.encode("hello") == [1, *with_bos.encode("hello", add_bos=False)]
    metadata = tokenizer_metadata("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    assert Tokenizer.from_gguf(metadata).encode("")[:1] == [1]
    del metadata["tokenizer.ggml.bos_token_id"]
    with pytest.raises(ValueError, match="expected a tokenizer with a BOS token"):
        Tokenizer.from_gguf(metadata).encode("x", add_bos=True)


def test_every_byte_has_a_token_and_back(small: Tokenizer) -> None:
    assert b"".join(small.token_bytes(3 + i) for i in range(256)) == bytes(range(256))
    assert small.token_bytes(2) == b"<|im_end|>" and small.token_bytes(10**9) == b""
    assert small.decode(small.encode(TEXT)) == TEXT
    with pytest.raises(ValueError, match="at least 0, got -1"):
        small.token_bytes(-1)
    with pytest.raises(ValueError, match="a lone surrogate"):
        small.encode("\ud800")


def test_streams_never_split_a_character(small: Tokenizer) -> None:
    rng = random.Random(5)
    for _ in range(200):
        ids = [rng.randrange(small.vocab_size) for _ in range(40)]
        stream = StreamDecoder(small)
        pieces = [stream.push(id) for id in ids] + [stream.flush()]
        expected = b"".join(small.token_bytes(i) for i in ids if i not in small.special_ids)
        assert "".join(pieces) == expected.decode("utf-8", "replace") == small.decode(ids)
        assert "".join(pieces) == small._fast.decode(ids, skip_special_tokens=True)
    stream = StreamDecoder(small)
    pieces = [stream.push(id) for id in small.encode("🙂é")]
    assert [p for p in pieces if p] == ["🙂", "é"] and stream.flush() == ""
    half = small.encode("🙂")[:2]
    assert [stream.push(id) for id in half] == ["", ""] and stream.flush() == "\ufffd"
    assert "".join(stream.push(id) for id in small.encode("ok")) == "ok"


def test_from_file_equals_from_gguf(tmp_path: Path, small: Tokenizer) -> None:
    small._fast.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|endoftext|>"}, "add_bos_token": True}
    other = Tokenizer.from_file(tmp_path / "tokenizer.json", config, eos_ids=[5])
    assert other.encode(TEXT, add_bos=False) == small.encode(TEXT)
    assert other.encode("") == [1] and (other.bos_id, other.eos_id, other.pad_id) == (1, 0, None)
    assert other.eos_ids == {0, 2, 5}  # the file's, its ChatML turn end, the caller's
    assert other.vocab_size == small.vocab_size
    assert other.apply_chat_template([{"role": "user", "content": "hello"}]) == [
        *(1, *small.encode("user\nhello"), 2, *small.encode("\n")),
        *(1, *small.encode("assistant\n")),
    ]


def test_sentencepiece_like_files(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {t: 259 + i for i, t in enumerate(["▁", "h", "i", "▁h", "▁hi"])}
    fast = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "h"), ("▁h", "i")], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    mine = Tokenizer.from_file(tmp_path / "tokenizer.json", {"bos_token": "<s>", "add_bos_token": True})
    ids = mine.encode("hi 🙂hi")
    assert ids[:2] == [1, vocab["▁hi"]] and 3 + 0xF0 in ids
    assert mine.decode(ids) == fast.decode(ids) == "hi 🙂hi"


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match="byte-level or SentencePiece-like"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(FormatError, match=r"tokenizer\.json: "):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def changed(key: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    metadata = tokenizer_metadata()
    metadata[f"tokenizer.ggml.{key}"] = change(metadata.get(f"tokenizer.ggml.{key}"))
    return metadata


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("model", lambda _: "llama", "'gpt2' .*, got 'llama'"),
        ("model", lambda _: 3, "as str, got int"),
        ("pre", lambda _: "martian", "as one of gpt-2, .*, got 'martian'"),
        ("tokens", lambda t: [*t[:-1], t[0]], "all different"),
        ("tokens", lambda _: [1, 2], "as an array of str"),
        ("tokens", lambda _: [], "all different"),
        ("token_type", lambda t: t[:-1], "values in tokenizer.ggml.token_type"),
        ("merges", lambda m: [*m, "abc"], "as pairs with one space, got 'abc'"),
        ("merges", lambda m: [*m, "zz yy"], "tokenizer.ggml.merges: "),
        ("eos_token_id", lambda _: 10**6, "eos_token_id below"),
        ("bos_token_id", lambda _: True, "as int, got bool"),
    ],
)
def test_lies_in_metadata(key: str, change: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_gguf(changed(key, change))


def test_added_tokens_with_gaps_keep_their_ids(tmp_path: Path, small: Tokenizer) -> None:
    state = json.loads(small._fast.to_str())
    end = small.vocab_size
    extra = [{**state["added_tokens"][0], "id": end + 7, "content": "<|far|>", "special": True}]
    state["added_tokens"] += extra
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    try:
        far = Tokenizer.from_file(tmp_path / "tokenizer.json")
    except FormatError:
        return  # older versions of the library refuse gaps
    id = far.encode("<|far|>", parse_special=True)[0]
    assert far.token_bytes(id) == b"<|far|>" and id in far.special_ids and id not in far.encode("<|far|>")
    assert far.vocab_size == id + 1


def test_specials_of_the_samples_are_special(small: Tokenizer) -> None:
    assert small.special_ids == set(range(len(SPECIALS)))
