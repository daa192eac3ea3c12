"""What is special about sampling: its arithmetic against a big-integer oracle, Hugging Face's filters, its
distribution, and the same tokens on every instruction set."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from gptfast import ops
from gptfast.kernels import reason_missing
from gptfast.ops.philox import philox
from gptfast.ops.sampling import survivors
from gptfast.ops.sampling_cases import mixed
from gptfast.ops.sampling_math import EXP2, LOG2E, fraction, uniform_below, weights
from gptfast.ops.spec import Inputs

sample = ops.sample


def on_every_isa(**arguments: Any) -> dict[str, Any]:
    """The call's result on the reference and on each instruction set."""
    results = {"reference": sample(**arguments, backend="reference")}
    if reason_missing("cpu") is None:
        from gptfast import _cpu

        before = _cpu.isa()
        for isa in _cpu.isas():
            _cpu.use_isa(isa)
            results[isa] = sample(**arguments, backend="cpu")
        _cpu.use_isa(before)
    return results


def assert_all_equal(results: dict[str, Any]) -> Tensor:
    """The ids that all agree on."""
    wanted = results["reference"]
    wanted = wanted if isinstance(wanted, Tensor) else wanted[0]
    for name, got in results.items():
        got = got if isinstance(got, Tensor) else got[0]
        assert torch.equal(got, wanted), f"{name} differs in {(got != wanted).sum()} of {len(got)} rows"
    return wanted


# Known answers of Random123 1.14, file kat_vectors, philox4x32 10: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_philox_gives_random123s_known_answers() -> None:
    for counter, key, output in KNOWN:
        assert philox_by_hand(counter, key) == output
    words = philox(0, torch.zeros(1, dtype=torch.int64))
    assert tuple(int(w) for w in words) == KNOWN[0][2]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_philox_equals_the_checked_one(seed: int, index: int, stream: int) -> None:
    words = philox(seed, torch.tensor([index]), stream)
    counter = (index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF, stream, 0)
    assert tuple(int(w) for w in words) == philox_by_hand(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))


