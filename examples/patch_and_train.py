"""Patch a Hugging Face GPT-2 and train it for 20 steps beside one that isn't patched: the same losses.

python examples/patch_and_train.py
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gptfast

STEPS, ROWS, LENGTH = 20, 4, 64


def batches() -> list[torch.Tensor]:
    """Bytes of this repository's license, (ROWS, LENGTH) a step."""
    text = torch.frombuffer(bytearray((Path(__file__).parents[1] / "LICENSE").read_bytes()), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - LENGTH, (STEPS, ROWS), generator=generator)
    return [torch.stack([text[s : s + LENGTH] for s in row]) for row in starts.tolist()]


def train(model: GPT2LMHeadModel) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    model.train()
    for ids in batches():
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    no_dropout: dict[str, Any] = dict(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )  # or each would drop something else
    config = GPT2Config(
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        n_layer=2,
        n_embd=64,
        n_head=4,
        n_positions=LENGTH,
        **no_dropout,
    )
    plain = GPT2LMHeadModel(config)
    fast = copy.deepcopy(plain)
    print(gptfast.patch(fast))
    pairs = list(zip(train(plain), train(fast)))
    for step, (a, b) in enumerate(pairs):
        print(f"step {step:2}  {a:.6f}  {b:.6f}")
    assert max(abs(a - b) for a, b in pairs) < 1e-3, "the losses differ"
    assert pairs[-1][1] < pairs[0][1] - 1, "it learns nothing"


if __name__ == "__main__":
    main()
