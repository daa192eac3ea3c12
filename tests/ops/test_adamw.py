"""What is special about adamw and gradient_norm: agreement with torch.optim over many steps, clipping, norms that
aren't finite, masters, autograd's version counters, errors at the door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gptfast.ops import adamw, gradient_norm
from gptfast.ops.spec import tolerance

State = dict[str, Any]  # lists of tensors by argument
SHAPES = ((64, 33), (33,), (), (5, 3000), (0, 4))


def state(seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> State:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator).to(dtype) for s in SHAPES]
    return {
        "params": params,
        "grads": [torch.randn(s, generator=generator).mul(scale).to(dtype) for s in SHAPES],
        "exp_avgs": [torch.zeros(s) for s in SHAPES],
        "exp_avg_sqs": [torch.zeros(s) for s in SHAPES],
        "steps": [torch.tensor(0.0) for _ in SHAPES],
    }


def copy(state: State) -> State:
    return {name: [t.clone() for t in tensors] for name, tensors in state.items()}


def equal(a: State, b: State) -> bool:
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name]))


def test_one_step_in_numpy(isa: str) -> None:
    """The formula at the top of the page, in fp64."""
    s = state()
    before = {name: [t.double().numpy() for t in tensors] for name, tensors in copy(s).items()}
    s["steps"] = [torch.tensor(4.0) for _ in SHAPES]
    adamw(**s, lr=0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, grad_scale=0.5, backend="cpu")
    for i, p in enumerate(s["params"]):
        g = 0.5 * before["grads"][i]
        m, v = 0.2 * g, 0.1 * g**2
        w = before["params"][i] * (1 - 0.01 * 0.1)
        w = w - 0.01 * (m / (1 - 0.8**5)) / (np.sqrt(v / (1 - 0.9**5)) + 1e-3)
        # the decay's constant, its product and the sum are rounded, and the step, 0.006, some eight times
        np.testing.assert_allclose(p.numpy(), w, rtol=4 * 2.0**-24, atol=2.0**-28)
        np.testing.assert_allclose(s["exp_avgs"][i].numpy(), m, rtol=3 * 2.0**-24, atol=0)
        np.testing.assert_allclose(s["exp_avg_sqs"][i].numpy(), v, rtol=4 * 2.0**-24, atol=0)
        assert s["steps"][i] == 5


def test_by_hand(isa: str) -> None:
    """p = 1, g = 2, first step: m / (1 - beta1) = 2, v / (1 - beta2) = 4, so p = 1 (1 - 0.1 * 0.5) - 0.1 * 2 / 2."""
    one: State = {name: [torch.tensor([x])] for name, x in (("params", 1.0), ("grads", 2.0), ("exp_avgs", 0.0))}
    adamw(
        **one, exp_avg_sqs=[torch.zeros(1)], steps=[torch.tensor(0.0)], lr=0.1, weight_decay=0.5, eps=0, backend="cpu"
    )
    assert abs(one["params"][0].item() - 0.85) <= 2.0**-24


def test_many_steps_stay_as_near_to_fp64_as_torch_does(isa: str) -> None:
    ours, exact = state(), copy(state())
    exact = {name: [t.double() for t in tensors] for name, tensors in exact.items()}
    theirs = [p.clone().requires_grad_() for p in ours["params"]]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    for step in range(30):
        grads = state(step)["grads"]
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        optimizer.step()
        adamw(**ours | {"grads": grads}, lr=0.01, backend="cpu")
        wide: State = exact | {"grads": [g.double() for g in grads]}
        adamw(**wide, lr=0.01)
    for a, b, e in zip(ours["params"], theirs, exact["params"]):
        if e.numel():
            assert (a.double() - e).abs().max() <= tolerance(b.detach(), e)


def test_a_list_is_its_tensors_one_by_one(isa: str) -> None:
    """No tensor's result depends on which others are there."""
    together, apart = state(), state()
    adamw(**together, backend="cpu")
    for i in range(len(SHAPES)):
        one: State = {name: [tensors[i]] for name, tensors in apart.items()}
        adamw(**one, backend="cpu")
    assert equal(together, apart)


