"""`gptfast demo`: a real model answers, then the same answer on fused kernels and on PyTorch's own ops; and a small
model goes through every stage by which a chatting model is made."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

import gptfast
from gptfast import hardware
from gptfast.generate import Generation, LanguageModel, load

QUESTION = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 48  # of each variant in the table
WIDTH = 100


@dataclass(frozen=True)
class Variant:
    """One way to compute the same model."""

    name: str
    weights: str | None
    activations: str | None
    backend: str | None


VARIANTS = (
    Variant("fused, int8", None, "int8", None),
    Variant("fused, exact", None, "exact", None),
    Variant("fused, fp32", "fp32", None, None),
    Variant("reference ops", "fp32", None, "reference"),
)


@dataclass(frozen=True)
class Measured:
    """What one variant did."""

    variant: Variant
    backend: str
    generation: Generation
    bytes_a_token: float  # weights and keys and values that one decode step reads at the least, on average

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_a_token * self.generation.stats.decode_tokens_per_s


def run(model: str = "smollm2", question: str = "", console: Console | None = None, recipe: bool = True) -> None:
    """The whole demonstration, with `recipe` the stages too. Raises what gptfast.load raises without the model."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDTH)
    question = question or QUESTION
    limit = _machine(console)
    lm = load(model)
    _answer(console, lm, question)
    prompt = lm.chat_prompt([{"role": "user", "content": question}])
    found = []
    for variant in VARIANTS:
        with console.status(f"[dim]{variant.name}: {len(prompt)} prompt tokens, {NEW_TOKENS} new ones[/]"):
            variant_lm = load(model, weights=variant.weights, activations=variant.activations, backend=variant.backend)
            found.append(_measure(variant_lm, variant, prompt))
    console.print(_table(found, limit))
    console.print(_caption(), style="dim")
    if recipe:
        taste(console)


def taste(console: Console) -> None:
    """The recipe's preset `taste` in a temporary folder: a line for each stage, and what a prompt gets after each."""
    from gptfast.train.recipe import Recipe

    console.print(
        "\n[bold]and a model made from text[/] [dim]in English and Chinese: pre-training, fine-tuning, reward model, "
        "reinforcement learning[/]"
    )
    with tempfile.TemporaryDirectory(prefix="gptfast-taste-") as folder, console.status("") as status:
        made = Recipe(Path(folder), "taste", quiet=True, say=lambda line: status.update(f"[dim]{escape(line)}[/]"))
        try:
            found = made.run()
        except OSError as error:
            console.print(f"left out: {error}", style="yellow", markup=False)
            return
    console.print(_stages(found))
    console.print(_said(found))
    console.print(
        f"{found['parameters'] / 1e6:.1f} M parameters, {found['minutes'] * 60:.0f} seconds: enough to see the stages "
        "work, not to talk sense. `gptfast recipe --preset tiny --out DIR` takes 15 minutes and leaves models, plots "
        "and a report card.",
        style="dim",
    )


