"""The preference losses against formulas written again in NumPy, numbers worked out by hand, and their edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gptfast.ops import dpo_loss, kto_loss, orpo_loss, reward_loss, simpo_loss

Array = Any


def log_sigmoid(x: Array) -> Array:
    return -np.logaddexp(0.0, -x)


def sigmoid(x: Array) -> Array:
    return np.exp(log_sigmoid(x))


def numbers(seed: int, n: int = 50, scale: float = 5.0, shift: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, n))


def same(got: torch.Tensor, wanted: Array) -> None:
    """fp64 against fp64: a few roundings of values up to 1e3."""
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-12, atol=1e-12)


def test_reward_loss_is_its_formula() -> None:
    c, r, m = numbers(1), numbers(2), numbers(3).abs()
    wanted = -log_sigmoid(c.numpy() - r.numpy() - m.numpy()) + 0.01 * (c.numpy() + r.numpy()) ** 2
    same(reward_loss(c, r, margin=m, centring=0.01, reduction="none"), wanted)
    same(reward_loss(c, r, margin=m, centring=0.01), wanted.mean())
    same(reward_loss(c, r, reduction="none"), -log_sigmoid(c.numpy() - r.numpy()))


DPO: dict[str, Callable[[Array, float, float], Array]] = {
    "sigmoid": lambda d, b, e: -(1 - e) * log_sigmoid(b * d) - e * log_sigmoid(-b * d),
    "robust": lambda d, b, e: (-(1 - e) * log_sigmoid(b * d) + e * log_sigmoid(-b * d)) / (1 - 2 * e),
    "ipo": lambda d, b, e: (d - 0.5 / b) ** 2,
    "hinge": lambda d, b, e: np.maximum(0, 1 - b * d),
}


@pytest.mark.parametrize("kind", DPO)
def test_dpo_loss_is_its_formula(kind: str) -> None:
    c, r, rc, rr = (numbers(i, shift=-40) for i in range(4))
    e = 0.15 if kind in ("sigmoid", "robust") else 0.0
    loss, better, worse = dpo_loss(c, r, rc, rr, beta=0.3, kind=kind, label_smoothing=e, reduction="none")
    d = ((c - rc) - (r - rr)).numpy()
    same(loss, DPO[kind](d, 0.3, e))
    same(better, 0.3 * (c - rc).numpy())
    same(worse, 0.3 * (r - rr).numpy())
    same(dpo_loss(c, r, rc, rr, beta=0.3, kind=kind, label_smoothing=e)[0], DPO[kind](d, 0.3, e).mean())


def test_without_a_reference_dpo_takes_zeros() -> None:
    c, r = numbers(1), numbers(2)
    for got, wanted in zip(dpo_loss(c, r), dpo_loss(c, r, torch.zeros_like(c), torch.zeros_like(r))):
        assert torch.equal(got, wanted)


def test_the_other_losses_are_their_formulas() -> None:
    c, r = -numbers(1, scale=1).abs() - 0.01, -numbers(2, scale=1).abs() - 0.01
    p, q = np.exp(c.numpy()), np.exp(r.numpy())
    same(simpo_loss(c, r, beta=2.5, gamma=0.7)[0], -log_sigmoid(2.5 * (c.numpy() - r.numpy()) - 0.7).mean())
    odds = np.log(p / (1 - p)) - np.log(q / (1 - q))
    np.testing.assert_allclose(orpo_loss(c, r, reduction="none").numpy(), -log_sigmoid(odds), rtol=1e-10)

    policy, reference, kl = numbers(3), numbers(4), numbers(5, n=20, shift=1)
    good = numbers(6) > 0
    loss, rewards = kto_loss(policy, reference, good, kl=kl, beta=0.2, undesirable_weight=1.3, reduction="none")
    a, z = (policy - reference).numpy(), max(0.0, kl.numpy().mean())
    same(loss, np.where(good.numpy(), 1 - sigmoid(0.2 * (a - z)), 1.3 * (1 - sigmoid(0.2 * (z - a)))))
    same(rewards, 0.2 * a)
    same(kto_loss(policy, reference, good, kl=kl - 100)[0], kto_loss(policy, reference, good)[0].numpy())  # z >= 0


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (lambda: reward_loss(*one(2, 1), margin=one(0.5)[0]), 0.4740769841801067),  # log(1 + e^-0.5)
        (lambda: reward_loss(*one(2, 1), centring=0.1), 0.3132616875182228 + 0.9),
        (lambda: dpo_loss(*one(-10, -12, -11, -11))[0], 0.598138869381592),  # d = 2, log(1 + e^-0.2)
        (lambda: dpo_loss(*one(-10, -12, -11, -11), kind="ipo")[0], 9.0),  # (2 - 5)^2
        (lambda: dpo_loss(*one(-10, -12, -11, -11), kind="hinge")[0], 0.8),
        (lambda: dpo_loss(*one(-10, -12, -11, -11), label_smoothing=0.25)[0], 0.648138869381592),  # + 0.25 h
        # 3/4 and 1/4 of log(1 + e^-0.2) and of that + 0.2, apart, over 1/2
        (lambda: dpo_loss(*one(-10, -12, -11, -11), kind="robust", label_smoothing=0.25)[0], 0.498138869381592),
        (lambda: simpo_loss(*one(-1, -2))[0], 0.3132616875182228),  # h = 2 - 1
        (lambda: orpo_loss(*one(np.log(0.5), np.log(0.25))), -np.log(0.75)),  # odds 1 and 1/3
        # 1 / (1 + e^0.05), 1 / (1 + e^0.15)
        (lambda: kto_loss(*one(-1, -2), desirable=torch.tensor([True]), kl=one(0.5)[0])[0], 0.48750260351578967),
        (lambda: kto_loss(*one(-2, -1), desirable=torch.tensor([False]), kl=one(0.5)[0])[0], 0.46257015465625045),
    ],
)  # fmt: skip
def test_by_hand(loss: Callable[[], torch.Tensor], by_hand: float) -> None:
    same(loss(), by_hand)


def test_gradients() -> None:
    c, r, rc, rr = (numbers(i, 6, scale=1.0, shift=-2).requires_grad_(i < 2) for i in range(4))
    good = torch.tensor([True, False, True, True, False, False])
    for kind, e in (("sigmoid", 0.1), ("robust", 0.1), ("ipo", 0.0), ("hinge", 0.0)):

        def dpo(c: Any, r: Any, kind: str = kind, e: float = e) -> Any:
            return dpo_loss(c, r, rc, rr, kind=kind, label_smoothing=e)[0]

        assert torch.autograd.gradcheck(dpo, (c, r))
    assert torch.autograd.gradcheck(lambda c, r: reward_loss(c, r, margin=rc.abs(), centring=0.1), (c, r))
    assert torch.autograd.gradcheck(lambda c, r: simpo_loss(c, r)[0], (c, r))
    below = [(-t.detach().abs() - 0.01).requires_grad_() for t in (c, r)]
    assert torch.autograd.gradcheck(lambda c, r: orpo_loss(c, r), below)
    assert torch.autograd.gradcheck(lambda c: kto_loss(c, rc, good, kl=rr)[0], (c,))


def test_nothing_overflows_and_rewards_carry_no_gradient() -> None:
    c, r = torch.tensor([-1e4, 3e4, 0.0], requires_grad=True), torch.tensor([2e4, -1e4, 0.0])
    loss, better, worse = dpo_loss(c, r, beta=1.0, reduction="none")
    assert loss.isfinite().all() and not better.requires_grad and not worse.requires_grad
    loss.sum().backward()
    assert c.grad is not None and torch.equal(c.grad, torch.tensor([-1.0, 0.0, -0.5]))
    # p near 1 and near 0: 1 - p cancels, or p vanishes beside 1
    edge = torch.tensor([-1e-6, -90.0], requires_grad=True)
    orpo_loss(edge, torch.tensor([-1.0, -1.0])).backward()
    assert edge.grad is not None and edge.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_a_rejected_answer_of_probability_zero(kind: str) -> None:
    """log sigmoid(h) of an infinite h is 0, and what isn't smoothed adds nothing."""
    c = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _, _ = dpo_loss(c, torch.tensor([-torch.inf, -2.0]), kind=kind, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, math.log(2)]))
    (grad,) = torch.autograd.grad(loss.sum(), c)
    torch.testing.assert_close(grad, torch.tensor([0.0, -0.05]))


