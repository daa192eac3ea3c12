"""What is special about embedding: copied bits, rounded sums, views, and the ids that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gptfast.ops import embedding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_is_copied(dtype: torch.dtype, isa: str) -> None:
    """NaN payloads too."""
    weight = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
    ids = torch.randperm(256)
    got = embedding(ids, weight, backend="cpu")
    assert torch.equal(got.view(torch.int16), weight[ids].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_once(dtype: torch.dtype, isa: str) -> None:
    """Bit for bit the fp32 sum rounded to the nearest, ties to even."""
    torch.manual_seed(0)
    weight, positions = (
        torch.randn(50, 77).to(dtype),
        (torch.randn(20, 77) * 2.0 ** torch.randint(-9, 3, (20, 77))).to(dtype),
    )
    ids, where = torch.randint(0, 50, (3, 40)), torch.randint(0, 20, (3, 40))
    got = embedding(ids, weight, positions=where, position_weight=positions, backend="cpu")
    assert torch.equal(got, (weight[ids].float() + positions[where].float()).to(dtype))


def test_views_give_the_bits_of_contiguous_tensors(isa: str) -> None:
    torch.manual_seed(0)
    wide, ids = torch.randn(30, 99), torch.randint(0, 30, (6, 4))
    where = torch.randint(0, 30, (4,))
    options: dict[str, Any] = dict(positions=where, position_weight=wide[:, 33:66])
    got = embedding(ids.t().contiguous().t()[::2], wide[:, :33], **options, backend="cpu")
    assert torch.equal(got, wide[:, :33][ids[::2]] + wide[:, 33:66][where])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4)])
def test_ids_of_any_shape(shape: tuple[int, ...], isa: str) -> None:
    ids, weight = torch.randint(0, 9, shape), torch.randn(9, 5)
    assert torch.equal(embedding(ids, weight, backend="cpu"), weight[ids])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("bad", "first"), [([1, 9, -2], 9), ([0, -1, 30], -1), ([2**62], 2**62)])
def test_an_id_outside_the_table_is_named(bad: list[int], first: int, backend: str) -> None:
    table = torch.zeros(9, 4)
    with pytest.raises(ValueError, match=rf"embedding: expected ids in \[0, 9\), got {first}$"):
        embedding(torch.tensor(bad), table, backend=backend)
    good = torch.zeros(len(bad), dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"embedding: expected positions in \[0, 9\), got {first}$"):
        embedding(good, table, positions=torch.tensor(bad), position_weight=table, backend=backend)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int32)}, r"expected ids of int64, got \(3,\) int32"),
        ({"weight": torch.zeros(9)}, r"expected weight \(V, C\) of floats, got \(9,\) float32"),
        ({"positions": None}, r"expected positions and position_weight together, got None and \(6, 4\) float32"),
        (
            {"position_weight": torch.zeros(6, 5)},
            r"expected position_weight \(P, 4\) like weight .*, got \(6, 5\) float32",
        ),
        (
            {"positions": torch.zeros(2, dtype=torch.int64)},
            r"positions that broadcast to ids \(3,\) int64, got \(2,\) int64",
        ),
    ],
)
def test_a_wrong_argument_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    zeros = torch.zeros(3, dtype=torch.int64)
    arguments: dict[str, Any] = {
        "ids": zeros, "weight": torch.zeros(9, 4), "positions": zeros, "position_weight": torch.zeros(6, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=sentence):
        embedding(**{**arguments, **change})
