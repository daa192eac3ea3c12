"""What is special to the losses over a vocabulary: rows that don't count, infinities, upstream gradients, the door."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.kernels import reason_missing

pytestmark = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU kernels are not built")


def test_a_scaled_loss_keeps_small_gradients_of_fp16(isa: str) -> None:
    """Gradients of a mean that fp16 can't hold, until they are scaled by the upstream gradient."""
    x, weight, target = torch.randn(600, 8).half() * 0.02, torch.randn(50, 8).half() * 0.02, torch.arange(600) % 50
    x.requires_grad_()
    (ops.linear_cross_entropy(x, weight, target) * 2**16).backward()
    wide = x.detach().double().requires_grad_()
    (ops.linear_cross_entropy(wide, weight.double(), target) * 2**16).backward()
    assert x.grad is not None and wide.grad is not None
    assert (x.grad - wide.grad).abs().max() <= 2**-10 * wide.grad.abs().max()


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(reduction: str, factor: int) -> None:
    """Whatever became of the first ones."""
    x, weight = torch.randn(9, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    loss = ops.linear_cross_entropy(x, weight, torch.arange(9), reduction=reduction).sum() * factor
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(kept, second))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_of_the_gradients_later(dtype: torch.dtype) -> None:
    """A graph asked for x's gradient alone, then for the weight's, then for both by backward()."""
    x, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (9, 300))
    loss = ops.linear_cross_entropy(x, weight, torch.arange(9)) / 4
    (dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    (dweight,) = torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward()
    assert x.grad is not None and torch.equal(x.grad, dx)
    assert weight.grad is not None and torch.equal(weight.grad, dweight)
    x.grad = weight.grad = None
    (ops.linear_cross_entropy(x, weight, torch.arange(9)) / 4).backward()
    for grad, wanted in ((x.grad, dx), (weight.grad, dweight)):
        assert grad is not None and torch.equal(grad, wanted)


def test_gradients_of_gradients() -> None:
    """The forward pass made the gradients already; those of them still reach x."""
    x, weight, target = torch.randn(4, 8), torch.randn(30, 8), torch.arange(4)

    def second(dtype: torch.dtype) -> torch.Tensor:
        mine = x.to(dtype).requires_grad_()
        loss = ops.linear_cross_entropy(mine, weight.to(dtype), target)
        (first,) = torch.autograd.grad(loss, mine, create_graph=True)
        return torch.autograd.grad(first.square().sum(), mine)[0]

    assert torch.allclose(second(torch.float32).double(), second(torch.float64), rtol=1e-4, atol=1e-7)


def test_ignored_rows_may_hold_anything(isa: str) -> None:
    x, weight = torch.randn(5, 8), torch.randn(11, 8)
    target = torch.tensor([3, -1, 10, -1, 0])
    x[1], x[3] = torch.nan, torch.inf
    got = ops.linear_cross_entropy(x, weight, target, ignore_index=-1)
    wanted = ops.linear_cross_entropy(x[::2].contiguous(), weight, target[::2].contiguous())
    assert torch.equal(got, wanted)
    logits = x @ weight.T
    assert ops.cross_entropy(logits, target, ignore_index=-1, reduction="none")[1::2].eq(0).all()


@pytest.mark.parametrize("rows", [(0,), (3,), (2, 0)], ids=str)
def test_a_mean_of_no_rows_is_nan(rows: tuple[int, ...], isa: str) -> None:
    logits, target = torch.randn(*rows, 8, requires_grad=True), torch.full(rows, -100)
    loss = ops.cross_entropy(logits, target, backend="cpu")
    assert loss.isnan() and torch.autograd.grad(loss, logits)[0].eq(0).all()
    assert ops.cross_entropy(logits, target, reduction="sum") == 0
    assert ops.linear_cross_entropy(logits, torch.randn(11, 8), target).isnan()


def test_a_token_that_is_ruled_out(isa: str) -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(300, 8), torch.zeros(300)
    bias[250:] = -torch.inf
    target = torch.tensor([0, 260, 249])
    loss = ops.linear_cross_entropy(x, weight, target, bias=bias, reduction="none")
    assert loss[1] == torch.inf and loss[::2].isfinite().all()
    logprobs, entropy = ops.token_logprobs(x, weight, target, bias=bias, return_entropy=True)
    assert logprobs[1] == -torch.inf and entropy.isfinite().all()
    assert (ops.token_kl(x, weight, x, weight, bias_q=bias) == torch.inf).all()
    assert ops.token_kl(x, weight, x, weight, bias_p=bias).isfinite().all()


def test_a_nan_stays_one(isa: str) -> None:
    x, weight = torch.randn(3, 8), torch.randn(300, 8)
    x[1, 2] = torch.nan
    loss = ops.linear_cross_entropy(x, weight, torch.zeros(3, dtype=torch.long), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]


def test_the_door() -> None:
    x, weight, target = torch.randn(4, 8), torch.randn(11, 8), torch.tensor([0, 1, 2, 10])
    ce, kl = ops.linear_cross_entropy, ops.token_kl
    for call, message in (
        (lambda: ce(x, weight, target + 1), "targets 0 to 10, or -100"),
        (lambda: ops.cross_entropy(x, target), "targets 0 to 7, or -100"),
        (lambda: ops.token_logprobs(x, weight, target - 1), "got -1"),
        (lambda: ce(x, weight[:, :7], target), "expected x"),
        (lambda: ce(x, weight.double(), target), "weight's dtype"),
        (lambda: ce(x, weight, target[:3]), "expected target"),
        (lambda: ce(x, weight, target.float()), "integers"),
        (lambda: ce(x, weight, target, bias=x[0]), "expected bias"),
        (lambda: ce(x, weight, target, class_weight=x[0]), "expected class_weight"),
        (lambda: ce(x, weight, target, label_smoothing=1.5), "label_smoothing from 0 to 1"),
        (lambda: ce(x, weight, target, z_loss=-1.0), "z_loss"),
        (lambda: ce(x, weight, target, softcap=-1.0), "softcap"),
        (lambda: ce(x, weight, target, reduction="max"), "reduction"),
        (lambda: ops.token_logprobs(x, weight, target, temperature=0.0), "temperature > 0"),
        (lambda: kl(x, weight, x[:3], weight), "as many rows"),
        (lambda: kl(x, weight, x, weight[:5]), "as many rows and tokens"),
        (lambda: kl(x, weight, x, weight, mask=target), "mask"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_nan_shows_in_the_loss(isa: str, softcap: float) -> None:
    """Capped or not: a model that has diverged must not look healthy."""
    target = torch.tensor([1])
    assert ops.cross_entropy(torch.tensor([[torch.nan, 1.0, 2.0]]), target, softcap=softcap, backend="cpu").isnan()
    x = torch.tensor([[torch.nan, 1.0]])
    assert ops.linear_cross_entropy(x, torch.randn(3, 2), target, softcap=softcap, backend="cpu").isnan()
