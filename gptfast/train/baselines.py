"""What a model has to beat: bits per byte of held-out text by counting bytes and by compressors.

Bits per byte compares models with any tokenizer, n-grams and compressors: nats / (ln 2 x bytes). Documents are joined
without a byte between them, so that everyone counts the same bytes.

The n-grams are interpolated by Witten and Bell's rule (1991, https://doi.org/10.1109/18.87000, method C):

    p_k(c | h) = (n(h c) + t(h) p_{k-1}(c | h')) / (n(h) + t(h)),    p_0 = 1 / 256

n counts in the training text, t(h) is how many different bytes follow the context h of k - 1 bytes there, and h' is h
without its first byte. A context never seen leaves p_{k-1} as it is. For the held-out text's first bytes, contexts are
as long as the text before them.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gptfast.train.data.types import Text

ORDERS = range(1, 6)  # bytes of an n-gram, the last one the predicted
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9, mtime=0),
    "bz2 -9": lambda data: bz2.compress(data, 9),
    "xz -9": lambda data: lzma.compress(data, preset=9),
}


def joined(texts: Iterable[str]) -> bytes:
    """The bytes that are counted: all texts in UTF-8, nothing between them."""
    return "".join(texts).encode()


def ngram_bits(train: bytes, held_out: bytes) -> dict[int, float]:
    """Bits per byte of the held-out bytes under the n-grams of the training bytes: {order: bits}, orders 1 to 5.

    Raises ValueError where there are no held-out bytes.
    """
    if not held_out:
        raise ValueError("expected held-out text, got none")
    known, unknown = _bytes(train), _bytes(held_out)
    p = torch.full((len(held_out),), 1 / 256, dtype=torch.float64)
    bits = {}
    for order in ORDERS:
        if len(train) >= order:
            p = _interpolate(p, known, unknown, order)
        bits[order] = -p.log2().mean().item()
    return bits


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(torch.int64) if data else torch.zeros(0).long()


def _interpolate(p: Tensor, known: Tensor, unknown: Tensor, order: int) -> Tensor:
    """p_order of each held-out byte from p_{order - 1}."""
    grams, counts = torch.unique(_keys(known, order), return_counts=True)
    contexts, distinct = torch.unique_consecutive(grams >> 8, return_counts=True)  # grams are sorted
    starts = distinct.cumsum(0)
    totals = torch.cat([torch.zeros(1).long(), counts.cumsum(0)])
    n_context = totals[starts] - totals[starts - distinct]
    keys = _keys(unknown, order)
    n = _look_up(keys, grams, counts)
    n_h, t_h = (_look_up(keys >> 8, contexts, values) for values in (n_context, distinct))
    better = p.clone()
    tail = p[order - 1 :]
    better[order - 1 :] = torch.where(n_h > 0, (n + t_h * tail) / (n_h + t_h).clamp(min=1), tail)
    return better


def _keys(data: Tensor, order: int) -> Tensor:
    """Each n-gram as a number, its last byte lowest: (len - order + 1,)."""
    count = max(0, len(data) - order + 1)
    keys = torch.zeros(count, dtype=torch.int64)
    for i in range(order):
        keys = (keys << 8) | data[i : i + count]
    return keys


def _look_up(keys: Tensor, table: Tensor, values: Tensor) -> Tensor:
    """values of the keys that stand in the sorted table, 0 for others."""
    at = torch.searchsorted(table, keys).clamp(max=len(table) - 1)
    return torch.where(table[at] == keys, values[at], 0)


def compressed_bits(held_out: bytes, train: bytes | None = None) -> dict[str, float]:
    """Bits per byte by compressors: one stream over all held-out bytes.

    With `train`, "xz -9 primed" too: what the held-out bytes add to a stream that begins with the training bytes. gzip
    looks back 32 KiB and bz2 keeps blocks of 900 kB apart, so for them it would mean nothing; xz looks back 64 MiB.
    """
    if not held_out:
        raise ValueError("expected held-out text, got none")
    bits = {name: 8 * len(compress(held_out)) / len(held_out) for name, compress in COMPRESSORS.items()}
    if train is not None:
        xz = COMPRESSORS["xz -9"]
        bits["xz -9 primed"] = 8 * (len(xz(train + held_out)) - len(xz(train))) / len(held_out)
    return bits


def bits_per_byte(
    train: bytes, held_out: bytes, progress: Callable[[str], None] | None = None, *, primed: bool = True
) -> dict[str, float]:
    """All baselines by name: "unigram", "2-gram" ... "5-gram", "gzip -9", "bz2 -9", "xz -9", and "xz -9 primed" unless
    primed is False: it takes as long as all others."""
    say = progress or (lambda message: None)
    say("counting bytes")
    named = {f"{order}-gram" if order > 1 else "unigram": bits for order, bits in ngram_bits(train, held_out).items()}
    say("compressing")
    return named | compressed_bits(held_out, train if primed else None)


def by_language(
    train: Sequence[Text],
    held_out: Sequence[Text],
    progress: Callable[[str], None] | None = None,
    *,
    primed: bool = True,
) -> dict[str, dict[str, float]]:
    """`bits_per_byte` for each language of the held-out texts."""
    found = {}
    for language in sorted({text.language for text in held_out}):
        known, unknown = (joined(t.text for t in texts if t.language == language) for texts in (train, held_out))
        found[language] = bits_per_byte(known, unknown, progress, primed=primed)
    return found


def from_nats(nats: float, n_bytes: int) -> float:
    """Bits per byte of a model whose losses over the text sum to so many nats."""
    return nats / (math.log(2) * n_bytes)