def test_clipping_is_that_of_torch_and_leaves_the_gradients(isa: str) -> None:
    s, t = state(), state()
    for p, g in zip(t["params"], t["grads"]):
        p.grad = g
    wanted = torch.nn.utils.clip_grad_norm_(t["params"], 0.7)
    norm = adamw(**s, max_norm=0.7, backend="cpu")
    exact = np.sqrt(sum((g.double().numpy() ** 2).sum() for g in state()["grads"]))
    assert abs(norm.item() - exact) <= exact * 2.0**-24 and norm.dtype == torch.float32
    assert abs(wanted.item() - exact) <= exact * 2.0**-21
    clipped: State = t | {"grads": [p.grad for p in t["params"]]}
    adamw(**clipped, backend="cpu")
    assert all(torch.equal(a, b) for a, b in zip(s["grads"], state()["grads"]))
    for a, b in zip(s["exp_avgs"], t["exp_avgs"]):  # the coefficient is rounded elsewhere
        assert torch.allclose(a, b, rtol=2.0**-21, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_no_gradient_is_too_large_or_too_small_for_its_norm(scale: float, dtype: torch.dtype, isa: str) -> None:
    """Squares of 1e30 are infinite in fp32 and those of 1e-30 zero: torch's norm says so."""
    grads = [g.to(dtype) for g in state(scale=scale)["grads"]]
    exact = np.sqrt(sum((g.double().numpy() ** 2).sum() for g in grads))
    assert abs(gradient_norm(grads, backend="cpu").item() - exact) <= exact * 2.0**-24


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_that_are_not_finite(bad: float, backend: str) -> None:
    s = state()
    s["grads"][3][2, 7] = bad
    before = copy(s)
    skipped = adamw(**s, max_norm=1.0, nonfinite="skip", backend=backend)
    assert not skipped.isfinite() and all(equal({n: s[n]}, {n: before[n]}) for n in s if n != "grads")
    with pytest.raises(RuntimeError, match=f"norm is {bad}: nothing was updated"):
        adamw(**s, max_norm=1.0, nonfinite="raise", backend=backend)
    assert all(equal({n: s[n]}, {n: before[n]}) for n in s if n != "grads")
    adamw(**s, max_norm=1.0, backend=backend)
    assert s["params"][3].isnan().any() and s["steps"][0] == 1


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_scale_in_a_tensor_is_its_number(max_norm: float | None) -> None:
    ours, other = state(), state()
    norms = [
        adamw(**s, lr=0.01, grad_scale=scale, max_norm=max_norm)
        for s, scale in ((ours, 0.3), (other, torch.tensor(0.3, dtype=torch.float64)))
    ]
    assert equal(ours, other) and (norms[0] is norms[1] is None or torch.equal(*norms))


def test_an_infinite_max_norm_only_measures() -> None:
    s, t = state(scale=100.0), state(scale=100.0)
    norm = adamw(**s, max_norm=float("inf"))
    assert torch.equal(norm, gradient_norm(t["grads"]))
    adamw(**t)
    assert equal(s, t)


def test_a_master_keeps_what_16_bits_lose(isa: str) -> None:
    """Steps of 1e-4 from 1: bf16's next value below is 1 - 2^-8."""
    kept, lost = torch.ones(100, dtype=torch.bfloat16), torch.ones(100, dtype=torch.bfloat16)
    master = kept.float()
    rest: list[State] = [
        {"exp_avgs": [torch.zeros(100)], "exp_avg_sqs": [torch.zeros(100)], "steps": [torch.tensor(0.0)]}
        for _ in range(2)
    ]
    for _ in range(100):
        grads = [torch.ones(100)]
        adamw([kept], grads, **rest[0], lr=1e-4, weight_decay=0.0, masters=[master], backend="cpu")
        adamw([lost], grads, **rest[1], lr=1e-4, weight_decay=0.0, backend="cpu")
    assert torch.equal(kept, master.bfloat16()) and (master - 0.99).abs().max() < 1e-4
    assert torch.equal(lost, torch.ones(100, dtype=torch.bfloat16))


def test_gradients_that_lie_otherwise(isa: str) -> None:
    """A transposed gradient, and parameters transposed with their moments."""
    a, b = torch.randn(64, 48), torch.randn(64, 48)
    grad = torch.randn(48, 64).mT
    s, t = ([z.clone() for _ in range(2)] for z in (torch.zeros(64, 48), torch.zeros(48, 64).mT))
    b = a.mT.contiguous().mT
    adamw([a], [grad], s[:1], s[1:], [torch.tensor(0.0)], backend="cpu")
    adamw([b], [grad.contiguous()], t[:1], t[1:], [torch.tensor(0.0)], backend="cpu")
    assert torch.equal(a, b)
    gap = torch.randn(64, 48)[:, ::2]
    u: State = {"exp_avgs": [torch.zeros(64, 24)], "exp_avg_sqs": [torch.zeros(64, 24)], "steps": [torch.tensor(0.0)]}
    with pytest.raises(RuntimeError, match="without gaps"):
        adamw([gap], [gap], **u, backend="cpu")
    adamw([gap], [gap], **u)


def test_a_backward_through_what_was_overwritten_raises() -> None:
    w = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(8, requires_grad=True)
    y = (w @ x).sum()
    adamw([w], [torch.ones(8, 8)], [torch.zeros(8, 8)], [torch.zeros(8, 8)], [torch.tensor(0.0)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"params": []}, "expected params as a list of tensors, got none"),
        ({"grads": state()["grads"][:2]}, r"expected lists of one length, got \[5, 2"),
        (
            {"grads": state()["grads"][::-1]},
            r"a gradient like parameter 0, .*, or float32, got \(0, 4\)",
        ),
        ({"exp_avgs": [t.bfloat16() for t in state()["exp_avgs"]]}, "expected moments like parameter 0"),
        ({"steps": [torch.zeros(1) for _ in SHAPES]}, r"expected the steps of parameter 0 as \(\)"),
        ({"masters": [None, *state()["params"][:4]]}, "expected a master like parameter 1"),
        ({"betas": (0.9, 1.0)}, "expected betas in"),
        ({"max_norm": 0.0}, "expected max_norm > 0"),
        ({"nonfinite": "ignore"}, "expected nonfinite as one of"),
        ({"grad_scale": torch.ones(2)}, r"expected grad_scale as a number or \(\) of floats, got \(2,\) float32"),
    ],
)
def test_errors_at_the_door(change: dict[str, Any], match: str) -> None:
    s = state()
    before = copy(s)
    with pytest.raises(ValueError, match=match):
        adamw(**s | change)
    assert equal(s, before)


@pytest.mark.parametrize("call", [lambda: gradient_norm([]), lambda: gradient_norm([torch.arange(3)])])
def test_a_norm_wants_floats(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected grads"):
        call()
