"""Whole models on a GPU: greedy generation beside Hugging Face's own, and a training step of GPT-2 124M.

Weights are random and the same for both. Tokens are compared with the reference's in fp64 arithmetic by their logits
elsewhere (tests/test_backends_agree.py); here it is only counted how many of them are the other's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gptfast
from benchmarks.gpu_check import Report
from gptfast.generate import LanguageModel
from gptfast.layers import Embedding, Linear
from gptfast.model import GPT
from gptfast.quantize import GROUP, QuantizedWeight
from gptfast.train import AdamW

PROMPT, NEW = 128, 128
LLAMA: dict[str, dict[str, Any]] = {
    "SmolLM2 135M": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=2048,
    ),
    "Llama 3.2 1B": dict(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=4096,
    ),
}  # fmt: skip


def huggingface(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """The model by name, on the GPU, with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(0)
    ends: dict[str, Any] = dict(bos_token_id=0, eos_token_id=0)
    if name in LLAMA:
        config: Any = LlamaConfig(**LLAMA[name], **ends)
        made: Any = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)
    else:
        config = GPT2Config(**ends, **options)
        made = GPT2LMHeadModel._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return made.cuda()


def quantised(model: GPT, kind: str) -> GPT:
    """The model with its matrices quantised."""
    for module in model.modules():
        if not isinstance(module, Linear | Embedding) or module is model.positions:
            continue
        weight = module.weight
        if isinstance(weight, Tensor) and weight.shape[1] % GROUP == 0:
            module.set_weight(QuantizedWeight.quantize(weight.detach().float().cpu(), kind).moved(Tensor.cuda))
    return model.float()


def run_models(report: Report, seconds: float) -> None:
    """Fills the report's generation and training."""
    end, rows = time.monotonic() + seconds, list[dict[str, Any]]()
    for name in ("GPT-2 124M", *LLAMA):
        for row in generation(name, end, report.parts["ceilings"]["copy GB/s"]):
            rows.append(row)
            report.add("generation", rows)
            print(row, flush=True)
    steps: list[dict[str, Any]] = []
    for row in training(end):
        steps.append(row)
        report.add("training", steps)
        print(row, flush=True)


