"""The policy losses and advantages against loops written again in NumPy, against numbers worked out by hand, and what
masks, clipping and statistics promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gptfast.ops import dpo_loss, gae, group_advantages, kl_estimate, policy_loss, value_loss, whiten

Array = Any


def draw(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape))


def a_mask(seed: int, B: int, T: int) -> torch.Tensor:
    keep = np.random.default_rng(seed).random((B, T)) < 0.7
    keep[:, 0] = False
    keep[0] = False  # a row without tokens
    return torch.from_numpy(keep)


def same(got: torch.Tensor, wanted: Array) -> None:
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-11, atol=1e-12)


def oracle_policy(
    arrays: list[Array], low: float, high: float, beta: float, kind: str, rows: bool
) -> tuple[float, list[Any]]:
    """Token by token."""
    p, old, A, keep, ref = arrays
    total, count, clipped, approx, B = 0.0, 0, 0, 0.0, len(p)
    ratios: list[float] = []
    divergences: list[float] = []
    for b in range(B):
        row, n = 0.0, 0
        for t in range(p.shape[1]):
            if not keep[b, t]:
                continue
            x = min(20.0, max(-20.0, p[b, t] - old[b, t]))
            rho = math.exp(x)
            plain, clamped = -A[b, t] * rho, -A[b, t] * min(1 + high, max(1 - low, rho))
            k = p[b, t] - ref[b, t]
            kl = {"k1": k, "k2": k * k / 2, "k3": math.exp(-k) - 1 + k}[kind]
            row, n = row + max(plain, clamped) + beta * kl, n + 1
            clipped += clamped > plain
            approx += rho - 1 - x
            ratios.append(rho)
            divergences.append(kl)
        total, count = total + (row / max(n, 1) if rows else row), count + n
    loss = total / (B if rows else count)
    return loss, [clipped / count, approx / count, np.mean(ratios), np.var(ratios), np.mean(divergences)]


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("normalise", ["tokens", "sequences"])
def test_policy_loss_is_its_formula(kind: str, normalise: str) -> None:
    B, T = 5, 23
    old, A, keep = draw(1, B, T), draw(2, B, T), a_mask(3, B, T)
    p, ref = old + draw(4, B, T, scale=0.3), old + draw(5, B, T, scale=0.5)
    got = policy_loss(p, old, A, keep, clip=0.1, clip_high=0.3, reference_logprobs=ref, beta=0.2, kl=kind,
                      normalise=normalise)  # fmt: skip
    arrays: list[Array] = [x.numpy() for x in (p, old, A, keep, ref)]
    wanted, statistics = oracle_policy(arrays, 0.1, 0.3, 0.2, kind, normalise == "sequences")
    same(got.loss, wanted)
    same(torch.stack(got[1:]), statistics)
    same(policy_loss(p, old, A, keep, denominator=7.0).loss * 7 / keep.sum(), policy_loss(p, old, A, keep).loss.numpy())


def test_value_loss_is_its_formula() -> None:
    B, T = 4, 19
    old, R, keep = draw(1, B, T), draw(2, B, T), a_mask(3, B, T)
    V = old + draw(4, B, T, scale=0.4)
    total, clipped = 0.0, 0
    for v, o, r in zip(V[keep].tolist(), old[keep].tolist(), R[keep].tolist()):
        near = min(o + 0.2, max(o - 0.2, v))
        total, clipped = total + 0.5 * max((v - r) ** 2, (near - r) ** 2), clipped + ((near - r) ** 2 > (v - r) ** 2)
    got = value_loss(V, old, R, keep)
    same(got.loss, total / keep.sum().item())
    same(got.clip_fraction, clipped / keep.sum().item())


def test_gae_is_its_definition() -> None:
    """A_t as the sum of (gamma lam)^l delta_{t + l} over the tokens that are left when the others are taken out."""
    r, V, keep, gamma, lam = draw(1, 6, 31), draw(2, 6, 31), a_mask(3, 6, 31), 0.97, 0.9
    advantages, returns = gae(r, V, keep, gamma=gamma, lam=lam)
    for b in range(6):
        at = np.flatnonzero(keep[b].numpy())
        rb, vb = r[b].numpy()[at], np.append(V[b].numpy()[at], 0.0)
        delta = rb + gamma * vb[1:] - vb[:-1]
        wanted = [sum((gamma * lam) ** l * d for l, d in enumerate(delta[i:])) for i in range(len(at))]
        same(advantages[b][keep[b]], wanted)
        same(returns[b][keep[b]], np.array(wanted) + vb[:-1])
    assert not advantages[~keep].any() and not returns[~keep].any()


def test_with_lam_1_returns_are_the_discounted_rewards() -> None:
    r, V = draw(1, 3, 12), draw(2, 3, 12)
    discounted = sum(r[:, l] * 0.9**l for l in range(12))
    same(gae(r, V, gamma=0.9, lam=1.0)[1][:, 0], discounted.numpy())  # pyright: ignore


def test_group_advantages_are_their_formulas() -> None:
    r = draw(1, 24)
    g = r.numpy().reshape(-1, 8)
    mean, std = g.mean(1, keepdims=True), g.std(1, keepdims=True, ddof=1)
    same(group_advantages(r, 8), ((g - mean) / (std + 1e-4)).ravel())
    same(group_advantages(r, 8, kind="dr_grpo"), (g - mean).ravel())
    same(group_advantages(r, 8, kind="rloo"), (g - (g.sum(1, keepdims=True) - g) / 7).ravel())
    assert not group_advantages(r, 1).any() and not group_advantages(torch.ones(8), 8).any()


def test_whiten_is_its_formula() -> None:
    x, keep = draw(1, 5, 17) * 3 + 2, a_mask(2, 5, 17)
    kept = x[keep].numpy()
    wanted = (kept - kept.mean()) / np.sqrt(kept.var() + 1e-8)
    same(whiten(x, keep)[keep], wanted)
    same(whiten(x, keep, shift_mean=False)[keep], wanted + kept.mean())
    assert not whiten(x, keep, shift_mean=False)[~keep].any()
    same(whiten(x), ((x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-8)).numpy())


def test_kl_estimates() -> None:
    p, q = draw(1, 100), draw(2, 100)
    k = (p - q).numpy()
    for kind, wanted in (("k1", k), ("k2", k**2 / 2), ("k3", np.exp(-k) - 1 + k)):
        same(kl_estimate(p, q, kind=kind), wanted)
    near = torch.full((1,), 1e-9, dtype=torch.float64)
    assert kl_estimate(near, near * 0).item() == pytest.approx(0.5e-18, abs=1e-24)  # expm1: nothing cancels twice


def test_by_hand() -> None:
    """Ratios 2, 1/2, 1 and advantages 1, -1, 3, clip 0.2: -min(2, 1.2), -min(-1/2, -0.8), -3."""
    p, A = torch.tensor([[math.log(2), -math.log(2), 0.0]], dtype=torch.float64), torch.tensor([[1.0, -1.0, 3.0]])
    got = policy_loss(p, torch.zeros_like(p), A.double())
    same(got.loss, (-1.2 + 0.8 - 3) / 3)
    same(got.clip_fraction, 2 / 3)
    same(got.ratio_mean, 3.5 / 3)
    same(got.ratio_var, ((2 - 3.5 / 3) ** 2 + (0.5 - 3.5 / 3) ** 2 + (1 - 3.5 / 3) ** 2) / 3)
    same(got.approx_kl, ((1 - math.log(2)) + (-0.5 + math.log(2))) / 3)

    V, old, R = (torch.tensor([[x]], dtype=torch.float64) for x in (1.0, 0.0, 2.0))
    got = value_loss(V, old, R)  # (1 - 2)^2 and (0.2 - 2)^2
    same(got.loss, 0.5 * 1.8**2)
    same(got.clip_fraction, 1.0)

    # delta = 0.5 - 2 = -1.5 last, 1 + 2 - 1 = 2 first; A = 2 + 0.95 * -1.5
    advantages, returns = gae(torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[1.0, 2.0]]).double())
    same(advantages, [[2 - 1.425, -1.5]])
    same(returns, [[1.575, 0.5]])
    same(group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]).double(), 4, kind="rloo"), [2 / 3, -2 / 3, -2 / 3, 2 / 3])
    same(whiten(torch.tensor([1.0, 3.0]).double()), np.array([-1, 1]) / math.sqrt(1 + 1e-8))


def test_gradients() -> None:
    old, A, keep = draw(1, 3, 7), draw(2, 3, 7), a_mask(3, 3, 7)
    p, ref = (old + draw(4, 3, 7, scale=0.3)).requires_grad_(), old + draw(5, 3, 7, scale=0.5)
    for kind in ("k1", "k2", "k3"):
        for normalise in ("tokens", "sequences"):

            def policy(p: Any, kind: str = kind, normalise: str = normalise) -> Any:
                return policy_loss(p, old, A, keep, reference_logprobs=ref, beta=0.3, kl=kind, normalise=normalise).loss

            assert torch.autograd.gradcheck(policy, (p,))
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, A, keep).loss, (p,))
    assert torch.autograd.gradcheck(lambda x: whiten(x, keep), (p,))
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref), (p,))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_anything_may_stand_where_the_mask_is_false(backend: str) -> None:
    keep = a_mask(3, 4, 33)
    bad = torch.where(keep, 0.0, torch.tensor(float("nan")))

    def filled(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        clean = draw(seed, 4, 33).float()
        return torch.where(keep, clean, 0.0), clean + bad

    (p, p_), (old, old_), (A, A_), (ref, ref_) = map(filled, range(4))
    more: dict[str, Any] = dict(beta=0.1, backend=backend)
    clean = policy_loss(p, old, A, keep, reference_logprobs=ref, **more)
    dirty = policy_loss(p_, old_, A_, keep, reference_logprobs=ref_, **more)
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b) and a.isfinite()
    for a, b in zip(value_loss(p, old, A, keep, backend=backend), value_loss(p_, old_, A_, keep, backend=backend)):
        assert torch.equal(a, b)
    for a, b in zip(gae(p, old, keep, backend=backend), gae(p_, old_, keep, backend=backend)):
        assert torch.equal(a, b)
    assert torch.equal(whiten(p, keep), whiten(p_, keep))
    p_.requires_grad_()
    policy_loss(p_, old_, A_, keep, reference_logprobs=ref_, beta=0.1).loss.backward()
    assert p_.grad is not None and p_.grad.isfinite().all() and not p_.grad[~keep].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_empty_mask_gives_zeros(backend: str) -> None:
    p, none = draw(1, 3, 5).float(), torch.zeros(3, 5, dtype=torch.bool)
    for normalise in ("tokens", "sequences"):
        results = policy_loss(p, p + 1, p, none, normalise=normalise, backend=backend)
        assert not any(r.item() for r in results)
    assert not any(r.item() for r in value_loss(p, p + 1, p, none, backend=backend))
    assert not whiten(p, none).any()


def test_far_log_ratios_are_clamped(isa: str) -> None:
    """e^20 and no further, and no gradient from there."""
    p = torch.tensor([[30.0, -30.0, 0.0]], requires_grad=True)
    result = policy_loss(p, torch.zeros(1, 3), torch.tensor([[-1.0, 1.0, 1.0]]))
    result.loss.backward()
    assert result.loss.item() == pytest.approx((math.exp(20) - math.exp(-20) - 1) / 3, rel=1e-6)
    assert p.grad is not None
    np.testing.assert_allclose(p.grad.numpy(), [[0, 0, -1 / 3]], rtol=1e-6)


def test_gradients_go_to_the_policy_alone() -> None:
    p, old, A, ref = (draw(i, 2, 5).float().requires_grad_() for i in range(4))
    policy_loss(p, old, A, reference_logprobs=ref, beta=0.1).loss.backward()
    value_loss(p, old, A).loss.backward()
    assert p.grad is not None and old.grad is None and A.grad is None and ref.grad is None
    assert not any(t.requires_grad for t in (*gae(p, old), group_advantages(p.flatten(), 5)))


def test_one_advantage_a_sequence_is_that_of_all_its_tokens(isa: str) -> None:
    p, old, A = draw(1, 4, 33).float(), draw(2, 4, 33).float(), draw(3, 4).float()
    for a, b in zip(
        policy_loss(p, old, A, backend="cpu"), policy_loss(p, old, A[:, None].expand(4, 33), backend="cpu")
    ):
        assert torch.equal(a, b)


def test_a_whole_step_compiles_without_a_break() -> None:
    p, old = draw(1, 4, 33).float().requires_grad_(), draw(2, 4, 33).float()
    keep = a_mask(3, 4, 33)

    def step(p: torch.Tensor, old: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        advantages, returns = gae(old, old, keep)
        policy = policy_loss(p, old, whiten(advantages, keep), keep, reference_logprobs=old, beta=0.1)
        value = value_loss(p, old, returns, keep)
        return policy.loss + policy.clip_fraction + value.loss + dpo_loss(p[:, 0], p[:, 1])[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    a, b = step(p, old, keep), compiled(p, old, keep)
    same(b, a.detach().numpy())
    same(*(torch.autograd.grad(loss, p)[0] for loss in (a, b)))


x = torch.zeros(2, 3)
CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: policy_loss(x[0], x[0], x[0]), r"expected logprobs \(B, T\)"),
    (lambda: policy_loss(x, x[:1], x), "expected old_logprobs like logprobs"),
    (lambda: policy_loss(x, x, x[:, :1]), r"expected advantages \(2, 3\) or \(B\)"),
    (lambda: policy_loss(x, x, x, x), r"expected mask \(2, 3\) of bool"),
    (lambda: policy_loss(x, x, x, beta=0.1), "expected reference_logprobs beside beta"),
    (lambda: policy_loss(x, x, x, clip=1.5), r"expected clip in \[0, 1\]"),
    (lambda: policy_loss(x, x, x, kl="k4"), "expected kl as one of k1, k2, k3"),
    (lambda: policy_loss(x, x, x, normalise="batch"), "expected normalise"),
    (lambda: policy_loss(x, x, x, denominator=0.0), "expected denominator > 0"),
    (lambda: value_loss(x, x, x[0]), "expected returns like values"),
    (lambda: value_loss(x, x, x, clip=-1.0), "expected clip >= 0"),
    (lambda: gae(x[0], x[0]), r"expected rewards \(B, T\)"),
    (lambda: gae(x, x[:1]), "expected values like rewards"),
    (lambda: gae(x, x, gamma=1.5), r"expected gamma and lam in \[0, 1\]"),
    (lambda: group_advantages(x.flatten(), 4), "in groups of 4"),
    (lambda: group_advantages(x.flatten(), 1, kind="rloo"), "expected group_size >= 2"),
    (lambda: whiten(x, x), "expected mask"),
    (lambda: kl_estimate(x, x[0]), "expected floats of one shape"),
]


@pytest.mark.parametrize(("call", "match"), CALLS)
def test_errors_at_the_door(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