def test_kl_gets_no_gradient() -> None:
    kl = torch.tensor([1.0, 2.0], requires_grad=True)
    policy = torch.zeros(2, requires_grad=True)
    kto_loss(policy, torch.zeros(2), torch.tensor([True, False]), kl=kl)[0].backward()
    assert kl.grad is None and policy.grad is not None


def test_losses_of_16_bits_are_fp32() -> None:
    c = torch.randn(8, dtype=torch.bfloat16)
    assert dpo_loss(c, c)[0].dtype == torch.float32 and orpo_loss(-c.abs(), -c.abs()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: dpo_loss(x, x[:-1]), r"expected rejected like chosen \(4,\) float32, got \(3,\)"),
        (lambda x: dpo_loss(x[None], x[None]), r"expected chosen \(N\)"),
        (lambda x: dpo_loss(x, x, kind="dpo"), "expected kind as one of sigmoid"),
        (lambda x: dpo_loss(x, x, kind="ipo", label_smoothing=0.1), "label_smoothing"),
        (lambda x: dpo_loss(x, x, label_smoothing=0.5), "label_smoothing"),
        (lambda x: dpo_loss(x, x, beta=0.0), "expected beta > 0"),
        (lambda x: reward_loss(x, x, reduction="sum"), "expected reduction"),
        (lambda x: reward_loss(x, x, margin=x[:2]), "expected margin like chosen"),
        (lambda x: kto_loss(x, None, x > 0), "expected reference_logprobs like logprobs"),  # pyright: ignore[reportArgumentType]
        (lambda x: kto_loss(x, x, x), "expected desirable"),
        (lambda x: kto_loss(x, x, x > 0, kl=x[:0]), r"expected kl \(M\)"),
    ],
)
def test_errors_at_the_door(call: Callable[[torch.Tensor], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(4))
