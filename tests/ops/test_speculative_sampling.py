"""Speculative sampling: the distribution it keeps, what is kept by hand, and errors at the door. Conformance of the
kernels: test_conformance.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gptfast.ops import sample, speculative_sampling
from tests.where import on_the_cpu

pytestmark = pytest.mark.skipif(not on_the_cpu(), reason="the CPU's session does it")


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    expected = p.double() * counts.sum()
    return ((counts - expected).square() / expected).sum().item()


def test_the_tokens_are_the_targets_whatever_the_draft_is() -> None:
    """The joint distribution of the first two tokens: a draft of two, the target's second place depending on nothing;
    a token that comes behind a short draft is only the first. 16 degrees of freedom: 39.3 is one in a thousand."""
    N = 100_000
    draft = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    target = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
    row = torch.arange(N)
    ids = torch.stack([sample(d.log().expand(N, -1), seed=1, step=i, stream=row) for i, d in enumerate(draft)], 1)
    found = speculative_sampling(draft.expand(N, 2, 4), ids, target.expand(N, 3, 4), seed=2, stream=row)
    first = torch.bincount(found.ids[:, 0], minlength=4)
    assert chi_square(first, target[0]) < 16.3  # 3 degrees
    has_second = found.emitted >= 1
    second = torch.bincount(found.ids[has_second, 1], minlength=4)
    assert chi_square(second, target[1]) < 16.3
    third = torch.bincount(found.ids[found.emitted == 2, 2], minlength=4)
    assert chi_square(third, target[2]) < 16.3
    rates = torch.minimum(draft, target[:2]).sum(1)
    assert found.accepted.double().mean().item() == pytest.approx(rates.sum().item(), abs=0.01)
    assert has_second.double().mean().item() == pytest.approx(rates[0].item(), abs=0.006)


def test_certain_cases() -> None:
    one_hot = torch.eye(4)
    same = speculative_sampling(one_hot[None, [1, 2]], torch.tensor([[1, 2]]), one_hot[None, [1, 2, 3]])
    assert same.ids.tolist() == [[1, 2, 3]] and same.emitted.tolist() == same.accepted.tolist() == [2]
    other = speculative_sampling(one_hot[None, [1, 2]], torch.tensor([[1, 2]]), one_hot[None, [0, 2, 3]])
    assert other.ids.tolist() == [[0, -1, -1]] and other.emitted.tolist() == [0] and other.accepted.tolist() == [1]
    nothing = speculative_sampling(one_hot[None, :0], torch.empty(1, 0, dtype=torch.int64), one_hot[None, [2]])
    assert nothing.ids.tolist() == [[2]]
    no_token = speculative_sampling(one_hot[None, [1]], torch.tensor([[-1]]), one_hot[None, [1, 3]])
    assert no_token.ids.tolist() == [[1, -1]]  # nothing is left of the target: its own is drawn
    no_mass = speculative_sampling(one_hot[None, [1]], torch.tensor([[1]]), torch.zeros(1, 2, 4))
    assert no_mass.ids.tolist() == [[-1, -1]]


def test_a_row_depends_on_its_own_numbers_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    draft = torch.rand(6, 3, 50, generator=generator).softmax(-1)
    target = torch.rand(6, 4, 50, generator=generator).softmax(-1)
    ids = torch.randint(0, 50, (6, 3), generator=generator)
    seed, stream = torch.arange(6) + 2**40, torch.arange(6) % 2
    whole = speculative_sampling(draft, ids, target, seed=seed, stream=stream)
    for b in range(6):
        alone = speculative_sampling(
            draft[b : b + 1], ids[b : b + 1], target[b : b + 1], seed=int(seed[b]), stream=b % 2
        )
        assert all(torch.equal(a, w[b : b + 1]) for a, w in zip(alone, whole))


p, t, ids = torch.ones(2, 3, 5) / 5, torch.ones(2, 4, 5) / 5, torch.zeros(2, 3, dtype=torch.int64)
CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: speculative_sampling(p[0], ids, t), r"expected draft_probs \(B, n, V\)"),
    (lambda: speculative_sampling(p, ids[:, :2], t), r"expected draft_ids \(2, 3\) of integers"),
    (lambda: speculative_sampling(p, ids.float(), t), r"expected draft_ids \(2, 3\) of integers"),
    (lambda: speculative_sampling(p, ids, t[:, :3]), r"expected target_probs \(2, 4, 5\)"),
    (lambda: speculative_sampling(p, ids, t, seed=torch.zeros(3).long()), r"expected seed one integer or \(2,\)"),
]


@pytest.mark.parametrize(("call", "match"), CALLS)
def test_errors_at_the_door(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match="speculative_sampling: " + match):
        call()
