"""Fine-tuning, reward models, DPO, PPO (on recorded rollouts): two processes compute what one does, within 1e-5."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_training import tokenizer as make_tokenizer
from torch.multiprocessing.spawn import spawn

from gptfast.formats.chat import CHATML
from gptfast.formats.tokenizer import Tokenizer
from gptfast.model import GPT, GPTConfig
from gptfast.train.data import Chat, Preference
from gptfast.train.dpo import DPO, DPOConfig
from gptfast.train.parallel import World
from gptfast.train.ppo import PPO, PPOConfig
from gptfast.train.ranked import Answer, Ranked, RankedConfig
from gptfast.train.reward import Reward, RewardConfig, RewardModel
from gptfast.train.sft import SFT, SFTConfig
from gptfast.train.trainer import Stage, make_optimizer

STEPS, PROCESSES = 3, 2
ASK = [{"role": "user", "content": "say hello"}]


def model(words: Tokenizer) -> GPT:
    torch.manual_seed(4)
    return GPT(GPTConfig("llama", words.vocab_size, 2, 4, 32, 128, norm="rms_norm", positions="rope", n_kv_head=2,
                         activation="swiglu", eos_ids=(1,)))  # fmt: skip


def stages() -> dict[str, Stage]:
    """Fresh ones: two calls give the same."""
    words = make_tokenizer()
    words.chat_template = CHATML
    texts = [f"the cat {i} sat " + "on the mat " * (i % 5) for i in range(24)]
    chats = [Chat([*ASK, {"role": "assistant", "content": text}], "en", "x") for text in texts]
    pairs = [Preference(ASK, a, b, "en", "x", 1.0) for a, b in zip(texts[::2], texts[1::2])]
    answers = [Answer(ASK, text, float(i % 7)) for i, text in enumerate(texts)]
    common: dict[str, Any] = dict(steps=STEPS, lr=1e-3, warmup=0)
    made: dict[str, Stage] = {
        "sft": SFT(SFTConfig(batch_size=8, **common), model(words), words, chats),
        "reward": Reward(RewardConfig(batch_size=6, **common), RewardModel(model(words)), words, pairs),
        "ranked": Ranked(RankedConfig(batch_size=12, **common), RewardModel(model(words)), words, answers),
        "dpo": DPO(DPOConfig(batch_size=6, **common), model(words), words, pairs),
    }
    dials: dict[str, Any] = dict(prompts_per_step=8, max_new_tokens=12, epochs=2, minibatches=2)
    ppo = PPO(
        PPOConfig(**common, **dials), model(words), words, [ASK, ASK * 1], lambda p, r: [float(len(x)) for x in r]
    )
    recorded = [ppo.gather(step) for step in range(STEPS)]
    ppo.gather = lambda step: (recorded[step][0], {})
    return made | {"ppo": ppo}


def losses(world: World) -> dict[str, list[float]]:
    found = {}
    for name, stage in stages().items():
        stage.world = world
        world.prepare(stage.modules)
        optimizer = make_optimizer(stage.modules, stage.config)
        found[name] = [stage.step(step, optimizer)["loss"] for step in range(STEPS)]
    return found


def process(rank: int, kind: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    found = losses(World(rank, PROCESSES, kind))
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(found))
    # No teardown: a DDP reducer that holds the last reference to a gloo group joins its thread with Python's lock held,
    # which that thread may be waiting for (PyTorch 2.13).
    dist.barrier()
    os._exit(0)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_compute_what_one_does(kind: str) -> None:
    wanted = losses(World())
    with tempfile.TemporaryDirectory() as folder:
        spawn(process, args=(kind, folder), nprocs=PROCESSES)
        got = json.loads((Path(folder) / "losses.json").read_text())
    for name, alone in wanted.items():
        assert len(set(alone)) == STEPS, f"{name} learns nothing"
        apart = max(abs(g - w) for g, w in zip(got[name], alone, strict=True))
        assert apart <= 1e-5, f"{name}: {got[name]} against {alone}"
