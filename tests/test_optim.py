"""AdamW as torch's optimiser: the same training as torch.optim.AdamW, its state in and out, schedules, scalers,
processes; and the clipping of gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.train import AdamW, clip_grad_norm_
from gptfast.train.optim import total_norm
from tests.processes import together


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 33), nn.LayerNorm(33), nn.GELU(), nn.Linear(33, 5)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 9, generator=generator)
    return x, x[:, :5].argmax(1)


def loss_of(m: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return F.cross_entropy(m(x.to(next(m.parameters()).dtype)).float(), y)


def train(m: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], schedule: Any = None) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(m, step)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def groups(m: nn.Module) -> list[dict[str, Any]]:
    """Decay for matrices only."""
    return [
        {"params": [p for p in m.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in m.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]


def near(a: nn.Module, b: nn.Module, to: float) -> bool:
    return all((p - q).abs().max() <= to for p, q in zip(a.parameters(), b.parameters()))


# Two implementations of one formula in fp32: each step rounds a parameter of at most 2 once, by 2^-24, and a gradient
# that is off by as much moves Adam's quotient m / sqrt(v) by some more. 40 steps of 0.01 move it by 0.4.
SAME = 2e-5


def test_training_is_that_of_torch() -> None:
    ours, theirs = model(), model()
    a = AdamW(groups(ours), lr=0.01, betas=(0.9, 0.95))
    b = torch.optim.AdamW(groups(theirs), lr=0.01, betas=(0.9, 0.95))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 40) for o in (a, b)]
    losses = [train(m, o, range(40), schedule) for m, o, schedule in zip((ours, theirs), (a, b), schedules)]
    assert losses[0] == pytest.approx(losses[1], abs=SAME) and losses[0][-1] < losses[0][0]
    assert near(ours, theirs, SAME)


def test_clipping_in_the_step_is_clipping_before_it() -> None:
    ours, theirs = model(), model()
    a, b = AdamW(ours.parameters(), lr=0.01, max_norm=0.3), torch.optim.AdamW(theirs.parameters(), lr=0.01)
    for step in range(20):
        loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        a.step()
        b.step()
        assert a.grad_norm is not None and a.grad_norm.item() == pytest.approx(wanted.item(), rel=1e-3)
        assert wanted > 0.3
        a.zero_grad()
        b.zero_grad()
    assert near(ours, theirs, SAME)


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_goes_from_one_to_the_other(ours_first: bool) -> None:
    """Ten steps of one, its state into the other, ten more: as twenty of torch's."""
    straight, first = model(), model()
    train(straight, torch.optim.AdamW(straight.parameters(), lr=0.01), range(20))
    kinds = [AdamW, torch.optim.AdamW] if ours_first else [torch.optim.AdamW, AdamW]
    one = kinds[0](first.parameters(), lr=0.01)
    train(first, one, range(10))
    second = copy.deepcopy(first)
    other = kinds[1](second.parameters(), lr=0.5)
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["lr"] == 0.01
    train(second, other, range(10, 20))
    assert near(second, straight, SAME)


def test_a_state_dict_resumes_bit_for_bit(tmp_path: Path) -> None:
    m = model(dtype=torch.bfloat16)
    o = AdamW(groups(m), lr=0.01, max_norm=1.0, master_weights=True)
    train(m, o, range(5))
    torch.save([m.state_dict(), o.state_dict()], tmp_path / "state")
    train(m, o, range(5, 10))
    n = model(1, torch.bfloat16)
    p = AdamW(groups(n), lr=0.3, max_norm=1.0, master_weights=True)
    weights, state = torch.load(tmp_path / "state")
    n.load_state_dict(weights)
    p.load_state_dict(state)
    assert all(s["exp_avg"].dtype == torch.float32 for s in p.state.values())
    train(n, p, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(m.parameters(), n.parameters()))
    for x, y in zip(o.state.values(), p.state.values()):
        assert x.keys() == y.keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_16_bits_with_masters_train_as_fp32() -> None:
    """The masters follow the 16-bit gradients; without them small steps are lost."""
    wide, masters, plain = model(), model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    wide.load_state_dict(plain.state_dict())
    for m, kept in ((wide, False), (masters, True), (plain, False)):
        train(m, AdamW(m.parameters(), lr=1e-4, master_weights=kept), range(100))

    def away(m: nn.Module) -> float:
        return sum((p - q).abs().sum().item() for p, q in zip(m.parameters(), wide.parameters()))

    assert away(masters) < 0.5 * away(plain)


def test_accumulated_gradients_are_scaled_in_the_step() -> None:
    ours, theirs = model(), model()
    a, b = AdamW(ours.parameters(), max_norm=1.0), AdamW(theirs.parameters(), max_norm=1.0)
    for step in range(4):
        loss_of(ours, step).backward()
        (loss_of(theirs, step) / 4).backward()
    a.step(scale=0.25)
    b.step()
    assert near(ours, theirs, SAME)
    assert a.grad_norm is not None and b.grad_norm is not None
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-5)