def _stages(found: dict[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("stage", "seconds", "what it learnt"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    bits, ended, ranked = found["pretrain"]["bits_per_byte"], found["sft"]["ended"], found["reward"]["ranking"]
    ppo = found["ppo"]
    learnt = {
        "tokenizer": "",
        "pretrain": "bits per byte of held-out text: " + ", ".join(f"{name} {bits[name]:.2f}" for name in sorted(bits)),
        "sft": f"{ended['value']:.0%} of its answers to new questions end by themselves",
        "reward": f"puts {ranked['reward_model']['value']:.0%} of new pairs of sentences in people's order",
        "ppo": f"its answers score {ppo['gain_in_std']:+.1f} standard deviations, {ppo['kl']:.1f} nats away",
    }
    for name, text in learnt.items():
        table.add_row(name, f"{found['stages'][name]['seconds']:.0f}", text)
    return table


def _said(found: dict[str, Any]) -> Table:
    """A prompt like those that PPO trained on."""
    one = next(s for s in found["samples"] if "movie" in s["prompt"] or s is found["samples"][-1])
    table = Table(title=escape(one["prompt"]), title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    for name in ("base", "sft", "ppo"):
        table.add_row({"base": "pre-trained", "sft": "fine-tuned", "ppo": "after PPO"}[name], escape(one[name].strip()))
    return table


def _machine(console: Console) -> float | None:
    """Shows what is here; the measured bytes/s of memory, None where that can't be measured."""
    here = hardware.machine()
    limits = None
    if here.isa is not None:
        with console.status("[dim]measuring this machine's ceilings, once[/]"):
            limits = hardware.ceilings()
    lines = [f"[bold]{here.cpu}[/], {here.cores} cores, PyTorch {here.torch} with {here.threads} threads"]
    lines.append(f"CPU kernels: [bold]{here.isa or 'not built'}[/]")
    if limits is not None:
        best = {name: limits.best(name, here.threads) / 1e9 for name in ("dram", "fp32", "int8")}
        lines[-1] += f"; memory {best['dram']:.0f} GB/s, fp32 {best['fp32']:.0f} GFLOP/s, int8 {best['int8']:.0f} GOP/s"
    for name, reason in gptfast.backends().items():
        if reason is not None:
            lines.append(f"[dim]no {name}: {reason}[/]")
    console.print(
        Panel("\n".join(lines), title=f"gptfast {gptfast.__version__}", title_align="left", border_style="cyan")
    )
    return None if limits is None else limits.best("dram", here.threads)


def _answer(console: Console, lm: LanguageModel, question: str) -> None:
    """Streams the model's answer."""
    parameters = lm.model.config.parameters() / 1e6
    console.print(f"\n[bold cyan]{lm.name}[/] [dim]{parameters:.0f} M parameters: fluent English, weak facts[/]")
    console.print("[bold]you[/]    ", end="")
    console.print(question, markup=False)
    console.print("[bold]model[/]  ", end="")
    stream = lm.stream_chat([{"role": "user", "content": question}], temperature=0, max_new_tokens=160)
    indent = column = len("model  ")
    for piece in stream:
        if piece.startswith(" ") and column + len(piece) > console.width - 8:  # the word may go on in the next piece
            piece, column = "\n" + " " * indent + piece[1:], indent
        column = len(piece) - piece.rfind("\n") - 1 if "\n" in piece else column + len(piece)
        console.file.write(piece)
        console.file.flush()
    stats = stream.generation.stats
    console.print(f"\n[dim]{stats.decode_tokens + 1} tokens at {stats.decode_tokens_per_s:.1f} tokens/s[/]\n")


def _measure(lm: LanguageModel, variant: Variant, prompt: list[int]) -> Measured:
    """Greedy tokens, after a warm-up that touches every weight once."""
    lm.generate(prompt[:8], max_new_tokens=2, temperature=0, ignore_eos=True)
    generation = lm.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    middle = len(prompt) + NEW_TOKENS // 2
    return Measured(variant, lm.backend, generation, lm.model.bytes_per_step(1, middle))


def parting(ours: list[int], theirs: list[int]) -> int | None:
    """How many tokens are equal before the first that isn't; None where all are."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)


def _table(found: list[Measured], limit: float | None) -> Table:
    title = f"the same {NEW_TOKENS} greedy tokens after {found[0].generation.prompt_tokens} prompt tokens"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", "tokens", "prefill/s", "decode/s", "speed", "GB/s", "of limit"):
        table.add_column(column, justify="left" if column in ("", "tokens") else "right", no_wrap=True)
    base = found[-1].generation
    for m in found:
        stats = m.generation.stats
        apart = parting(m.generation.token_ids, base.token_ids)
        same = "equal" if apart is None else f"part at {apart + 1}"
        style = "bold" if m is found[0] else ""
        table.add_row(
            m.variant.name + ("" if m.backend == (m.variant.backend or "cpu") else f" ({m.backend})"),
            "reference" if m is found[-1] else same,
            f"{stats.prefill_tokens_per_s:,.0f}",
            f"{stats.decode_tokens_per_s:,.1f}",
            f"{stats.decode_tokens_per_s / base.stats.decode_tokens_per_s:.1f}x",
            f"{m.bytes_per_s / 1e9:.1f}",
            "" if limit is None else f"{m.bytes_per_s / limit:.0%}",
            style=style,
        )
    return table


def _caption() -> str:
    threads = torch.get_num_threads()
    return (
        "fused, int8 and exact: the file's own 4-bit weights, activations rounded to int8 or not (rounding is why "
        "their text may part from the others'). fp32 and the reference, plain PyTorch ops: the same weights widened. "
        f"One run of each on {threads} threads, tokens a second; the first new token counts as prefill. Decode reads "
        "every weight for each token: GB/s, and its part of what memory was measured to give. `gptfast bench` measures "
        "with more care."
    )
