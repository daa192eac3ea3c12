"""Two processes (gloo) with DDP and with FSDP2 train as one process does."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gptfast.model import GPT, GPTConfig
from tests.processes import together

STEPS, PROCESSES = 4, 2
CONFIG = GPTConfig(
    *("llama", 97, 2, 4, 48, 64), n_kv_head=2, norm="rms_norm", positions="rope", activation="swiglu", ffn_dim=80
)


def train(model: nn.Module, rank: int, processes: int) -> list[float]:
    """The loss of each step over the whole batch, of which this process computes its part."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 97, (4, 18), generator=torch.Generator().manual_seed(3))[rank::processes]
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    return losses


def make() -> GPT:
    torch.manual_seed(1)
    return GPT(CONFIG)


def process(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model: Any = make()
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    losses = train(model, rank, PROCESSES)
    if rank == 0:
        torch.save(torch.tensor(losses), Path(folder) / "losses.pt")
    # No teardown: a DDP reducer that holds the last reference to a gloo group joins its thread with Python's lock held,
    # which that thread may be waiting for (PyTorch 2.13).
    dist.barrier()
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind: str) -> None:
    wanted = train(make(), 0, 1)
    assert wanted[-1] < wanted[0]
    with tempfile.TemporaryDirectory() as folder:
        together(process, kind, folder, processes=PROCESSES)
        got = torch.load(Path(folder) / "losses.pt", weights_only=True).tolist()
    assert max(abs(g - w) for g, w in zip(got, wanted)) <= 1e-5
