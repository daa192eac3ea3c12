"""Bits per byte of the baselines, against counting by hand."""

from __future__ import annotations

import lzma
import math
import random
from collections import Counter, defaultdict

import pytest

from gptfast.train.baselines import ORDERS, bits_per_byte, by_language, compressed_bits, from_nats, joined, ngram_bits
from gptfast.train.data.types import Text


def slowly(train: bytes, held_out: bytes, order: int) -> float:
    """Witten and Bell's rule, byte by byte."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for k in range(order):
        for i in range(k, len(train)):
            counts[train[i - k : i]][train[i]] += 1

    def p(context: bytes, byte: int) -> float:
        shorter = p(context[1:], byte) if context else 1 / 256
        found = counts.get(context, Counter())
        n, t = sum(found.values()), len(found)
        return (found[byte] + t * shorter) / (n + t) if n else shorter

    bits = [-math.log2(p(held_out[max(0, i - order + 1) : i], byte)) for i, byte in enumerate(held_out)]
    return sum(bits) / len(bits)


def sample(seed: int, n: int) -> bytes:
    draw = random.Random(seed)
    return " ".join(draw.choice(["the", "members", "学而", "of", "x\0\xff"]) for _ in range(n)).encode()


def test_ngrams_against_counting() -> None:
    train, held_out = sample(0, 300), sample(1, 60) + bytes(range(256))
    found = ngram_bits(train, held_out)
    assert list(found) == list(ORDERS)
    for order, bits in found.items():
        assert bits == pytest.approx(slowly(train, held_out, order), rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    """No n-gram spends more than it has: over all next bytes after one context."""
    train = sample(2, 100)
    for order in ORDERS:
        context = train[:order]
        alone = ngram_bits(train, context)[order] * order
        total = sum(2 ** -(ngram_bits(train, context + bytes([b]))[order] * (order + 1) - alone) for b in range(256))
        assert total == pytest.approx(1, abs=1e-9)


def test_short_and_missing_text() -> None:
    assert ngram_bits(b"", b"abc") == dict.fromkeys(ORDERS, 8.0)
    assert ngram_bits(b"ab", b"a")[5] == pytest.approx(slowly(b"ab", b"a", 5))
    for f in (lambda: ngram_bits(b"a", b""), lambda: compressed_bits(b"")):
        with pytest.raises(ValueError, match="expected held-out text"):
            f()


def test_compressors() -> None:
    train, held_out = sample(3, 2000), sample(4, 500)
    found = bits_per_byte(train, held_out)
    assert found["xz -9"] == 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    assert found["xz -9 primed"] < found["xz -9"] < 8
    names = ["unigram", "2-gram", "3-gram", "4-gram", "5-gram", "gzip -9", "bz2 -9", "xz -9", "xz -9 primed"]
    assert list(found) == names and found["5-gram"] < found["2-gram"] < found["unigram"]


def test_by_language_counts_each_alone() -> None:
    train = [Text("abcabc", "en", "s"), Text("子曰学而", "zh", "s")]
    held_out = [Text("abc", "en", "s"), Text("子", "zh", "s"), Text("曰", "zh", "s")]
    found = by_language(train, held_out)
    assert set(found) == {"en", "zh"}
    assert found["zh"] == bits_per_byte("子曰学而".encode(), joined(["子", "曰"]))
    assert from_nats(math.log(2) * 12, 6) == pytest.approx(2)
