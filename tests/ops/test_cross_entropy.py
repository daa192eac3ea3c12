"""What is special to losses over a vocabulary: their gradients, what they refuse, and the memory that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops.spec import STORAGE, Case, Op, double, tolerance

pytestmark = pytest.mark.skipif(reason_missing("cpu") is not None, reason="the CPU kernels are not built")

WANT = ("x", "logits", "weight", "bias", "x_p", "weight_p", "bias_p", "x_q", "weight_q", "bias_q")
GRADIENTS = ("linear_cross_entropy", "cross_entropy", "token_logprobs", "token_kl")


def gradient_cases() -> list[Any]:
    return [
        pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for op in (ops.pages()[name] for name in GRADIENTS)
        for case in op.cases()
        if "big" not in case.tags
        for dtype in STORAGE
    ]


def upstreams(op: Op, arguments: dict[str, Any]) -> list[Tensor]:
    """A gradient for each output."""
    generator = torch.Generator().manual_seed(1)
    results = op.reference(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    return [torch.randn(r.shape, generator=generator) for r in results]


def autograd(function: Any, arguments: dict[str, Any], given: list[Tensor]) -> dict[str, Tensor]:
    """The gradients of a function of the page by name."""
    mine = {
        k: v.clone().requires_grad_() if k in WANT and isinstance(v, Tensor) else v for k, v in arguments.items()
    }
    results = function(**mine)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [g.to(r.dtype) for g, r in zip(given, results)])
    return {
        k: v.grad if v.grad is not None else torch.zeros_like(v)
        for k, v in mine.items()
        if isinstance(v, Tensor) and v.requires_grad
    }


def by_kernel(op: Op, arguments: dict[str, Any], given: list[Tensor]) -> dict[str, Tensor]:
    """The same from the CPU backend's backward functions."""
    from gptfast.kernels.cpu import cross_entropy as losses
    from gptfast.kernels.cpu import token_logprobs as tokens

    mine = {name: p.default for name, p in _parameters(op).items() if name != "backend"} | arguments
    one = (True, True, mine.get("bias") is not None)
    if op.name == "cross_entropy":
        return {"logits": losses.cross_entropy_backward(given[0], **mine)}
    if op.name == "token_kl":
        wants = (True, True, mine["bias_p"] is not None, True, True, mine["bias_q"] is not None)
        made = tokens.token_kl_backward(given[0], wants, **mine)
        names = ("x_p", "weight_p", "bias_p", "x_q", "weight_q", "bias_q")
    else:
        names = ("x", "weight", "bias")
        if op.name == "token_logprobs":
            entropy = given[1] if mine.pop("return_entropy") else None
            made = tokens.token_logprobs_backward(given[0], entropy, one, **mine)
        else:
            upstream = given[0] if mine["reduction"] == "none" else None
            made = losses.linear_cross_entropy_gradients(one, upstream, **mine)[1:]
            if upstream is None:
                made = [None if g is None else g * given[0] for g in made]
    return {name: g.to(mine[name].dtype) for name, g in zip(names, made) if g is not None}


def _parameters(op: Op) -> Any:
    import inspect

    return inspect.signature(op.function).parameters


@pytest.mark.parametrize(("op", "case", "dtype"), gradient_cases())
def test_gradients(op: Op, case: Case, dtype: torch.dtype, isa: str) -> None:
    arguments = case.arguments(dtype)
    given = upstreams(op, arguments)
    exact = autograd(op.reference, double(arguments), given)
    plain = autograd(op.baseline, arguments, given)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = by_kernel(op, arguments, given)
        torch.set_num_threads(2)
        got = by_kernel(op, arguments, given)
    finally:
        torch.set_num_threads(threads)
    assert got.keys() == exact.keys()
    for name, wanted in exact.items():
        assert torch.equal(got[name], alone[name]), f"{name}: one thread and two differ"
        assert got[name].dtype == dtype and got[name].shape == wanted.shape
        error = (got[name].double() - wanted).abs()
        worst, limit = error.max().item() if error.numel() else 0.0, tolerance(plain[name], wanted)
        assert worst <= limit, f"{name}: max |error| {worst:.3g} > {limit:.3g}"


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_rows_gradient_depends_on_that_row_alone(dtype: torch.dtype, isa: str) -> None:
    from gptfast.kernels.cpu import cross_entropy as losses

    op = ops.pages()["linear_cross_entropy"]
    arguments = next(c for c in op.cases() if c.name.startswith("401")).arguments(dtype)
    mine = {n: p.default for n, p in _parameters(op).items() if n != "backend"} | arguments | {"reduction": "none"}
    upstream = torch.ones(401)
    whole = losses.linear_cross_entropy_gradients((True, False, False), upstream, **mine)[1]
    assert whole is not None
    for begin, end in ((0, 1), (200, 250), (399, 401)):
        some = mine | {name: mine[name][begin:end] for name in ("x", "target")}
        alone = losses.linear_cross_entropy_gradients((True, False, False), upstream[begin:end], **some)[1]
        assert alone is not None and torch.equal(alone, whole[begin:end])


def test_ignored_rows_may_hold_anything(isa: str) -> None:
    x, weight = torch.randn(5, 8), torch.randn(11, 8)
    target = torch.tensor([3, -1, 10, -1, 0])
    x[1], x[3] = torch.nan, torch.inf
    got = ops.linear_cross_entropy(x, weight, target, ignore_index=-1)
    wanted = ops.linear_cross_entropy(x[::2].contiguous(), weight, target[::2].contiguous())
    assert torch.equal(got, wanted)
    logits = x @ weight.T
    assert ops.cross_entropy(logits, target, ignore_index=-1, reduction="none")[1::2].eq(0).all()


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