@given(st.floats(0, 1, width=32), st.integers(0, 2**54), st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_thresholds_and_draws_are_exact(p: float, total: int, seed: int, step: int) -> None:
    mass = torch.tensor([[total]])
    assert fraction(torch.tensor([[p]]), mass).item() == (math.floor(p * 2**32) * total) >> 32
    r0, r1, _, _ = philox(seed, torch.tensor([step]), 3)
    r = int(r0) | int(r1) << 32
    columns = (torch.tensor([[v]]) for v in (seed, step, 3))
    assert uniform_below(mass, *columns).item() == (r * total) >> 64


def test_weights_are_2_to_the_y() -> None:
    """To two units in the last place of fp32, cut to an integer; and never rising as y falls past an integer."""
    y = -torch.cat([torch.rand(200_000) * 33, torch.arange(34) + 0.0, torch.arange(34) + 0.5]).sort().values
    w, exact = weights(y), 2.0 ** (y.double() + 32)
    assert ((w - exact).abs() <= exact * 2**-22 + 1).all()
    assert w[y == 0].tolist() == [2**32] and w.max() == 2**32 and (w[y < -32] == 0).all()


# The oracle: the page's rules on Python's integers and fractions; only the fp32 arithmetic is numpy's.


def oracle(logits: list[float], p: dict[str, Any]) -> tuple[int, set[int]]:
    """The id and the survivors of one row."""
    f = np.float32
    with np.errstate(all="ignore"):
        l = [f(x) + f(b) if allowed else f(-np.inf) for x, b, allowed in zip(logits, p["logit_bias"], p["mask"])]
        for t in {t for t in p["history"] if 0 <= t < len(l)}:
            l[t] = l[t] / f(p["repetition_penalty"]) if l[t] > 0 else l[t] * f(p["repetition_penalty"])
            if n := p["history"][p["prompt_length"] :].count(t):
                l[t] = l[t] - (f(p["presence_penalty"]) + f(p["frequency_penalty"]) * f(n))
        if p["temperature"]:
            l = [x / f(p["temperature"]) for x in l]
        if not all(x < np.inf for x in l) or all(x == -np.inf for x in l):
            return -1, set()
        best = max(range(len(l)), key=lambda t: (l[t], -t))
        if p["temperature"] == 0:
            return best, {best}
        y = [max((x - l[best]) * f(LOG2E), f(-40)) for x in l]
    w = [oracle_weight(x) for x in y]
    left = {t for t in range(len(l)) if w[t]}
    by_logit = sorted(left, key=lambda t: (-l[t], t))
    if p["top_k"]:
        left = set(by_logit[: p["top_k"]])
    if p["top_p"] < 1:
        left = oracle_nucleus([t for t in by_logit if t in left], w, p["top_p"])
    left = {t for t in left if w[t] >= math.floor(float(f(p["min_p"])) * 2**32)}
    if p["typical_p"] < 1:
        surprise = {t: int(-y[t] * f(2**20)) for t in left}
        surplus, total = sum(w[t] * surprise[t] >> 12 for t in left), sum(w[t] for t in left)
        mean = int(float(surplus) / float(total) * 4096)
        left = oracle_nucleus(sorted(left, key=lambda t: (abs(surprise[t] - mean), t)), w, p["typical_p"])
    r = philox_by_hand((p["step"], 0, p["stream"], 0), (p["seed"] & 0xFFFFFFFF, p["seed"] >> 32))
    target = ((r[0] | r[1] << 32) * sum(w[t] for t in left)) >> 64
    return next(t for t in range(len(l)) if sum(w[s] for s in left if s <= t) > target), left


def oracle_weight(y: np.float32) -> int:
    n = np.rint(y)
    fraction, value = y - n, np.float32(EXP2[0])
    for c in EXP2[1:]:
        value = value * fraction + np.float32(c)
    return math.floor(Fraction(float(value)) * Fraction(2) ** (int(n) + 32))


def oracle_nucleus(ranked: list[int], w: list[int], p: float) -> set[int]:
    budget = max(1, math.floor(float(np.float32(p)) * 2**32) * sum(w[t] for t in ranked) >> 32)
    return {t for i, t in enumerate(ranked) if sum(w[s] for s in ranked[:i]) < budget}


def test_equals_the_oracle() -> None:
    """600 random rows, made to tie, to be cut and to break."""
    rng = random.Random(0)
    for _ in range(600):
        V = rng.choice([1, 2, 3, 7, 16, 33])
        grid, scale = rng.choice([1, 4, 1000]), rng.choice([0.5, 3, 12])
        special = [-math.inf, -0.0, 0.0, 1e-3] + [math.nan, math.inf] * (rng.random() < 0.1)
        logits = [
            round(rng.gauss(0, scale) * grid) / grid if rng.random() < 0.9 else rng.choice(special) for _ in range(V)
        ]
        p: dict[str, Any] = {
            "temperature": rng.choice([0.0, 1e-4, 0.3, 1.0, 1.7, 100.0]),
            "top_k": rng.choice([0, 0, 1, 3, 50]),
            "top_p": rng.choice([0.0, 0.2, 0.5, 0.9, 1.0, 1.0]),
            "min_p": rng.choice([0.0, 0.0, 0.05, 0.5, 1.0]),
            "typical_p": rng.choice([0.0, 0.3, 0.8, 1.0, 1.0]),
            "repetition_penalty": rng.choice([1.0, 1.3, 0.7]),
            "presence_penalty": rng.choice([0.0, 0.4]),
            "frequency_penalty": rng.choice([0.0, 0.3, -0.1]),
            "seed": rng.getrandbits(64),
            "step": rng.getrandbits(20),
            "stream": rng.getrandbits(32),
        }
        bias = [rng.choice([0.0, 0.5, -2.0]) for _ in range(V)]
        mask = [rng.random() < 0.9 for _ in range(V)]
        history, prompt = [rng.randrange(-1, V + 2) for _ in range(9)], rng.randrange(0, 10)
        row = {**p, "logit_bias": bias, "mask": mask, "history": history, "prompt_length": prompt}
        wanted, left = oracle(logits, row)
        arguments = {
            **p,
            "logits": torch.tensor([logits]),
            "logit_bias": torch.tensor(bias),
            "mask": torch.tensor(mask),
            "history": torch.tensor([history]),
            "prompt_lengths": [prompt],
        }
        assert_all_equal({"oracle": torch.tensor([wanted]), **on_every_isa(**arguments)})
        arguments = {k: v for k, v in arguments.items() if k not in ("seed", "step", "stream")}
        assert set(survivors(**arguments)[0].nonzero()[:, 0].tolist()) == left


def hf_survivors(processors: list[Any], logits: Tensor, history: Tensor | None = None) -> Tensor:
    ids: Any = torch.zeros(len(logits), 0, dtype=torch.int64) if history is None else history
    scores: Any = logits
    for processor in processors:
        scores = processor(ids, scores)
    return scores > -torch.inf


def warpers(**p: Any) -> list[Any]:
    """Hugging Face's warpers, in the order of its generate()."""
    makers: dict[str, Callable[[Any], Any]] = {
        "temperature": hf.TemperatureLogitsWarper,
        "top_k": hf.TopKLogitsWarper,
        "top_p": hf.TopPLogitsWarper,
        "min_p": hf.MinPLogitsWarper,
        "typical_p": hf.TypicalLogitsWarper,
    }
    return [make(p[name]) for name, make in makers.items() if name in p]


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.02},
        {"min_p": 0.3},
        {"typical_p": 0.2},
        {"typical_p": 0.9},
        {"temperature": 0.6, "top_p": 0.8},
        {"temperature": 1.7, "top_k": 100, "top_p": 0.9},
        {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.8, "temperature": 0.9},
    ],
    ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()),
)
def test_survivors_are_hugging_faces(parameters: dict[str, Any]) -> None:
    logits = torch.randn(300, 700, generator=torch.Generator().manual_seed(1)) * 2.5
    # In fp64, so that it isn't their rounding that decides which side of a cut a token falls on.
    assert torch.equal(survivors(logits, **parameters), hf_survivors(warpers(**parameters), logits.double()))


