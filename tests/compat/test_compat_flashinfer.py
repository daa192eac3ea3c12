"""compat.flashinfer_sampling: what may be drawn, how often, and again with the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptfast.compat import flashinfer_sampling as sampling

N = 4000


def probs(V: int = 6) -> Tensor:
    return torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])[None, :V].expand(N, -1).contiguous()


def check(ids: Tensor, wanted: list[float]) -> None:
    """Five standard deviations of a binomial, and nothing where nothing may be."""
    assert ids.dtype == torch.int32 and ids.shape == (N,)
    p = torch.tensor(wanted)
    p = p / p.sum()
    counts = torch.bincount(ids.long(), minlength=len(wanted)).float()
    assert ((counts - N * p).abs() <= 5 * (N * p * (1 - p)).sqrt()).all(), f"{counts / N} of {p}"


def test_frequencies() -> None:
    p, first = probs(), [0.4, 0.25, 0.2, 0.1, 0.04, 0.01]
    check(sampling.sampling_from_probs(p, seed=1), first)
    check(sampling.sampling_from_logits(p.log() + 3, seed=2), first)
    check(sampling.top_k_sampling_from_probs(p, 3, seed=3), [0.4, 0.25, 0.2, 0, 0, 0])
    check(sampling.top_p_sampling_from_probs(p, 0.6, seed=4), [0.4, 0.25, 0, 0, 0, 0])
    check(sampling.min_p_sampling_from_probs(p, 0.45, seed=5), [0.4, 0.25, 0.2, 0, 0, 0])
    check(sampling.top_k_top_p_sampling_from_probs(p, 3, 0.8, seed=6), [0.4, 0.25, 0.2, 0, 0, 0])
    # of all, 0.8 is reached by three; of the two likeliest, by both
    check(sampling.top_k_top_p_sampling_from_logits(p.log(), 2, 0.5, seed=7), [0.4, 0, 0, 0, 0, 0])
    joint = sampling.top_k_top_p_sampling_from_logits(p.log(), 2, 0.5, filter_apply_order="joint", seed=7)
    check(joint, [0.4, 0.25, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="expected filter_apply_order"):
        sampling.top_k_top_p_sampling_from_probs(p, 2, 0.5, filter_apply_order="both")


def test_parameters_for_each_row() -> None:
    p = probs()[:4]
    ids = sampling.top_k_sampling_from_probs(p, torch.tensor([1, 1, 1, 1]), seed=0)
    assert ids.tolist() == [0, 0, 0, 0]
    rows = torch.eye(6)[:3]
    chosen = sampling.sampling_from_probs(rows, indices=torch.tensor([2, 0, 1, 2]), seed=0)
    assert chosen.tolist() == [2, 0, 1, 2]


def test_seeds() -> None:
    p = probs()
    draw = sampling.sampling_from_probs
    assert torch.equal(draw(p, seed=3, offset=1), draw(p, seed=3, offset=1))
    assert not torch.equal(draw(p, seed=3, offset=1), draw(p, seed=3, offset=2))
    generators = [torch.Generator().manual_seed(s) for s in (0, 0, 1)]
    a, b, c = (draw(p, generator=g) for g in generators)
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(0)
    d = draw(p)
    torch.manual_seed(0)
    assert torch.equal(draw(p), d)


def test_rows_of_nothing() -> None:
    p = torch.tensor([[0.5, torch.nan], [0.0, 0.0], [0.0, 1.0]])
    assert sampling.sampling_from_probs(p, seed=0).tolist() == [-1, -1, 1]
    with pytest.raises(ValueError, match="expected no NaN"):
        sampling.sampling_from_probs(p, check_nan=True)


def test_renormalised() -> None:
    p = probs()[:2]
    torch.testing.assert_close(sampling.top_k_renorm_probs(p, 2)[0], torch.tensor([0.4, 0.25, 0, 0, 0, 0]) / 0.65)
    torch.testing.assert_close(sampling.top_p_renorm_probs(p, 0.8)[0], torch.tensor([0.4, 0.25, 0.2, 0, 0, 0]) / 0.85)
    masked = sampling.top_k_mask_logits(p.log(), torch.tensor([1, 6]))
    assert masked.isfinite().sum(-1).tolist() == [1, 6] and torch.equal(masked[1], p[1].log())


def test_speculation_draws_from_the_target() -> None:
    """Whatever the draft proposes, the first token is distributed as the target's."""
    draft = torch.tensor([0.1, 0.1, 0.3, 0.3, 0.1, 0.1])
    target = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.04, 0.01])
    tokens = sampling.sampling_from_probs(draft[None].expand(N, -1), seed=11)[:, None]
    ids, accepted, emitted = sampling.chain_speculative_sampling(
        draft.expand(N, 1, 6), tokens, target.expand(N, 2, 6), seed=12
    )
    check(ids[:, 0], target.tolist())
    assert torch.equal(accepted, emitted) and ids.shape == (N, 2)
    assert torch.equal(ids[:, 1] >= 0, emitted == 1)
    rate = torch.minimum(draft, target).sum()
    assert abs(emitted.float().mean() - rate) <= 5 * (rate * (1 - rate) / N).sqrt()
    check_second = ids[:, 1][emitted == 1]
    assert check_second.numel() > N / 4 and abs((check_second == 0).float().mean() - 0.4) < 0.06


def test_speculation_counts() -> None:
    certain = torch.eye(4)[[1, 2, 3]][None]
    given = torch.zeros(1, dtype=torch.int32)
    ids, accepted, emitted = sampling.chain_speculative_sampling(
        certain[:, :2], torch.tensor([[1, 2]]), torch.eye(4)[[1, 3, 0]][None], given, seed=0
    )
    assert ids.tolist() == [[1, 3, -1]] and accepted is given and given.tolist() == [1] and emitted.tolist() == [1]
    ids, _, emitted = sampling.chain_speculative_sampling(certain[:, :2], torch.tensor([[1, 2]]), certain, seed=0)
    assert ids.tolist() == [[1, 2, 3]] and emitted.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_of_16_bits(dtype: torch.dtype) -> None:
    """They count as they are: nothing is rounded again."""
    p = torch.softmax(2 * torch.randn(1000, generator=torch.Generator().manual_seed(0)), -1).to(dtype).expand(N, -1)
    assert torch.equal(sampling.sampling_from_probs(p, seed=1), sampling.sampling_from_probs(p.float(), seed=1))
    p = torch.linspace(1, 1.2, 200, dtype=torch.float64).to(dtype)[None] / 1024
    assert torch.equal(sampling.top_k_renorm_probs(p, 9) > 0, sampling.top_k_renorm_probs(p.float(), 9) > 0)
