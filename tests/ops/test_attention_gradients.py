"""What is special to attention's gradients; all variants are in the cases of its page (test_gradients.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast.kernels import reason_missing
from gptfast.ops import attention
from gptfast.ops.attention import reference
from gptfast.ops.spec import tolerance
from tests.ops.test_attention import HK, D, H, ints, isa, qkv, randn  # noqa: F401  (isa is a fixture)

pytestmark = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU extension is not built")


def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **terms: Any) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return list(torch.autograd.grad(attention(*leaves, backend="cpu", **terms), leaves, dout))


def test_sequences_end_to_end_have_the_gradients_of_each_alone(isa: None) -> None:  # noqa: F811
    lengths_q, lengths_k = [3, 0, 1, 140, 60], [5, 4, 300, 140, 20]
    q, k, v = qkv(1, sum(lengths_q), sum(lengths_k))
    dout, slopes = randn(*q.shape, seed=5), randn(5, H, seed=4).abs()
    edges = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)]
    whole = gradients(q[0], k[0], v[0], dout[0], cu_seqlens_q=edges[0], cu_seqlens_k=edges[1], causal=True,
                      alibi_slopes=slopes)  # fmt: skip
    for n in range(5):
        mine, keys = slice(*edges[0][n : n + 2].tolist()), slice(*edges[1][n : n + 2].tolist())
        alone = gradients(q[:, mine], k[:, keys], v[:, keys], dout[:, mine], causal=True, alibi_slopes=slopes[n])
        for whole_of, one, rows in zip(whole, alone, (mine, keys, keys)):
            assert torch.equal(whole_of[rows], one[0])


def test_views_and_strided_gradients_have_the_same_bits(isa: None) -> None:  # noqa: F811
    fused = randn(2, 70, H + 2 * HK, D)
    q, k, v = fused.split([H, HK, HK], 2)
    dout = randn(2, H, 70, D, seed=6).transpose(1, 2)
    views = gradients(q, k, v, dout, causal=True)
    copies = gradients(q.contiguous(), k.contiguous(), v.contiguous(), dout.contiguous(), causal=True)
    assert all(torch.equal(a, b) for a, b in zip(views, copies))
    fanned = gradients(q, k, v, torch.ones(()).expand(q.shape), causal=True)
    assert all(torch.equal(a, b) for a, b in zip(fanned, gradients(q, k, v, torch.ones(q.shape), causal=True)))


def test_rows_that_attend_to_nothing_get_zeros(isa: None) -> None:  # noqa: F811
    q, k, v = qkv(1, 130, 60)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = attention(*leaves, causal=True, return_lse=True, backend="cpu")
    dq, dk, dv = torch.autograd.grad((out, lse), leaves, (randn(*out.shape, seed=7), randn(*lse.shape, seed=8)))
    assert dq[:, :70].eq(0).all() and dq[:, 70:].ne(0).any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))


DRAWS = 8  # PyTorch's error in the six numbers of one, which makes the tolerance, is a matter of luck


def bias_and_sinks(
    function: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, wide: bool = False, **more: Any
) -> list[Tensor]:
    """The gradients of the bias and of the sinks in each draw."""
    found: list[list[Tensor]] = []
    for draw in range(DRAWS):
        q, k, v = (randn(*t.shape, seed=100 * draw + n).to(dtype) for n, t in enumerate(qkv(2, 60, 130)))
        given = {"bias": randn(*shape, seed=9 + draw).to(dtype), "sinks": randn(H, seed=31 + draw)}
        dout = randn(*q.shape, seed=50 + draw).to(dtype)
        leaves = {n: (t.double() if wide else t.clone()).requires_grad_() for n, t in given.items()}
        out: Any = function(*(t.double() if wide else t for t in (q, k, v)), **leaves, softcap=5.0, **more)
        found.append(list(torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))))
    return [torch.stack(column) for column in zip(*found)]


@cache
def of_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """In the dtype and in fp64: the same for each instruction set."""
    return bias_and_sinks(reference, shape, dtype), bias_and_sinks(reference, shape, dtype, wide=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, H, 60, 130), (2, 1, 1, 130), (1, H, 60, 1), (60, 130)])
def test_bias_and_sinks_get_their_gradients_from_the_kernel(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    isa: None,  # noqa: F811
) -> None:
    kernel = bias_and_sinks(attention, shape, dtype, backend="cpu")
    for name, got, plain, exact in zip(("bias", "sinks"), kernel, *of_the_reference(shape, dtype), strict=True):
        assert (got.double() - exact).abs().max().item() <= tolerance(plain, exact), name


def test_the_seed_may_be_a_tensor() -> None:
    q, k, v = qkv(1, 20, 30)
    dout = randn(*q.shape, seed=11)
    terms: dict[str, Any] = {"dropout_p": 0.3, "stream": 2}
    number, tensor = (gradients(q, k, v, dout, seed=s, **terms) for s in (2**33 + 5, torch.tensor(2**33 + 5)))
    assert all(torch.equal(a, b) for a, b in zip(number, tensor))
    packed = gradients(q[0], k[0], v[0], dout[0], cu_seqlens_q=ints(0, 20), cu_seqlens_k=ints(0, 30), seed=2**33 + 5,
                       **terms)  # fmt: skip
    assert all(torch.equal(a, b[0]) for a, b in zip(packed, number))


def test_compiled_whole() -> None:
    """One graph for a varlen call with dropout, forward and backward."""
    q, k, v = [t[0] for t in qkv(1, 40, 50)]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    terms: dict[str, Any] = dict(cu_seqlens_q=ints(0, 30, 40), cu_seqlens_k=ints(0, 20, 50), dropout_p=0.2, seed=5)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, **terms)

    dout = randn(*q.shape, seed=12)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), leaves, [dout])
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients(q, k, v, dout, causal=True, **terms)))
