"""Fine-tuning, reward models, DPO, PPO (on recorded rollouts): two processes compute what one does, within 1e-5."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_training import stage, trace

from gptfast.train.parallel import World
from gptfast.train.ppo import PPO
from gptfast.train.trainer import Stage, Trainer, make_optimizer
from tests.processes import together

STEPS, PROCESSES, KINDS = 3, 2, ("ddp", "fsdp")


def stages() -> dict[str, Stage]:
    """Fresh ones: two calls give the same."""
    names = ("sft", "reward", "ranked", "dpo", "dpo with adapters", "ppo")
    made = {name: stage(name, dropout=0.0, steps=STEPS) for name in names}
    ppo = made["ppo"]
    assert isinstance(ppo, PPO)
    recorded = [ppo.gather(step) for step in range(STEPS)]
    ppo.gather = lambda step: (recorded[step][0], {})
    return made


def losses(world: World) -> dict[str, list[float]]:
    found = {}
    for name, made in stages().items():
        made.world = world
        world.prepare(made.modules)
        optimizer = make_optimizer(made.modules, made.config)
        found[name] = [made.step(step, optimizer)["loss"] for step in range(STEPS)]
    return found


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    found = {kind: losses(World(rank, PROCESSES, kind)) for kind in KINDS}
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    # No teardown: a DDP reducer that holds the last reference to a gloo group joins its thread with Python's lock held,
    # which that thread may be waiting for (PyTorch 2.13).
    dist.barrier()
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_compute_what_one_does() -> None:
    """Of both kinds one after another, for the processes take longer to start than to train."""
    wanted = losses(World())
    with tempfile.TemporaryDirectory() as folder:
        together(process, folder, processes=PROCESSES)
        got = json.loads((Path(folder) / "losses.json").read_text())
    for name, alone in wanted.items():
        assert len(set(alone)) == STEPS, f"{name} learns nothing"
        for kind in KINDS:
            apart = max(abs(g - w) for g, w in zip(got[kind][name], alone, strict=True))
            assert apart <= 1e-5, f"{name}, {kind}: {got[kind][name]} against {alone}"


def saving(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    for name in EVALUATED:
        made = stage(name, dropout=0.0, **CUT)
        Trainer(made, Path(folder) / name, world=World(rank, PROCESSES, "fsdp"), quiet=True).run()
    dist.barrier()
    os._exit(0)


EVALUATED = ("reward", "dpo", "dpo with adapters")
CUT = {"steps": 4, "save_every": 2, "eval_every": 2, "log_every": 1}


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
def test_what_two_sharded_processes_save_after_an_evaluation_goes_on_in_one() -> None:
    """A forward pass without a backward one leaves parameters of FSDP2 whole, which must not be saved as parts."""
    with tempfile.TemporaryDirectory() as folder:
        together(saving, folder, processes=PROCESSES)
        for name in EVALUATED:
            run, alone = Path(folder) / name, Path(folder) / f"{name}-alone"
            Trainer(stage(name, dropout=0.0, **CUT), alone, quiet=True).run()
            for file in ("config.json", "model.safetensors"):
                assert (run / "model" / file).is_file()
            shutil.rmtree(run / "checkpoints" / "step-00000004")
            Trainer(stage(name, dropout=0.0, **CUT), run, quiet=True).run()
            both = [[float(loss) for _, loss in trace(r)] for r in (run, alone)]
            assert max(abs(a - b) for a, b in zip(*both, strict=True)) <= 1e-5
