"""Training gptfast's own GPT the way PyTorch's users do: gradients, torch.compile, autocast, checkpointing, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from gptfast import ops
from gptfast.layers import Block
from gptfast.model import GPT, GPTConfig
from gptfast.ops.spec import tolerance

COMMON: dict[str, Any] = dict(vocab_size=97, n_layer=2, n_embd=48, n_head=4, context=64)
CONFIGS = {
    "gpt2": GPTConfig("gpt2", **COMMON),
    "llama": GPTConfig(
        "llama", **COMMON, n_kv_head=2, norm="rms_norm", positions="rope", activation="swiglu", ffn_dim=80,
        tie_embeddings=False, qkv_bias=False, out_bias=False, mlp_bias=False,
    ),
}  # fmt: skip


def make(name: str, **more: Any) -> GPT:
    torch.manual_seed(1)
    return GPT(replace(CONFIGS[name], **more))


def batch(B: int = 3, T: int = 17) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 97, (B, T + 1), generator=torch.Generator().manual_seed(2))
    return ids[:, :-1], ids[:, 1:]


def loss_of(model: Callable[..., Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


def gradients(model: GPT, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, ids, targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_references(name: str) -> None:
    """Within twice the error that the reference itself makes in fp32, against the model in fp64."""
    model, data = make(name), batch()
    got = gradients(model, *data)
    model.backend = "reference"
    plain = gradients(model, *data)
    double = copy.deepcopy(model).double()
    double.zero_grad()
    F.cross_entropy(double.logits(data[0]).flatten(0, 1), data[1].flatten()).backward()
    exact = {n: p.grad for n, p in double.named_parameters() if p.grad is not None}
    assert got.keys() == plain.keys() == exact.keys()
    worst = max((got[n].double() - exact[n]).abs().max().item() / tolerance(plain[n], exact[n]) for n in exact)
    assert worst <= 2, f"{worst:.2f} of the tolerance, which counts a chain of ops as one: twice is allowed"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compiled_step_has_no_graph_break(name: str) -> None:
    """fullgraph, the same loss and gradients as eager; at most one recompile for changing batches, one for batch 1."""
    model = make(name)
    seen = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids, targets: loss_of(model, ids, targets), fullgraph=True, backend=seen)
    for B in (4, 2, 7, 3, 1):
        ids, targets = batch(B)
        wanted = gradients(model, ids, targets)
        model.zero_grad()
        loss = compiled(ids, targets)
        loss.backward()
        assert torch.equal(loss, loss_of(model, ids, targets))
        for n, p in model.named_parameters():
            assert p.grad is not None and torch.equal(p.grad, wanted[n]), f"{n}, batch {B}"
    assert seen.frame_count <= 3


def test_a_compiled_step_with_dropout_draws_anew_each_time() -> None:
    model = make("gpt2", dropout=0.2)
    seen = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids, targets: loss_of(model, ids, targets), fullgraph=True, backend=seen)
    losses = {compiled(*batch()).item() for _ in range(4)}
    assert len(losses) == 4 and seen.frame_count == 1
    model.eval()
    assert loss_of(model, *batch()) == loss_of(model, *batch())


def test_dropout_is_the_seeds() -> None:
    model = make("gpt2", dropout=0.2)
    torch.manual_seed(7)
    first = gradients(model, *batch())
    torch.manual_seed(7)
    again = gradients(model, *batch())
    other = gradients(model, *batch())
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["norm.weight"], other["norm.weight"])


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_trains_in_bf16(name: str) -> None:
    model, (ids, targets) = make(name), batch()
    full = loss_of(model, ids, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, ids, targets)
    loss.backward()
    assert abs(loss.item() - full.item()) < 2**-6 * full.item()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_without_logits(name: str) -> None:
    """GPT.loss and its gradients are those of cross-entropy over the logits, under autocast too."""
    model, (ids, targets) = make(name), batch()
    targets = targets.masked_fill(torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) < 0.2, -100)
    wanted = gradients(model, ids, targets)
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    plain = loss_of(model, ids, targets)
    assert abs(loss.item() - plain.item()) < 1e-6 * plain.item()
    for n, p in model.named_parameters():
        assert p.grad is not None and torch.allclose(
            p.grad, wanted[n], rtol=1e-4, atol=1e-5 * wanted[n].abs().max().item()
        )
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(ids, targets)
    low.backward()
    assert abs(low.item() - plain.item()) < 2**-6 * plain.item()
    with pytest.raises(ValueError, match=r"targets like ids \(3, 17\)"):
        model.loss(ids, targets[:, 1:])


def test_activation_checkpointing_changes_no_bit() -> None:
    """The reentrant kind first runs without gradients, where products are our own kernels': other bits there."""
    model, data = make("llama"), batch()
    wanted = gradients(model, *data)
    for block in model.blocks:
        forward = block.forward

        def again(*args: Any, _forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            return checkpoint(_forward, *args, use_reentrant=False, **kwargs)

        block.forward = again
    got = gradients(model, *data)
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


def test_modules_copy_and_pickle() -> None:
    model, data = make("llama"), batch()
    wanted = gradients(model, *data)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = gradients(other, *data)
        assert all(torch.equal(got[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_meta_tensors_train_on_paper(name: str) -> None:
    model = GPT(CONFIGS[name], device="meta")
    ids = torch.empty(2, 9, dtype=torch.int64, device="meta")
    loss_of(model, ids, ids).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_one_thread_and_two_train_alike() -> None:
    """Up to PyTorch's own matrix products, which are kept small enough here to be on one thread."""
    model, data = make("llama"), batch()
    wanted = gradients(model, *data)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        got = gradients(model, *data)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences_are_as_if_alone(name: str) -> None:
    """Bit for bit, and compiled too; the gradients are those of the sequences' sum."""
    model = make(name)
    lengths = (5, 1, 64, 17)
    g = torch.Generator().manual_seed(3)
    sequences = [torch.randint(0, 97, (n,), generator=g) for n in lengths]
    targets = [torch.randint(0, 97, (n,), generator=g) for n in lengths]
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    ids = torch.cat(sequences)[None]
    alone = torch.cat([model.hidden(s[None])[0] for s in sequences])
    torch.testing.assert_close(model.hidden(ids, cu_seqlens=cu_seqlens)[0], alone, rtol=0, atol=0)

    packed = model.loss(ids, torch.cat(targets)[None], cu_seqlens=cu_seqlens)
    packed.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = sum(model.loss(s[None], t[None], reduction="sum") for s, t in zip(sequences, targets)) / sum(lengths)
    assert isinstance(total, Tensor)
    total.backward()
    torch.testing.assert_close(packed, total, rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    again = compiled(ids, torch.cat(targets)[None], cu_seqlens=cu_seqlens)
    torch.testing.assert_close(again, packed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_without_a_target_skip_the_last_mlp(name: str) -> None:
    """Losses and log-probabilities keep their bits, gradients their values."""
    model = make(name).eval()
    g = torch.Generator().manual_seed(4)
    cu_seqlens = torch.tensor([0, 5, 6, 40], dtype=torch.int32)
    ids, targets = torch.randint(0, 97, (1, 40), generator=g), torch.randint(0, 97, (1, 40), generator=g)
    targets[:, torch.randperm(40, generator=g)[:23]] = -100
    rows = (targets[0] != -100).nonzero()[:, 0]
    all_states = model.hidden(ids, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(model.hidden(ids, cu_seqlens=cu_seqlens, rows=rows), all_states[:, rows], rtol=0, atol=0)

    wanted, entropy = ops.token_logprobs(all_states, model.head_weight(), targets, return_entropy=True)
    wanted.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen: list[int] = []
    block = model.blocks[-1]
    assert isinstance(block, Block)
    hook = block.mlp.register_forward_hook(lambda module, given, made: seen.append(given[0].shape[1]))
    found = model.logprobs(ids, targets, cu_seqlens=cu_seqlens, return_entropy=True)
    found[0].sum().backward()
    torch.testing.assert_close(found, (wanted, entropy), rtol=0, atol=0)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected.get(n), rtol=1e-4, atol=1e-6)
    model.loss(ids, targets, cu_seqlens=cu_seqlens)
    assert seen == [17, 17]
    each = model.loss(ids, targets, cu_seqlens=cu_seqlens, reduction="none")
    mean = model.loss(ids, targets, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(mean, each.sum() / 17, rtol=1e-6, atol=0)
    hook.remove()
    with pytest.raises(ValueError, match="expected rows"):
        model.hidden(ids, rows=rows)


def test_packing_says_what_is_wrong() -> None:
    model, ids = make("gpt2"), torch.zeros(1, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match="from 0 to 10, never falling"):
        model.hidden(ids, cu_seqlens=torch.tensor([0, 11], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens \(n \+ 1,\) int32"):
        model.hidden(ids, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="at most 64 tokens, got 65"):
        model.hidden(ids.new_zeros(1, 65), cu_seqlens=torch.tensor([0, 65], dtype=torch.int32))
    with pytest.raises(ValueError, match="one row"):
        model.hidden(ids.expand(2, 10), cu_seqlens=torch.tensor([0, 10], dtype=torch.int32))
