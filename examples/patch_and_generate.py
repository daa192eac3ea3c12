"""Patch a Hugging Face GPT-2 and generate: the same tokens, sooner.

pip install "gptfast-kernels" "transformers>=5"
python examples/patch_and_generate.py [model]           # a name or folder; without one, a small random model
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import gptfast


def main(name: str | None = None) -> None:
    torch.manual_seed(0)
    model: Any
    if name is None:
        config = GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=5000, bos_token_id=None, eos_token_id=None)
        model = GPT2LMHeadModel(config).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(name).eval()
    ids = torch.randint(model.config.vocab_size, (1, 32))

    def generate() -> torch.Tensor:
        begin = time.perf_counter()
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
        print(f"  {(new.shape[1] - ids.shape[1]) / (time.perf_counter() - begin):.1f} tokens/s")
        return new

    print("as it is")
    wanted = generate()
    with gptfast.patched(model) as report:
        print(report)
        got = generate()
    assert torch.equal(got, wanted), "the patched model wrote something else"
    print("as it was")
    assert torch.equal(generate(), wanted)


if __name__ == "__main__":
    main(*sys.argv[1:2])
