"""What is special to attention: the same bits however a sequence is cut, packed or stored, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast.kernels import reason_missing
from gptfast.ops import BackendError, attention, attention_kvcache, explain
from gptfast.ops.attention import reference, reference_kvcache
from gptfast.ops.attention_cases import baseline
from gptfast.ops.spec import double, tolerance

pytestmark = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU extension is not built")
H, HK, D = 6, 2, 40


def isas() -> list[str]:
    if reason_missing("cpu") is not None:
        return []
    from gptfast import _cpu

    return _cpu.isas()


@pytest.fixture(params=isas())
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    from gptfast import _cpu

    before = _cpu.isa()
    _cpu.use_isa(request.param)
    yield
    _cpu.use_isa(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(B: int, Sq: int, Sk: int, dtype: torch.dtype = torch.float32, d: int = D) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(B, Sq, H, d, seed=1, dtype=dtype),
        randn(B, Sk, HK, d, seed=2, dtype=dtype),
        randn(B, Sk, HK, d, seed=3, dtype=dtype),
    )


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def fresh_cache(B: int, room: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Empty caches, full of NaN: a slot that is read before it is written is seen. Of int8 the scales are."""
    fill = 7 if dtype == torch.int8 else torch.nan
    return torch.full((B, room, HK, D), fill, dtype=dtype), torch.full((B, room, HK, D), fill, dtype=dtype)


def fresh_scales(B: int, room: int) -> dict[str, Tensor]:
    return {name: torch.full((B, room, HK), torch.nan) for name in ("k_scale", "v_scale")}


def rounded(x: Tensor, kept: torch.dtype) -> Tensor:
    """x as a cache of this dtype gives it back."""
    if kept != torch.int8:
        return x.to(kept).float()
    most = x.abs().amax(-1, keepdim=True)
    return (x * (torch.full_like(most, 127) / most)).round() * (most / 127)


def through_cache(
    q: Tensor, k: Tensor, v: Tensor, step: int, kept: torch.dtype | None = None, **terms: Any
) -> tuple[Tensor, Tensor]:
    """A sequence (B = 1) appended to a cache (of dtype `kept`) and attended to, `step` tokens at a time."""
    k_cache, v_cache = fresh_cache(1, q.shape[1] + 3, kept or q.dtype)
    if kept == torch.int8:
        terms |= fresh_scales(1, q.shape[1] + 3)
    outs, lses = [], []
    for at in range(0, q.shape[1], step):
        part = slice(at, at + step)
        out, lse = attention_kvcache(q[:, part], k_cache, v_cache, ints(at), k=k[:, part], v=v[:, part],
                                     return_lse=True, backend="cpu", **terms)  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def cached(q: Tensor, caches: list[Tensor], lengths: Tensor, **terms: Any) -> Tensor:
    return attention_kvcache(q, caches[0], caches[1], lengths, backend="cpu", **terms)


def tables(room: int, half: int) -> dict[str, Any]:
    angle = torch.arange(room)[:, None] * 100.0 ** (-torch.arange(half) / half)
    return {"cos": angle.cos(), "sin": angle.sin()}


TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (37, 0)},
    "softcap-sinks": {"softcap": 3.0, "sinks": randn(H, seed=7)},
    "alibi": {"alibi_slopes": randn(H, seed=8).abs()},
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_chunks_and_decode_have_the_same_bits(
    isa: None, two_threads: None, name: str, dtype: torch.dtype
) -> None:
    S, terms = 301, TERMS[name]
    q, k, v = qkv(1, S, S, dtype)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cpu", **terms)
    for step in (S, 7, 1):
        mine, my_lse = through_cache(q, k, v, step, **terms)
        assert torch.equal(mine, out), step
        assert torch.equal(my_lse, lse), step


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.int8])
def test_a_smaller_cache_is_seen_rounded_in_prefill_and_decode(
    isa: None, two_threads: None, name: str, kept: torch.dtype
) -> None:
    S, terms = 301, TERMS[name]
    q, k, v = qkv(1, S, S)
    out, lse = attention(q, rounded(k, kept), rounded(v, kept), causal=True, return_lse=True, backend="cpu", **terms)
    for step in (S, 7, 1):
        mine, my_lse = through_cache(q, k, v, step, kept, **terms)
        assert torch.equal(mine, out), step
        assert torch.equal(my_lse, lse), step


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_prefill_and_decode_have_the_same_bits(isa: None, two_threads: None, interleaved: bool) -> None:
    S = 150
    q, k, v = qkv(1, S, S, torch.bfloat16)
    terms = {**tables(S, 12), "interleaved": interleaved}
    whole, _ = through_cache(q, k, v, S, **terms)
    assert torch.equal(through_cache(q, k, v, 1, **terms)[0], whole)
    assert torch.equal(through_cache(q, k, v, 11, **terms)[0], whole)


@pytest.mark.parametrize("window", [(-1, -1), (300, 0)])
def test_more_keys_than_are_kept_packed_have_the_same_bits(
    isa: None, two_threads: None, window: tuple[int, int]
) -> None:
    """A head's packed keys and values are kept from strip to strip up to 4 MiB: 2,048 of 256 dims."""
    q, k, v = (randn(1, 2100, 1, 256, seed=s) for s in (1, 2, 3))
    whole = attention(q, k, v, causal=True, window=window, backend="cpu")
    for S in (500, 1700):
        part = attention(*(t[:, :S] for t in (q, k, v)), causal=True, window=window, backend="cpu")
        assert torch.equal(part, whole[:, :S]), S


def test_a_decoding_row_depends_on_itself_alone(isa: None) -> None:
    """Batch 8 with ragged lengths against each row alone; one thread against two."""
    lengths, room = [0, 3, 127, 128, 129, 400, 255, 640], 700
    q, k, v = qkv(8, 1, 1)
    caches = [randn(8, room, HK, D, seed=s) for s in (5, 6)]

    def run(rows: slice, threads: int) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            mine = [c[rows].clone() for c in caches]
            return cached(q[rows], mine, ints(*lengths)[rows], k=k[rows], v=v[rows])
        finally:
            torch.set_num_threads(before)

    whole = run(slice(None), 2)
    assert torch.equal(whole, run(slice(None), 1))
    for b in range(8):
        for threads in (1, 2):
            assert torch.equal(whole[b : b + 1], run(slice(b, b + 1), threads)), (b, threads)


@pytest.mark.parametrize("page", [1, 13, 16, 208])
def test_paged_and_contiguous_have_the_same_bits(isa: None, two_threads: None, page: int) -> None:
    lengths, Sq, room = ints(20, 131), 4, 208
    q, k, v = qkv(2, Sq, Sq)
    dense = [randn(2, room, HK, D, seed=s) for s in (5, 6)]
    n = room // page
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(1)).view(2, n)
    pages = [torch.full((2 * n, page, HK, D), torch.nan) for _ in dense]
    for to, source in zip(pages, dense):
        to[order.flatten()] = source.view(2 * n, page, HK, D)
    used = torch.arange(n) * page < lengths[:, None] + Sq
    table = torch.where(used, order, -1).to(torch.int32)
    wanted = cached(q, dense, lengths, k=k, v=v)
    assert torch.equal(cached(q, pages, lengths, k=k, v=v, block_table=table), wanted)
    for to, source in zip(pages, dense):
        assert torch.equal(to[order.flatten()].view(2, room, HK, D), source)


