"""A training loop in nanoGPT's manner on gptfast's own GPT: characters of a text file, then a sample.

python examples/train_like_nanogpt.py [text file] [steps]
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from gptfast.model import GPT, GPTConfig

CONTEXT, ROWS, WARMUP, RATE = 64, 8, 10, 1e-3


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return RATE * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / max(steps - WARMUP, 1)
    return RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def main(path: str | None = None, steps: int | str = 60) -> None:
    steps = int(steps)
    torch.manual_seed(0)
    text = Path(path or Path(__file__).parents[1] / "LICENSE").read_text()
    letters = sorted(set(text))
    data = torch.tensor([letters.index(c) for c in text])
    train, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    model = GPT(GPTConfig("gpt2", vocab_size=len(letters), n_layer=2, n_head=4, n_embd=64, context=CONTEXT))
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95))

    def loss_on(source: torch.Tensor) -> torch.Tensor:
        starts = torch.randint(len(source) - CONTEXT - 1, (ROWS,)).tolist()
        rows = torch.stack([source[s : s + CONTEXT + 1] for s in starts])
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    first = last = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_on(train)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        last = loss.item()
        first = first or last
        if step % 20 == 0 or step == steps - 1:
            with torch.no_grad():
                print(f"step {step:4}  train {last:.3f}  held out {loss_on(held_out):.3f} nats a character")
    assert last < first - 0.5, "it learns nothing"

    ids = train[:1][None]
    with torch.no_grad():
        for _ in range(CONTEXT - 1):
            ids = torch.cat([ids, model(ids)[:, -1:].softmax(-1)[0].multinomial(1)], 1)
    print("".join(letters[i] for i in ids[0].tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:3])
