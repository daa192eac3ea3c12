"""compat.flash_attn against the formula, and against PyTorch's SDPA where that has a word for it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import ops
from gptfast.compat import flash_attn
from gptfast.ops.attention import reference
from gptfast.ops.spec import tolerance

# flash-attn 2's own, in order; a star stands where a default begins.
SIGNATURES = {
    "flash_attn_func": "q k v *dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    "flash_attn_qkvpacked_func": "qkv *dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    "flash_attn_kvpacked_func": "q kv *dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic "
    "return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k *dropout_p softmax_scale "
    "causal window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    "flash_attn_with_kvcache": "q k_cache v_cache *k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_and_their_order(name: str) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    required, optional = ([w for w in part.split()] for part in SIGNATURES[name].split("*"))
    assert [p.name for p in parameters] == required + optional
    assert [p.name for p in parameters if p.default is p.empty] == required


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(got: Tensor, *inputs: Tensor, **terms: Any) -> None:
    """Within tolerance of the page's reference in fp64, PyTorch's own error being that of the reference in fp32."""
    wanted = reference(*(t.double() for t in inputs), **terms)
    plain = reference(*inputs, **terms)
    assert (got.double() - wanted).abs().max() <= tolerance(plain, wanted)


TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(causal=True),
    "scaled": dict(causal=True, softmax_scale=0.2),
    "window": dict(window_size=(3, 1)),
    "softcap": dict(softcap=2.0),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.1]), causal=True),
}


def as_op(terms: dict[str, Any]) -> dict[str, Any]:
    names = {"softmax_scale": "scale", "window_size": "window"}
    return {names.get(k, k): v for k, v in terms.items()}


@pytest.mark.parametrize("name", TERMS)
def test_dense(name: str) -> None:
    q, k, v = randn(2, 9, 4, 16), randn(2, 13, 2, 16), randn(2, 13, 2, 16, seed=1)
    check(flash_attn.flash_attn_func(q, k, v, **TERMS[name]), q, k, v, **as_op(TERMS[name]))
    kv = torch.stack([k, v], 2)
    check(flash_attn.flash_attn_kvpacked_func(q, kv, **TERMS[name]), q, k, v, **as_op(TERMS[name]))
    qkv = randn(2, 9, 3, 4, 16)
    check(flash_attn.flash_attn_qkvpacked_func(qkv, **TERMS[name]), *qkv.unbind(2), **as_op(TERMS[name]))


def test_like_sdpa() -> None:
    q, k, v = (randn(2, 11, 4, 16, seed=i) for i in range(3))
    out, lse, dropped = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    torch.testing.assert_close(lse, s.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf).logsumexp(-1))
    assert lse.dtype == torch.float32 and dropped.numel() == 0


def test_a_query_without_keys_gives_zero() -> None:
    q, k = randn(1, 5, 2, 8), randn(1, 3, 2, 8)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out[:, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all()


@pytest.mark.parametrize("name", TERMS)
def test_varlen(name: str) -> None:
    edges_q, edges_k = (torch.tensor(e, dtype=torch.int32) for e in ([0, 5, 5, 12], [0, 7, 9, 20]))
    q, k, v = randn(12, 4, 16), randn(20, 2, 16), randn(20, 2, 16, seed=1)
    given = dict(cu_seqlens_q=edges_q, cu_seqlens_k=edges_k)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, edges_q, edges_k, 7, 11, return_attn_probs=True, **TERMS[name]
    )
    check(out, q, k, v, **given, **as_op(TERMS[name]))
    assert lse.shape == (4, 12)
    kv = torch.stack([k, v], 1)
    again = flash_attn.flash_attn_varlen_kvpacked_func(q, kv, edges_q, edges_k, 7, 11, **TERMS[name])
    assert torch.equal(again, out)
    packed = randn(12, 3, 4, 16)
    alone = flash_attn.flash_attn_varlen_qkvpacked_func(packed, edges_q, 7, **TERMS[name])
    check(alone, *packed.unbind(1), cu_seqlens_q=edges_q, cu_seqlens_k=edges_q, **as_op(TERMS[name]))


def test_varlen_in_pages() -> None:
    edges_q, edges_k = (torch.tensor(e, dtype=torch.int32) for e in ([0, 3, 5], [0, 9, 14]))
    pages_k, pages_v = randn(6, 4, 2, 8), randn(6, 4, 2, 8, seed=1)
    table = torch.tensor([[5, 0, 3], [2, 1, -1]], dtype=torch.int32)
    q = randn(5, 4, 8)
    out = flash_attn.flash_attn_varlen_func(q, pages_k, pages_v, edges_q, edges_k, 3, 9, causal=True, block_table=table)
    k, v = (torch.cat([t[[5, 0, 3]].flatten(0, 1)[:9], t[[2, 1]].flatten(0, 1)[:5]]) for t in (pages_k, pages_v))
    check(out, q, k, v, cu_seqlens_q=edges_q, cu_seqlens_k=edges_k, causal=True)


def test_dropout_and_what_it_dropped() -> None:
    q, k, v = (randn(2, 11, 4, 16, seed=i) for i in range(3))
    torch.manual_seed(0)
    out, _, signed = flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    assert signed.shape == (2, 4, 11, 11) and (signed < 0).any() and (signed > 0).any()
    again = torch.einsum("bhqk,bkhd->bqhd", signed.clamp(min=0) / 0.7, v)
    torch.testing.assert_close(out, again)
    torch.testing.assert_close(signed.abs().sum(-1), torch.ones(2, 4, 11))
    torch.manual_seed(0)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, 0.3, causal=True), out)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v, 0.3, causal=True), out)


def test_gradients() -> None:
    given: Any = [randn(2, 7, 2, 8, seed=i).requires_grad_() for i in range(3)]
    flash_attn.flash_attn_func(*given, causal=True).square().sum().backward()
    grads = [t.grad for t in given]
    heads = [t.detach().clone().requires_grad_() for t in given]
    q, k, v = (t.transpose(1, 2) for t in heads)
    F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum().backward()
    torch.testing.assert_close(grads, [t.grad for t in heads])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rotary", [None, True, False], ids=["plain", "interleaved", "halves"])
def test_kvcache(rotary: bool | None, causal: bool) -> None:
    """Three new tokens in caches of 4 and 9: as the formula has it on what is in the cache then."""
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    q, k, v = randn(2, 3, 4, 8), randn(2, 3, 2, 8), randn(2, 3, 2, 8, seed=1)
    cache_k, cache_v = randn(2, 16, 2, 8), randn(2, 16, 2, 8, seed=1)
    angles = torch.outer(torch.arange(16.0), torch.tensor([1.0, 0.3, 0.1]))
    turn: dict[str, Any] = {} if rotary is None else dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())
    before = cache_k.clone()
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, cache_k, cache_v, k, v, **turn, cache_seqlens=lengths, causal=causal, rotary_interleaved=bool(rotary),
        return_softmax_lse=True,
    )  # fmt: skip
    for b, n in enumerate(lengths.tolist()):
        mine, new = q[b : b + 1], k[b : b + 1]
        if rotary is not None:
            there = torch.arange(n, n + 3) if causal else torch.full((3,), n)
            mine = ops.rope(mine, new, angles[there].cos(), angles[there].sin(), interleaved=rotary)[0]
            new = ops.rope(mine, new, angles[n : n + 3].cos(), angles[n : n + 3].sin(), interleaved=rotary)[1]
        assert torch.equal(cache_k[b, :n], before[b, :n]) and torch.equal(cache_k[b, n : n + 3], new[0])
        assert torch.equal(cache_v[b, n : n + 3], v[b])
        check(out[b : b + 1], mine, cache_k[b : b + 1, : n + 3], cache_v[b : b + 1, : n + 3], causal=causal)
    assert lse.shape == (2, 4, 3)


def test_kvcache_without_new_tokens() -> None:
    q, cache = randn(2, 1, 4, 8), randn(2, 16, 2, 8)
    whole = flash_attn.flash_attn_with_kvcache(q, cache, cache)
    check(whole, q, cache, cache)
    assert torch.equal(flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=16), whole)
    with pytest.raises(ValueError, match="expected k and v with rotary_cos"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, rotary_cos=cache, rotary_sin=cache)
    with pytest.raises(ValueError, match="expected k of q's length 1, got 2"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, randn(2, 2, 2, 8), randn(2, 2, 2, 8))


def test_kvcache_with_rows_to_spare() -> None:
    """Without cache_batch_idx q's rows have the caches' first ones; the others stay as they are."""
    q, k, v = randn(2, 1, 4, 8), randn(2, 1, 2, 8), randn(2, 1, 2, 8, seed=1)
    large, lengths = randn(5, 16, 2, 8), torch.tensor([4, 9], dtype=torch.int32)
    cache_k, cache_v = large.clone(), large.clone()
    small_k, small_v = large[:2].clone(), large[:2].clone()
    out = flash_attn.flash_attn_with_kvcache(q, cache_k, cache_v, k, v, cache_seqlens=lengths)
    assert torch.equal(out, flash_attn.flash_attn_with_kvcache(q, small_k, small_v, k, v, cache_seqlens=lengths))
    assert torch.equal(cache_k, torch.cat([small_k, large[2:]]))
    assert torch.equal(cache_v, torch.cat([small_v, large[2:]]))