@pytest.mark.parametrize("Sq", [1, 4, 40])
@pytest.mark.parametrize("page", [1, 13, 16])
def test_paged_int8_has_the_same_bits(isa: None, two_threads: None, page: int, Sq: int) -> None:
    lengths, room, n = ints(20, 131), 208, 208 // page
    q, k, v = qkv(2, Sq, Sq)
    dense, scales = list(fresh_cache(2, room, torch.int8)), fresh_scales(2, room)
    for t in scales.values():
        t[0, :20], t[1, :131] = 0.01, 0.02
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(1)).view(2, n)

    def paged(t: Tensor) -> Tensor:
        pages = torch.empty(2 * n, page, *t.shape[2:], dtype=t.dtype)
        pages[order.flatten()] = t.view(2 * n, page, *t.shape[2:])
        return pages

    pages, page_scales = [paged(t) for t in dense], {name: paged(t) for name, t in scales.items()}
    wanted = cached(q, dense, lengths, k=k, v=v, **scales)
    mine = cached(q, pages, lengths, k=k, v=v, block_table=order.to(torch.int32), **page_scales)
    assert torch.equal(mine, wanted) and wanted.isfinite().all()
    for to, source in zip((*pages, *page_scales.values()), (*dense, *scales.values())):
        back = to[order.flatten()].view(source.shape)
        assert torch.equal(back.nan_to_num(), source.nan_to_num())


def test_int8_keeps_zeros_and_says_what_is_not_finite(isa: None) -> None:
    q, k, v = qkv(1, 4, 4)
    k[0, 0], k[0, 1, 0, 3], v[0, 2, 1, 5], v[0, 3] = 0, torch.inf, torch.nan, 1e-37
    caches, scales = fresh_cache(1, 6, torch.int8), fresh_scales(1, 6)
    cached(q, list(caches), ints(0), k=k, v=v, **scales)
    assert (caches[0][0, 0] == 0).all() and (scales["k_scale"][0, 0] == 0).all()
    assert (caches[1][0, 3] == 0).all() and (scales["v_scale"][0, 3] == 0).all()
    assert scales["k_scale"][0, 1].isnan().tolist() == [True, False]
    assert scales["v_scale"][0, 2].isnan().tolist() == [False, True]
    assert (caches[0][0, 1, 1].abs().max(), caches[0][0, 4, 0, 0]) == (127, 7)


def test_leftpad_and_cache_rows_have_the_same_bits(isa: None, two_threads: None) -> None:
    q, k, v = qkv(2, 2, 2)
    caches = [randn(2, 300, HK, D, seed=s) for s in (5, 6)]
    wanted = cached(q, [c.clone() for c in caches], ints(140, 20), k=k, v=v)
    padded = [torch.cat([torch.full((2, 9, HK, D), torch.nan), c], 1) for c in caches]
    mine = cached(q, padded, ints(149, 29), k=k, v=v, cache_leftpad=ints(9, 9))
    assert torch.equal(mine, wanted)
    swapped = [torch.cat([c.flip(0), c], 0) for c in caches]
    mine = cached(q, swapped, ints(140, 20), k=k, v=v, cache_batch_idx=ints(1, 0))
    assert torch.equal(mine, wanted)


def test_sequences_end_to_end_equal_each_alone(isa: None, two_threads: None) -> None:
    lengths_q, lengths_k = [3, 0, 1, 140, 60], [5, 4, 300, 140, 20]
    q, k, v = qkv(1, sum(lengths_q), sum(lengths_k))
    edges = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)]
    slopes = randn(5, H, seed=4).abs()
    out, lse = attention(q[0], k[0], v[0], cu_seqlens_q=edges[0], cu_seqlens_k=edges[1], causal=True,
                         alibi_slopes=slopes, return_lse=True, backend="cpu")  # fmt: skip
    for n in range(5):
        mine, keys = slice(*edges[0][n : n + 2].tolist()), slice(*edges[1][n : n + 2].tolist())
        one, one_lse = attention(q[:, mine], k[:, keys], v[:, keys], causal=True, alibi_slopes=slopes[n],
                                 return_lse=True, backend="cpu")  # fmt: skip
        assert torch.equal(out[mine], one[0])
        assert torch.equal(lse[:, mine], one_lse[0])


