"""Packed weights: no bit lost, and the values of quantised ones are the file's."""

from __future__ import annotations

import copy

import pytest
import torch

from gptfast import ops, quantize
from gptfast.formats import blocks
from gptfast.layers import Embedding, Linear
from gptfast.model import GPT, GPTConfig
from gptfast.quantize import KINDS, Memory, PackedWeight, QuantizedWeight


def random_blocks(N: int, K: int, kind: str) -> torch.Tensor:
    """Any bytes for the quants, finite scales."""
    k = KINDS[kind]
    raw = torch.randint(0, 256, (N * K // 32, k.block), dtype=torch.uint8)
    raw[:, : 2 * k.halves] = torch.randn(len(raw), k.halves).half().view(torch.uint8)
    return raw.reshape(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("N", "K"), [(1, 32), (16, 64), (40, 96), (127, 320)])
def test_packing_loses_nothing_and_values_are_the_files(kind: str, N: int, K: int) -> None:
    raw = random_blocks(N, K, kind)
    weight = QuantizedWeight.from_blocks(raw, kind, (N, K))
    assert torch.equal(weight.to_blocks(), raw)
    assert torch.equal(weight.dequantize(), blocks.dequantize(raw, KINDS[kind].format, (N, K)))
    assert weight.nbytes == -(-N // 16) * 16 * K // 32 * KINDS[kind].block


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(16,), (32, 16, 7), (16, 5, 16), (3, 3)])
def test_parts_are_stacked(kind: str, sizes: tuple[int, ...]) -> None:
    parts = [random_blocks(n, 96, kind) for n in sizes]
    shape = (sum(sizes), 96)
    found = QuantizedWeight.from_parts(parts, kind, shape)
    assert torch.equal(found.packed, QuantizedWeight.from_blocks(torch.cat(parts), kind, shape).packed)
    with pytest.raises(ValueError, match="expected"):
        QuantizedWeight.from_parts(parts, kind, (shape[0] + 16, 96))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(32, 16, 7), (20, 12, 16)], ids=["whole panels", "others"])
