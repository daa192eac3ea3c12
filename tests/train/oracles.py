"""The papers' formulas in NumPy, one token and one answer at a time, in fp64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any


def logprobs(logits: Array, targets: Sequence[int], temperature: float) -> tuple[Array, Array]:
    """log p of each target under softmax(logits / T), and each row's entropy."""
    chosen, entropies = [], []
    for row, target in zip(np.asarray(logits, np.float64) / temperature, targets):
        p = np.exp(row - row.max())
        p /= p.sum()
        chosen.append(math.log(p[target]))
        entropies.append(-sum(x * math.log(x) for x in p if x > 0))
    return np.array(chosen), np.array(entropies)


def kl(kind: str, policy: Array, reference: Array) -> Array:
    """Schulman, Approximating KL Divergence: k1 = -log r, k2 = (log r)^2 / 2, k3 = (r - 1) - log r, r = p_ref / p."""
    r = np.exp(reference - policy)
    return {"k1": -np.log(r), "k2": np.log(r) ** 2 / 2, "k3": (r - 1) - np.log(r)}[kind]


def gae(rewards: Array, values: Array, gamma: float, lam: float) -> tuple[Array, Array]:
    """Schulman et al., eq. 16: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    following = np.append(values[1:], 0.0)
    delta = rewards + gamma * following - values
    advantages = np.array([sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)])
    return advantages, advantages + values


def whiten(x: Array, shift_mean: bool = True) -> Array:
    white = (x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-8)
    return white if shift_mean else white + x.mean()


def policy_loss(new: Array, old: Array, A: Array, low: float, high: float) -> tuple[Array, Array]:
    """Each token's -L^CLIP (Schulman et al., arXiv:1707.06347, eq. 7), and whether the clipped side counts."""
    ratio = np.exp(np.clip(new - old, -20, 20))
    plain, clipped = ratio * A, np.clip(ratio, 1 - low, 1 + high) * A
    return -np.minimum(plain, clipped), clipped < plain


def value_loss(new: Array, old: Array, returns: Array, clip: float) -> Array:
    moved = old + np.clip(new - old, -clip, clip)
    return 0.5 * np.maximum((new - returns) ** 2, (moved - returns) ** 2)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def bradley_terry(chosen: float, rejected: float, margin: float, centring: float) -> float:
    return -log_sigmoid(chosen - rejected - margin) + centring * (chosen + rejected) ** 2


def dpo(kind: str, c: float, r: float, ref_c: float, ref_r: float, beta: float, smoothing: float) -> float:
    d = (c - ref_c) - (r - ref_r)
    if kind == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return max(0.0, 1 - beta * d)
    right, wrong = -log_sigmoid(beta * d), -log_sigmoid(-beta * d)
    if kind == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def group(kind: str, rewards: Array) -> Array:
    n = len(rewards)
    if kind == "rloo":
        return np.array([r - (rewards.sum() - r) / (n - 1) for r in rewards])
    centred = rewards - rewards.mean()
    return centred / (rewards.std(ddof=1) + 1e-4) if kind == "grpo" else centred