def test_views_need_no_copy_and_change_nothing(isa: None, two_threads: None) -> None:
    fused = randn(2, 70, H + 2 * HK, D)
    views = fused.split([H, HK, HK], 2)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in views]
    wanted = attention(*(t.contiguous() for t in views), causal=True, backend="cpu")
    assert torch.equal(attention(*views, causal=True, backend="cpu"), wanted)
    assert torch.equal(attention(*swapped, causal=True, backend="cpu"), wanted)
    caches = [torch.full((2, 80, 2 * HK, D), torch.nan) for _ in "kv"]
    mine = attention_kvcache(views[0], caches[0][:, 5:77, :HK], caches[1][:, 5:77, HK:], ints(0, 0), k=views[1],
                             v=views[2], backend="cpu")  # fmt: skip
    assert torch.equal(mine, wanted)
    assert caches[0][:, :5].isnan().all() and caches[0][:, 75:].isnan().all() and caches[0][:, :, HK:].isnan().all()


@pytest.mark.parametrize("Sq", [1, 2, 30])
def test_mask_and_bias_broadcast_through_strides(isa: None, two_threads: None, Sq: int) -> None:
    q, k, v = qkv(2, Sq, 200)
    mask, bias = randn(2, 1, 1, 200) > -0.5, randn(H, 1, 200, seed=9)
    whole: dict[str, Any] = {
        "mask": mask.expand(2, H, Sq, 200).contiguous(),
        "bias": bias.expand(2, H, Sq, 200).contiguous(),
    }
    turned: dict[str, Any] = {"mask": whole["mask"].transpose(2, 3).contiguous().transpose(2, 3),
              "bias": whole["bias"].transpose(2, 3).contiguous().transpose(2, 3)}  # fmt: skip
    wanted = attention(q, k, v, **whole, backend="cpu")
    assert torch.equal(attention(q, k, v, mask=mask, bias=bias, backend="cpu"), wanted)
    assert torch.equal(attention(q, k, v, **turned, backend="cpu"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_huge_logits(isa: None, two_threads: None, dtype: torch.dtype) -> None:
    q, k, v = qkv(1, 40, 300, dtype)
    arguments: dict[str, Any] = dict(q=q * 60, k=k * 60, v=v, causal=True)  # logits up to 1e5
    exact = reference(**double(arguments))
    assert isinstance(exact, Tensor)
    got = attention(**arguments, backend="cpu").double()
    assert not got.isnan().any()
    plain = baseline(**arguments)
    assert isinstance(plain, Tensor)
    assert (got - exact).abs().max() <= tolerance(plain, exact)


@pytest.mark.parametrize("Sq", [1, 30])
def test_logits_beyond_any_sense_still_pick_the_largest(isa: None, two_threads: None, Sq: int) -> None:
    """Logits of 1e12: the weight of the largest is 1 exactly."""
    q, k, v = qkv(1, Sq, 300)
    out = attention(q * 1e6, k * 1e6, v, backend="cpu")
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.repeat_interleave(H // HK, 2).double())
    best = scores.argmax(-1)[0]  # (H, Sq)
    wanted = torch.stack([v[0, best[h], h // (H // HK)] for h in range(H)], 1)
    assert torch.equal(out[0], wanted)


def test_an_empty_row_gives_zero_and_its_sink(isa: None, two_threads: None) -> None:
    q, k, v = qkv(1, 9, 4)
    out, lse = attention(q, k, v, causal=True, return_lse=True, backend="cpu")
    assert (out[:, :5] == 0).all() and (lse[..., :5] == -torch.inf).all() and lse[..., 5:].isfinite().all()
    sinks = randn(H, seed=5)
    out, lse = attention(q, k, v, causal=True, sinks=sinks, return_lse=True, backend="cpu")
    assert (out[:, :5] == 0).all()
    torch.testing.assert_close(lse[0, :, :5], sinks[:, None].expand(H, 5), rtol=2e-7, atol=2e-7)
    out, lse = attention(q, k, v, mask=torch.zeros(9, 4, dtype=torch.bool), return_lse=True, backend="cpu")
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_nothing_beyond_a_sequence_is_read(isa: None, two_threads: None) -> None:
    q, k, v = qkv(2, 3, 3)
    k_cache, v_cache = fresh_cache(2, 300)
    k_cache[:, :130], v_cache[:, :130] = randn(2, 130, HK, D, seed=5), randn(2, 130, HK, D, seed=6)
    lengths = ints(130, 17)
    k_cache[1, 17:], v_cache[1, 17:] = torch.nan, torch.nan
    before = lengths.clone()
    assert attention_kvcache(q, k_cache, v_cache, lengths, k=k, v=v, backend="cpu").isfinite().all()
    assert torch.equal(lengths, before)
    assert k_cache[0, 133:].isnan().all() and k_cache[1, 20:].isnan().all()


@pytest.mark.parametrize("paged", [False, True])
def test_a_recorded_call_follows_lengths_up_to_the_capacity(
    isa: None, two_threads: None, monkeypatch: pytest.MonkeyPatch, paged: bool
) -> None:
    from gptfast import _cpu

    kept, empty = [], torch.empty  # a plan owns no memory
    monkeypatch.setattr(torch, "empty", lambda *size, **kwargs: kept.append(t := empty(*size, **kwargs)) or t)
    page, n = 16, 40
    table = torch.randperm(2 * n, generator=torch.Generator().manual_seed(1)).view(2, n).to(torch.int32)
    caches = [torch.full((2 * n, page, HK, D) if paged else (2, n * page, HK, D), torch.nan) for _ in "kv"]
    q, k, v = qkv(2, 1, 1)
    lengths, launches = ints(0, 0), []
    terms: dict[str, Any] = {"k": k, "v": v, "block_table": table if paged else None}
    _cpu.record(launches)
    out = cached(q, caches, lengths, **terms)
    _cpu.record(None)
    plan = _cpu.Plan(launches)
    for step, (first, second) in enumerate([(1, 1), (2, 127), (3, 128), (4, 129), (130, 400), (400, 639)]):
        for c, seed in zip(caches, (5, 6)):
            c.copy_(randn(*c.shape, seed=seed + step))
        lengths.copy_(ints(first, second))
        plan.run(2)
        assert torch.equal(out, cached(q, [c.clone() for c in caches], lengths.clone(), **terms)), (first, second)


def test_dropout_keeps_what_the_counter_says() -> None:
    q, k, v = qkv(1, 20, 30)
    arguments: dict[str, Any] = dict(causal=True, dropout_p=0.4, seed=3)
    out, lse = attention(q, k, v, return_lse=True, **arguments)
    assert torch.equal(out, attention(q, k, v, **arguments))
    assert not torch.equal(out, attention(q, k, v, stream=1, **arguments))
    assert torch.equal(lse, attention(q, k, v, causal=True, return_lse=True)[1])
    q, k, v = qkv(1, 3, 8)
    many = torch.stack([attention(q, k, v, dropout_p=0.4, seed=s) for s in range(200)]).double()
    error = (many.mean(0) - reference(q, k, v)).abs() / (many.std(0) / 200**0.5)
    assert error.max() < 6  # 720 means of 200 draws: 6 sigma is a chance of 1e-5
    q, k, v = qkv(1, 20, 30)
    packed = attention(q[0], k[0], v[0], cu_seqlens_q=ints(0, 20), cu_seqlens_k=ints(0, 30), **arguments)
    assert torch.equal(packed, out[0])


def test_reference_kvcache_equals_reference() -> None:
    S = 50
    q, k, v = (t.double() for t in qkv(1, S, S))
    caches = [torch.full((1, S, HK, D), torch.nan, dtype=torch.float64) for _ in "kv"]
    wanted = reference(q, k, v, causal=True)
    got = reference_kvcache(q, caches[0], caches[1], ints(0), k=k, v=v)
    assert torch.equal(got, wanted) and torch.equal(caches[0], k) and torch.equal(caches[1], v)


def bad(**changes: Any) -> Callable[[], Any]:
    q, k, v = qkv(2, 4, 9)
    return lambda: attention(**{"q": q, "k": k, "v": v, **changes})


INT8 = torch.zeros(2, 16, HK, D, dtype=torch.int8)


def bad_cache(**changes: Any) -> Callable[[], Any]:
    q, k, v = qkv(2, 4, 4)
    caches = dict(zip(("k_cache", "v_cache"), fresh_cache(2, 16)))
    return lambda: attention_kvcache(**{"q": q, **caches, "lengths": ints(3, 0), "k": k, "v": v, **changes})


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (bad(q=randn(4, H, D)), r"expected q \(B, S, H, D\) of floats, got \(4, 6, 40\) float32"),
    "heads": (bad(q=randn(2, 4, 5, D)), "multiple of the KV heads, got D = 40, 5 and 2 heads"),
    "dtype": (bad(k=randn(2, 9, HK, D).half()), r"expected k .* got \(2, 9, 2, 40\) float16"),
    "v": (bad(v=randn(2, 8, HK, D)), r"expected v like k \(2, 9, 2, 40\) float32, got \(2, 8, 2, 40\)"),
    "window": (bad(window=(3, -2)), r"each >= -1, got \(3, -2\)"),
    "softcap": (bad(softcap=-1.0), "softcap >= 0, got -1.0"),
    "slopes": (bad(alibi_slopes=randn(3)), r"alibi_slopes \(6,\) or \(2, 6\) of floats, got \(3,\) float32"),
    "sinks": (bad(sinks=randn(2)), r"sinks \(6,\) of floats, got \(2,\) float32"),
    "mask dtype": (bad(mask=randn(4, 9)), r"expected mask torch.bool .* got \(4, 9\) float32"),
    "bias": (bad(bias=randn(3, 9)), r"expected bias .* broadcasting to \(2, 6, 4, 9\), got \(3, 9\)"),
    "dropout": (bad(dropout_p=1.0), "0 <= dropout_p < 1, got 1.0"),
    "varlen": (bad(cu_seqlens_k=ints(0, 9)), "expected cu_seqlens_q with cu_seqlens_k, got None"),
    "edges": (
        lambda: attention(randn(4, H, D), randn(9, HK, D), randn(9, HK, D), cu_seqlens_q=ints(0, 3),
                          cu_seqlens_k=ints(0, 9)),
        r"cu_seqlens_q rising from 0 to 4, got \[0, 3\]",
    ),
    "backend": (bad(backend="gpu"), "backend='gpu': expected one of"),
    "overflow": (bad_cache(lengths=ints(3, 13)), r"lengths 0 to 12 \(16 slots, 4 new tokens\), got \[3, 13\]"),
    "negative": (bad_cache(lengths=ints(-1, 3)), r"lengths 0 to 12 .* got \[-1, 3\]"),
    "lengths": (bad_cache(lengths=torch.tensor([1, 2])), r"expected lengths \(2,\) int32, got \(2,\) int64"),
    "activations": (
        bad_cache(activations="int8"),
        r"activations 'exact' or 'rounded' with caches of \(2, 16, 2, 40\) float32, got 'int8'",
    ),
    "k alone": (bad_cache(v=None), "expected k and v, or neither, got one of them"),
    "k shape": (bad_cache(k=randn(2, 3, HK, D)), r"expected k and v \(2, 4, 2, 40\) .* got \(2, 3, 2, 40\)"),
    "rows": (bad_cache(lengths=ints(1, 2), q=randn(2, 4, H, 8)), r"k_cache \(B, Smax, Hk, 8\)"),
    "no scales": (
        bad_cache(k_cache=INT8, v_cache=INT8),
        r"expected k_scale \(2, 16, 2\) float32 with int8 caches, got None",
    ),
    "scales": (
        bad_cache(v_scale=randn(2, 16, HK)),
        r"no v_scale with caches of \(2, 16, 2, 40\) float32, got \(2, 16, 2\)",
    ),
    "int16": (bad_cache(k_cache=INT8.short()), "of floats or int8, got .* int16"),
    "pages": (bad_cache(block_table=ints(0, 7).view(2, 1)), "pages 0 to 1 in block_table, got 7"),
    "no page": (bad_cache(block_table=ints(0, -1).view(2, 1)), "pages 0 to 1 in block_table, got -1"),
    "twice": (bad_cache(cache_batch_idx=ints(1, 1)), r"cache_batch_idx 0 to 1, each once, got \[1, 1\]"),
    "leftpad": (bad_cache(cache_leftpad=ints(4, 0)), r"cache_leftpad 0 to lengths \[3, 0\], got \[4, 0\]"),
    "cos": (bad_cache(**tables(5, 20)), r"cos and sin \(at least 7, at most 20\) float32"),
    "sin": (bad_cache(cos=tables(9, 20)["cos"]), "expected cos and sin, or neither"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_gets_one_sentence(name: str) -> None:
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_overflow_writes_nothing() -> None:
    q, k, v = qkv(2, 4, 4)
    k_cache, v_cache = fresh_cache(2, 16)
    with pytest.raises(ValueError, match="16 slots"):
        attention_kvcache(q, k_cache, v_cache, ints(0, 13), k=k, v=v)
    assert k_cache.isnan().all() and v_cache.isnan().all()


def test_what_the_kernel_declines_has_a_reason() -> None:
    q, k, v = qkv(1, 3, 3, d=257)
    assert "heads of up to 256 dimensions, not 257" in str(explain(attention, q, k, v))
    with pytest.raises(BackendError, match="up to 256 dimensions"):
        attention(q, k, v, backend="cpu")
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="reference"))
    half = [t.half() for t in qkv(1, 1, 8)]
    mixed = half[0], *(t.float() for t in half[1:]), ints(8)
    assert "with float32 queries only, not float16 with float32" in str(explain(attention_kvcache, *mixed))
    q, k, v = qkv(1, 3, 3)
    slopes = torch.ones(H, requires_grad=True)
    assert "alibi_slopes require a gradient" in str(explain(attention, q, k, v, alibi_slopes=slopes))
    assert attention(q, k, v, alibi_slopes=slopes).requires_grad
    caches = [t.requires_grad_() for t in qkv(1, 1, 8)]
    assert "no backward yet" in str(explain(attention_kvcache, *caches, ints(8)))


@pytest.mark.parametrize("name", ["scale", "softcap", "causal", "window"])
def test_a_tensor_in_a_numbers_place_is_refused(name: str) -> None:
    """A call is known again by its signature, which says nothing of what a tensor holds."""
    q = torch.randn(1, 4, 2, 16)
    given: Any = {name: (torch.tensor(1), -1) if name == "window" else torch.tensor(1.0)}
    for needs_gradient in (False, True):
        x = q.clone().requires_grad_(needs_gradient)
        with pytest.raises(ValueError, match=f"attention: expected {name} as a plain number, got a tensor"):
            attention(x, x, x, **given)
    with pytest.raises(ValueError, match=f"attention_kvcache: expected {name} as a plain number, got a tensor"):
        attention_kvcache(q, q.clone(), q.clone(), torch.tensor([4], dtype=torch.int32), **given)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("length", [3, 60])
def test_nan_shows_in_its_row_alone(isa: str, softcap: float, length: int) -> None:
    """In out and in the log-sum-exp, capped or not: a model that has diverged must not look healthy."""
    q, k = (torch.randn(1, length, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(2))
    q[0, 1] = torch.nan
    out, lse = attention(q, k, k, softcap=softcap, return_lse=True, backend="cpu")
    there = torch.arange(length) == 1
    assert torch.equal(out[0].isnan().all((1, 2)), there) and torch.equal(out[0].isnan().any(2).any(1), there)
    assert torch.equal(lse[0].isnan().all(0), there) and torch.equal(lse[0].isnan().any(0), there)