@pytest.mark.parametrize("kernel", [True, False])
def test_rows_in_pairs_are_put_in_order(
    kind: str, sizes: tuple[int, ...], kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(quantize, "reason_missing", lambda backend: "not here")
    parts, heads = [random_blocks(n, 96, kind) for n in sizes], (2, 1, 0)
    found = QuantizedWeight.from_parts(parts, kind, (sum(sizes), 96), heads=heads)
    expected = []
    for n, part, count in zip(sizes, parts, heads):
        rows, head = part.view(n, -1), n // count if count else 0
        order = [h * head + 2 * i + odd for h in range(count) for odd in (0, 1) for i in range(head // 2)]
        expected.append(rows[order] if count else rows)
    assert torch.equal(found.to_blocks(), torch.cat(expected).reshape(-1))
    assert all(torch.equal(blocks.permuted(e, h), p.view(len(e), -1)) for e, h, p in zip(expected, heads, parts) if h)


def test_what_lies_in_a_models_memory_is_packed_at_the_end() -> None:
    memory, raws = Memory(), [random_blocks(n, 96, "q8_0") for n in (48, 16, 5)]
    weights = [QuantizedWeight.from_blocks(raw, "q8_0", (len(raw) // 102, 96), memory=memory) for raw in raws]
    assert memory.pending == sum(map(len, raws))
    for weight in weights:
        weight.packed.fill_(7)
    memory.finish()
    assert memory.pending == 0 and all(torch.equal(w.to_blocks(), raw) for w, raw in zip(weights, raws))
    weights[0].packed.fill_(7)
    memory.finish()  # nothing is packed twice
    assert int(weights[0].packed.max()) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_the_one_on_the_page(kind: str) -> None:
    N, K = 20, 64
    raw = random_blocks(N, K, kind)
    packed, k = QuantizedWeight.from_blocks(raw, kind, (N, K)).packed, KINDS[kind]
    row, group, quad, e = 18, 1, 2, 3
    stored = raw.view(N, K // 32, k.block)[row, group]
    place = packed[row // 16, group]
    assert torch.equal(place[2 * (row % 16) :][:2], stored[:2])
    byte = place[32 * k.halves + 64 * quad + 4 * (row % 16) + e]
    assert byte == stored[2 * k.halves + 4 * quad + e] ^ (128 if kind == "q8_0" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [True, False])
def test_embed_gives_the_rows(kind: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = QuantizedWeight.from_blocks(random_blocks(37, 96, kind), kind, (37, 96))
    values = weight.dequantize()
    if not kernel:
        monkeypatch.setattr(QuantizedWeight, "_kernel", lambda self: False)
    ids = torch.tensor([[0, 36, 15], [16, 16, 3]])
    assert torch.equal(weight.embed(ids), values[ids])
    assert torch.equal(weight.dequantize(), values)
    assert weight.embed(ids[:0]).shape == (0, 3, 96)
    for bad in (-1, 37):
        with pytest.raises(IndexError, match=r"ids in 0\.\.36"):
            weight.embed(torch.tensor([bad]))


@pytest.mark.parametrize("sizes", [(16, 32, 5), (5, 16), (48,)])
def test_rows_and_cat(sizes: tuple[int, ...]) -> None:
    parts = [QuantizedWeight.quantize(torch.randn(n, 64), "q4_1") for n in sizes]
    whole = QuantizedWeight.cat(parts)
    assert torch.equal(whole.dequantize(), torch.cat([p.dequantize() for p in parts]))
    begin = 0
    for part in parts:
        again = whole.rows(begin, begin + part.shape[0])
        assert torch.equal(again.dequantize(), part.dequantize())
        assert torch.equal(again.to_blocks(), part.to_blocks())
        begin += part.shape[0]
    if whole.shape[0] > 16:
        assert whole.rows(16, 20).packed.data_ptr() == whole.packed[1].data_ptr()


def test_quantize_has_ggmls_meaning_and_copies_are_independent() -> None:
    x = torch.randn(20, 64)
    for kind, k in KINDS.items():
        weight = QuantizedWeight.quantize(x, kind)
        assert torch.equal(weight.to_blocks(), blocks.quantize(x, k.format))
        other = copy.deepcopy(weight)
        other.packed.zero_()
        assert (weight.packed != 0).any()
        assert other.shape == weight.shape


def test_wrong_sizes_are_told_what_was_expected() -> None:
    raw = random_blocks(4, 64, "q4_0")
    with pytest.raises(ValueError, match=r"expected 144 bytes .*got 143"):
        QuantizedWeight.from_blocks(raw[:-1], "q4_0", (4, 64))
    with pytest.raises(ValueError, match="multiple of 32"):
        QuantizedWeight.from_blocks(raw, "q4_0", (4, 65))
    with pytest.raises(ValueError, match="expected a kind"):
        QuantizedWeight.from_blocks(raw, "q2_k", (4, 64))
    with pytest.raises(ValueError, match=r"expected packed \(1, 2, 288\)"):
        QuantizedWeight(raw, "q4_0", (4, 64))
    with pytest.raises(ValueError, match="one kind and one K"):
        QuantizedWeight.cat([QuantizedWeight.quantize(torch.randn(4, 32), k) for k in ("q4_0", "q4_1")])
    with pytest.raises(ValueError, match="expected 0 <= begin"):
        QuantizedWeight.quantize(torch.randn(4, 32), "q4_0").rows(3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 33), (40, 577)])
def test_packed_floats_come_back_bit_for_bit(dtype: torch.dtype, N: int, K: int) -> None:
    weight = torch.randn(N, K).to(dtype)
    packed = PackedWeight.pack(weight)
    assert torch.equal(packed.unpack(), weight)
    assert packed.packed[(N - 1) // 16, K - 1, (N - 1) % 16] == weight[N - 1, K - 1]
    assert packed.nbytes == -(-N // 16) * 16 * K * weight.element_size()
    assert torch.equal(PackedWeight.pack(torch.cat((weight, weight), 1)[:, :K]).unpack(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 33), (40, 577)])
def test_rows_of_packed_floats_are_those_of_the_matrix(
    dtype: torch.dtype, N: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, table = torch.randn(N, K).to(dtype), torch.randn(5, K).to(dtype)
    packed, ids, positions = PackedWeight.pack(weight), torch.randint(N, (3, 7)), torch.randint(5, (7,))
    assert torch.equal(packed.embed(ids), weight[ids])
    expected = ops.embedding(ids, weight, positions=positions, position_weight=table)
    assert torch.equal(packed.embed(ids, positions, table), expected)
    monkeypatch.setattr(quantize, "reason_missing", lambda backend: "not here")
    assert torch.equal(packed.embed(ids), weight[ids])
    assert torch.equal(packed.embed(ids, positions, table), expected)
    with pytest.raises(IndexError, match=f"expected ids in 0..{N - 1}, got 0..{N}"):
        packed.embed(torch.tensor([0, N]))


def test_what_cannot_be_packed_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected a matrix \(N, K\) .*got \(3,\) float32"):
        PackedWeight.pack(torch.randn(3))
    with pytest.raises(ValueError, match=r"got .* float64"):
        PackedWeight.pack(torch.randn(3, 4).double())
    with pytest.raises(ValueError, match=r"expected packed \(2, 4, 16\).*got \(1, 4, 16\)"):
        PackedWeight(torch.zeros(1, 4, 16), (17, 4))


def test_a_models_weights_move_with_it() -> None:
    """Quantised ones as they are, packed ones as the parameters that they were."""

    def made() -> GPT:
        return GPT(GPTConfig("gpt2", n_layer=1, n_head=2, n_embd=32, vocab_size=48, context=16))

    quantised, packed = made(), made().pack()
    for module in quantised.modules():
        if isinstance(module, Linear | Embedding) and module is not quantised.positions:
            assert isinstance(module.weight, torch.Tensor)
            module.set_weight(QuantizedWeight.quantize(module.weight.detach(), "q4_1"))
    before = quantised.embedding.weight
    assert isinstance(before, QuantizedWeight)
    same = quantised.to(torch.bfloat16).embedding.weight
    assert isinstance(same, QuantizedWeight) and torch.equal(same.packed, before.packed)
    for model in (quantised.to("meta"), packed.to("meta")):
        weights = [module.weight for module in model.modules() if isinstance(module, Linear | Embedding)]
        assert weights and all(weight.device.type == "meta" for weight in weights)
    assert isinstance(packed.embedding.weight, torch.nn.Parameter) and packed.embedding.weight.shape == (48, 32)