def generation(name: str, end: float, copies: float) -> Iterator[dict[str, Any]]:
    """Rows of one model: bf16 beside Hugging Face's, then 4 bits."""
    theirs = huggingface(name, torch.bfloat16).eval()
    model = GPT.from_huggingface_model(theirs).cuda().eval()
    small = model.config.parameters() < 5e8  # others take long to quantise
    for kind in ("bf16", "q4_0") if small else ("bf16",):
        lm = LanguageModel(model if kind == "bf16" else quantised(model, kind))
        for batch in (1, 8, 64):
            if time.monotonic() > end:
                return
            row: dict[str, Any] = {"model": name, "weights": kind, "batch": batch}
            ids = torch.randint(1, 40000, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
            try:
                row |= ours(lm, ids, copies)
                if kind == "bf16":
                    row |= beside(theirs, ids, row)
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            row.pop("tokens", None)
            yield row


def ours(lm: LanguageModel, ids: Tensor, copies: float) -> dict[str, Any]:
    """Milliseconds of a prefill and of a decode step, the best of three, and the part of the memory's rate."""
    made = [lm.generate(ids.tolist(), max_new_tokens=NEW, temperature=0, ignore_eos=True) for _ in range(4)]
    best = min((calls[0].stats for calls in made[1:]), key=lambda stats: stats.decode_s)
    step = best.decode_s / (NEW - 1)
    moved = lm.model.bytes_per_step(len(ids), PROMPT + NEW // 2, lm.cache_dtype)
    return {
        "prefill_ms": round(1e3 * best.prefill_s, 2),
        "step_ms": round(1e3 * step, 3),
        "tokens_per_s": round(len(ids) / step),
        "of_copy_%": round(100 * moved / step / 1e9 / copies, 1),
        "tokens": [g.token_ids for g in made[-1]],
    }


@torch.inference_mode()
def beside(theirs: Any, ids: Tensor, row: dict[str, Any]) -> dict[str, Any]:
    """The same by Hugging Face: a step is what a token more takes."""
    ids = ids.cuda()
    mask = torch.ones_like(ids)
    few = NEW // 4

    def generate(new: int) -> tuple[float, Tensor]:
        torch.cuda.synchronize()
        began = time.perf_counter()
        made = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )
        torch.cuda.synchronize()
        return time.perf_counter() - began, made[:, PROMPT:]

    generate(2)
    (one, _), (some, tokens) = generate(1), generate(few + 1)
    step = (some - one) / few
    equal = sum(a == b for mine, other in zip(row["tokens"], tokens.tolist()) for a, b in zip(mine, other))
    return {
        "theirs_step_ms": round(1e3 * step, 3),
        "x theirs": round(1e3 * step / row["step_ms"], 2),
        "equal_tokens": f"{equal} of {tokens.numel()}",
    }


def training(end: float, batch: int = 8, length: int = 1024) -> Iterator[dict[str, Any]]:
    """A step of GPT-2 124M in bf16: ours, also with its forward and backward as a CUDA graph; patched; Hugging Face's
    own, and compiled."""
    ids = torch.randint(0, 50257, (batch, length + 1), generator=torch.Generator().manual_seed(1)).cuda()
    for name in ("ours", "ours, captured", "patched", "eager", "compiled"):
        if time.monotonic() > end:
            return
        row: dict[str, Any] = {"step": name, "batch": batch, "length": length}
        try:
            row |= _step_times(_stepper(name), ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        except Exception as error:
            row["note"] = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        torch.cuda.empty_cache()
        yield row


def _stepper(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    theirs = huggingface("GPT-2 124M", torch.bfloat16, use_cache=False, **dropout).train()
    model: Any = theirs
    if name.startswith("ours"):
        model = GPT.from_huggingface_model(theirs).cuda().train()
    elif name == "patched":
        gptfast.patch(model)
    run = torch.compile(model) if name == "compiled" else model
    mine = name in ("ours", "ours, captured", "patched")
    optimiser: Any
    if mine:
        optimiser = AdamW(model.parameters(), lr=3e-4, max_norm=1.0)
    else:
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    if name == "ours, captured":
        return _captured(model, optimiser)

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        if name == "ours":
            loss = model.loss(ids, targets)
        else:
            loss = run(input_ids=ids, labels=ids, shift_labels=targets).loss
        loss.backward()
        if not mine:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def _captured(model: GPT, optimiser: AdamW) -> Callable[[Tensor, Tensor], Tensor]:
    """A step whose forward and backward are captured when it is first called, as PyTorch's notes on CUDA graphs say."""
    graph, held = torch.cuda.CUDAGraph(), list[Tensor]()

    def step(ids: Tensor, targets: Tensor) -> Tensor:
        if not held:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                model.loss(ids, targets).backward()
            torch.cuda.current_stream().wait_stream(aside)
            optimiser.zero_grad()
            held.extend((ids.clone(), targets.clone()))
            with torch.cuda.graph(graph):
                loss = model.loss(*held)
                loss.backward()
            held.append(loss.detach())
        held[0].copy_(ids)
        held[1].copy_(targets)
        graph.replay()  # writes the gradients anew: nothing need be zeroed
        optimiser.step()
        return held[2].clone()

    return step


def _step_times(step: Callable[[Tensor, Tensor], Tensor], ids: Tensor, targets: Tensor) -> dict[str, Any]:
    losses, times = [step(ids, targets) for _ in range(3)], []
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(10):
        began = time.perf_counter()
        losses.append(step(ids, targets))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    ms = 1e3 * sorted(times)[len(times) // 2]
    return {
        "ms": round(ms, 2),
        "tokens_per_s": round(1e3 * ids.numel() / ms),
        "peak_MB_beyond": round((torch.cuda.max_memory_allocated() - held) / 1e6),
        "losses": [round(losses[i].item(), 4) for i in (0, 2, 12)],
    }