def test_a_gradient_scaler_works_and_skips() -> None:
    ours, theirs = model(), model()
    a, b = AdamW(ours.parameters()), AdamW(theirs.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(ours, 0)).backward()
    scaler.step(a)
    scaler.update()
    train(theirs, b, [0])
    assert near(ours, theirs, SAME)
    before = copy.deepcopy(ours)
    a.zero_grad()
    scaler.scale(loss_of(ours, 1) * float("inf")).backward()
    scaler.step(a)
    scaler.update()
    assert near(ours, before, 0.0) and scaler.get_scale() == 512


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_norms_that_are_not_finite(backend: str) -> None:
    m = model()
    before = copy.deepcopy(m)
    o = AdamW(m.parameters(), max_norm=1.0, nonfinite="skip", backend=backend)
    (loss_of(m, 0) * float("nan")).backward()
    o.step()
    assert near(m, before, 0.0) and not o.state and o.grad_norm is not None and o.grad_norm.isnan()
    with pytest.raises(RuntimeError, match="nothing was updated"):
        strict = AdamW(m.parameters(), max_norm=1.0, nonfinite="raise", backend=backend)
        strict.step()


def test_closure_maximize_frozen_and_unused_parameters() -> None:
    m = model()
    o = AdamW(m.parameters(), lr=0.01, maximize=True)
    m[0].bias.requires_grad_(False)  # pyright: ignore
    before, loss = m[0].bias.clone(), loss_of(m, 0).item()  # pyright: ignore

    def closure() -> Tensor:
        o.zero_grad()
        loss = loss_of(m, 0)
        loss.backward()
        return loss

    assert o.step(closure).item() == loss
    assert loss_of(m, 0) > loss and torch.equal(m[0].bias, before)  # pyright: ignore
    assert AdamW(m.parameters()).step() is None  # gradients are there; without them nothing happens
    o.zero_grad()
    still = copy.deepcopy(m)
    o.step()
    assert near(m, still, 0.0)


def test_copies() -> None:
    m = model()
    o = AdamW(m.parameters(), max_norm=1.0)
    train(m, o, range(2))
    again = pickle.loads(pickle.dumps(o))
    assert again.max_norm == 1.0 and again.state_dict()["state"].keys() == o.state_dict()["state"].keys()
    twin, theirs = copy.deepcopy((m, o))
    train(m, o, range(2, 4))
    train(twin, theirs, range(2, 4))
    assert near(m, twin, 0.0)


def test_a_lr_that_is_a_tensor_and_fp64_parameters() -> None:
    ours, theirs = model(dtype=torch.float64), model(dtype=torch.float64)
    train(ours, AdamW(ours.parameters(), lr=torch.tensor(0.01)), range(5))
    train(theirs, torch.optim.AdamW(theirs.parameters(), lr=torch.tensor(0.01)), range(5))
    assert near(ours, theirs, 5 * 2.0**-24)  # torch rounds 1 - lr weight_decay to the dtype of lr, in each step


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1.0}, "expected lr, eps, weight_decay >= 0"),
        ({"betas": (0.9, 1.0)}, "expected betas"),
        ({"nonfinite": "skip"}, "needs a norm"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AdamW(model().parameters(), **options)


def test_what_it_does_not_take() -> None:
    theirs = torch.optim.AdamW(model().parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="without amsgrad"):
        AdamW(model().parameters()).load_state_dict(theirs.state_dict())
    e = nn.Embedding(5, 3, sparse=True)
    e(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="expected dense gradients"):
        AdamW(e.parameters()).step()
    with pytest.raises(ValueError, match="expected dense gradients, got a sparse one"):
        clip_grad_norm_(e.parameters(), 1.0)


@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_clip_grad_norm_is_that_of_torch(max_norm: float) -> None:
    a, b = model(), model()
    loss_of(a, 0).backward()
    loss_of(b, 0).backward()
    got, wanted = clip_grad_norm_(a.parameters(), max_norm), nn.utils.clip_grad_norm_(b.parameters(), max_norm)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-6)
    for p, q in zip(a.parameters(), b.parameters()):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    assert clip_grad_norm_([], 1.0) == 0 and total_norm([]) == 0
    one = nn.Parameter(torch.ones(3))
    one.grad = torch.tensor([float("nan"), 1.0, 1.0])
    with pytest.raises(RuntimeError, match="not clipped"):
        clip_grad_norm_(one, 1.0, error_if_nonfinite=True)
    assert one.grad[1] == 1


def sharded(rank: int, folder: str) -> None:
    """One of two processes: half of each batch, FSDP2's shards of each parameter (33 rows: 17 and 16)."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        m = model()
        fully_shard(m, mesh=init_device_mesh("cpu", (2,)))
        o = AdamW(groups(m), lr=0.01, max_norm=0.3)
        norms = []
        for step in range(10):
            x, y = (t[8 * rank : 8 * rank + 8] for t in batch(step))
            F.cross_entropy(m(x), y).backward()
            norms.append(total_norm([p.grad for p in m.parameters() if p.grad is not None]).item())
            o.step()
            assert o.grad_norm is not None and o.grad_norm.item() == norms[-1]
            o.zero_grad()
        assert all(isinstance(s["exp_avg"], DTensor) for s in o.state.values())
        whole = [p.full_tensor() for p in m.parameters() if isinstance(p, DTensor)]
        torch.save([whole, norms], f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch is built without torch.distributed")
def test_two_processes_are_one(tmp_path: Path) -> None:
    together(sharded, str(tmp_path))
    alone = model()
    o, norms = AdamW(groups(alone), lr=0.01, max_norm=0.3), []
    for step in range(10):
        loss_of(alone, step).backward()
        o.step()
        assert o.grad_norm is not None
        norms.append(o.grad_norm.item())
        o.zero_grad()
    (first, theirs), (second, also) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert theirs == also == pytest.approx(norms, rel=1e-5)
    for p, a, b in zip(alone.parameters(), first, second, strict=True):
        assert torch.equal(a, b) and (p - a).abs().max() <= SAME