def test_penalties_are_hugging_faces() -> None:
    i = Inputs(torch.float32, "penalties")
    logits, history = i.randn(50, 200, scale=3), i.randint(0, 200, (50, 60))
    bias = i.randn(200)
    wanted: Any = hf.RepetitionPenaltyLogitsProcessor(1.3)(history, logits + bias)  # type: ignore[arg-type]
    assert torch.equal(
        sample(logits, temperature=0, repetition_penalty=1.3, logit_bias=bias, history=history), wanted.argmax(-1)
    )
    ours = survivors(logits, top_k=9, repetition_penalty=1.3, logit_bias=bias, history=history)
    assert torch.equal(ours, hf_survivors(warpers(top_k=9), wanted))


def test_presence_and_frequency_are_openais() -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, over the output alone."""
    i = Inputs(torch.float32, "presence")
    logits, history = i.randn(40, 50), i.randint(0, 50, (40, 80))
    counts = torch.stack([row[30:].bincount(minlength=50) for row in history])
    wanted = logits.double() - 0.25 * counts - 0.5 * (counts > 0)  # exact: no tie is broken by a rounding
    penalties: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    got = sample(logits, temperature=0, history=history, prompt_lengths=[30] * 40, **penalties)
    assert torch.equal(got, wanted.argmax(-1))


@pytest.mark.parametrize("parameters", [{}, {"top_k": 12, "top_p": 0.9}, {"typical_p": 0.7}, {"min_p": 0.1}], ids=str)
def test_distribution(parameters: dict[str, Any]) -> None:
    """200,000 draws against the exact probabilities: chi-square, at the level of one in 10^4."""
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)) * 1.5
    n = 200_000
    seed, step = torch.arange(n) // 400, torch.arange(n) % 400
    ids = sample(logits.expand(n, -1), temperature=0.9, seed=seed, step=step, **parameters)
    kept = survivors(logits, temperature=0.9, **parameters)
    p = (logits.double() / 0.9).masked_fill(~kept, -torch.inf).softmax(-1)[0]
    counts = ids.bincount(minlength=32)
    assert (counts[~kept[0]] == 0).all()
    expected = p[kept[0]] * n
    chi = ((counts[kept[0]] - expected) ** 2 / expected).sum()
    tail = torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2, dtype=torch.float64), chi / 2)
    assert tail > 1e-4


def test_same_tokens_everywhere() -> None:
    """100,000 rows, each with parameters, history and seed of its own."""
    for B, V, bias in ((50_000, 64, False), (30_000, 97, True), (20_000, 160, False)):
        ids = assert_all_equal(on_every_isa(**mixed(Inputs(torch.float32, f"same{V}"), B, V, bias)))
        assert (ids >= 0).float().mean() > 0.99 and len(ids.unique()) > V * 0.9


def test_large_vocabularies_everywhere() -> None:
    for V in (4099, 50257):
        assert_all_equal(on_every_isa(**mixed(Inputs(torch.bfloat16, f"large{V}"), 24, V, True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_top_k_1_is_the_arg_max_under_ties(dtype: torch.dtype) -> None:
    logits = Inputs(dtype, "ties").randint(0, 3, (200, 500)).to(dtype)
    first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    for arguments in ({"top_k": 1}, {"temperature": 0.0}, {"top_p": 0.0}):
        assert torch.equal(assert_all_equal(on_every_isa(logits=logits, seed=torch.arange(200), **arguments)), first)


def test_parameters_of_every_form_mean_the_same() -> None:
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(5))
    wanted = sample(logits, temperature=0.7, top_k=20, top_p=0.9, seed=2**64 - 3, step=9)
    forms: list[Callable[[list[Any]], Any]] = [list, tuple, torch.tensor]
    for form in forms:
        numbers = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": -3, "step": 9}
        assert torch.equal(sample(logits, **{k: form([v] * 4) for k, v in numbers.items()}), wanted)
    half: dict[str, Any] = {"top_k": torch.tensor(20), "top_p": torch.tensor([0.9] * 4).double(), "seed": -3}
    scalars = sample(logits, temperature=torch.tensor(0.7), step=torch.tensor(9), **half)
    assert torch.equal(scalars, wanted)
    assert torch.equal(
        sample(logits.t().contiguous().t(), temperature=0.7, top_k=20, top_p=0.9, seed=-3, step=9), wanted
    )
    plain = sample(logits, seed=4)
    neutral: dict[str, Any] = dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "step", "stream")
    )
    assert torch.equal(sample(logits, seed=4, **neutral), plain)


def test_logprobs() -> None:
    """Raw is the model's log-softmax whatever the processing; processed is that of the distribution drawn from."""
    logits = torch.randn(30, 200, generator=torch.Generator().manual_seed(6)) * 2
    arguments: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": torch.arange(30)}
    ids, raw = sample(logits, return_logprobs=True, **arguments)
    again, processed = sample(logits, return_logprobs="processed", **arguments)
    assert torch.equal(ids, again) and raw.dtype == processed.dtype == torch.float32
    torch.testing.assert_close(raw, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
    kept = survivors(logits, temperature=0.8, top_k=20, top_p=0.9)
    scaled = (logits / 0.8).masked_fill(~kept, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(processed, scaled.gather(1, ids[:, None])[:, 0])
    assert (sample(logits, temperature=0, return_logprobs="processed")[1] == 0).all()


def test_broken_rows_give_minus_one_and_harm_no_other() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(7))
    good = sample(logits, seed=1, return_logprobs=True)
    logits[1, 7], logits[2, 39], logits[3] = torch.nan, torch.inf, -torch.inf
    for arguments in ({}, {"top_k": 5}, {"top_p": 0.9}, {"temperature": 0.0}):
        for backend, (ids, logprobs) in on_every_isa(logits=logits, seed=1, return_logprobs=True, **arguments).items():
            assert ids[1:4].tolist() == [-1] * 3, backend
            assert logprobs[1:4].isnan().all() and not logprobs[[0, 4, 5]].isnan().any()
            assert arguments or torch.equal(ids[[0, 4, 5]], good[0][[0, 4, 5]])
    allowed = torch.ones(6, 40, dtype=torch.bool)
    allowed[1, 7], allowed[2, 39] = False, False  # what is masked can't break a row
    assert (sample(logits, mask=allowed)[:3] >= 0).all()
    assert sample(logits, mask=torch.zeros(40, dtype=torch.bool)).tolist() == [-1] * 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(3)}, r"expected logits \(B, V\).*got \(3,\) float32"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, "expected logits.*got .* int64"),
        ({"logits": torch.zeros(2, 0)}, "expected logits"),
        ({"temperature": -0.5}, "expected temperature 0 or at least 1e-30, got -0.5"),
        ({"temperature": math.nan}, "expected temperature .* got nan"),
        ({"temperature": [1.0, math.nan]}, "expected temperature .* got nan"),
        ({"temperature": math.inf}, "expected temperature .* got inf"),
        ({"temperature": 1e-35}, "expected temperature .* got 1e-35"),
        ({"temperature": [1.0, 1.0, 1.0]}, r"expected temperature one number or \(2,\), got \(3,\)"),
        ({"top_k": -1}, "expected top_k >= 0, got -1"),
        ({"top_k": 1.5}, "expected top_k one integer"),
        ({"top_k": torch.tensor([3, -2])}, "expected top_k >= 0, got -2"),
        ({"top_p": 1.01}, "expected top_p between 0 and 1, got 1.01"),
        ({"top_p": torch.tensor([0.5, -0.1])}, "expected top_p between 0 and 1, got -0.1"),
        ({"min_p": 2}, "expected min_p between 0 and 1, got 2"),
        ({"typical_p": -1}, "expected typical_p between 0 and 1, got -1"),
        ({"repetition_penalty": 0, "history": torch.zeros(2, 1).long()}, "expected repetition_penalty above 0, got 0"),
        ({"repetition_penalty": 1.1}, r"repetition_penalty needs history \(2, L\), got None"),
        ({"frequency_penalty": [0.0, 0.1]}, "frequency_penalty needs history"),
        ({"prompt_lengths": [1, 2]}, "prompt_lengths needs history"),
        ({"history": torch.zeros(3, 4).long()}, r"expected history \(2, L\).*got \(3, 4\) int64"),
        ({"history": torch.zeros(2, 4)}, r"expected history .* int64 .*got \(2, 4\) float32"),
        ({"history": torch.zeros(2, 4).long(), "prompt_lengths": [1]}, r"expected prompt_lengths \(2,\)"),
        ({"logit_bias": torch.zeros(4)}, r"expected logit_bias \(5,\) or \(2, 5\) .*got \(4,\)"),
        ({"logit_bias": torch.zeros(5, dtype=torch.float64)}, "expected logit_bias .* float32.*got .* float64"),
        ({"mask": torch.ones(2, 5)}, "expected mask .* bool.*got .* float32"),
        ({"seed": 2**64}, "expected seed of 64 bits, got 18446744073709551616"),
        ({"seed": 0.5}, "expected seed one integer"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, r"expected step one integer or \(2,\), got \(3,\)"),
        ({"return_logprobs": "all"}, "expected return_logprobs .* got 'all'"),
    ],
    ids=lambda x: "" if isinstance(x, str) else "-".join(x),
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        sample(**{"logits": torch.zeros(2, 5), **arguments})
    assert str(caught.value).startswith("sample: ") and "\n" not in str(caught.value)


def test_transforms_are_refused_in_one_sentence() -> None:
    with pytest.raises(ops.BackendError, match="sample: expected logits as an ordinary tensor"):
        torch.func.vmap(lambda logits: ops.sample(logits))(torch.zeros(3, 2, 10))
