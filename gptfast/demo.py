"""`gptfast demo`: a real model answers, then the same answer on fused kernels and on PyTorch's own ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

import gptfast
from gptfast import hardware
from gptfast.generate import Generation, LanguageModel, load

QUESTION = "Explain in three sentences why the sky is blue."
NEW_TOKENS = 64  # of each variant in the table
WIDTH = 100


@dataclass(frozen=True)
class Variant:
    """One way to compute the same model."""

    name: str
    weights: str | None
    activations: str | None
    backend: str | None


VARIANTS = (
    Variant("fused, 4 bits, int8 activations", None, "int8", None),
    Variant("fused, 4 bits, exact", None, "exact", None),
    Variant("fused, fp32", "fp32", None, None),
    Variant("reference PyTorch ops, fp32", "fp32", None, "reference"),
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


def run(model: str = "smollm2", question: str = "", console: Console | None = None) -> None:
    """The whole demonstration. Raises what gptfast.load raises where the model isn't there."""
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
            found.append(_measure(load(model, **_options(variant)), variant, prompt))
    console.print(_table(found, limit))
    console.print(_caption(), style="dim")


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
    for piece in stream:
        console.file.write(piece)
        console.file.flush()
    stats = stream.generation.stats
    console.print(f"\n[dim]{stats.decode_tokens + 1} tokens at {stats.decode_tokens_per_s:.1f} tokens/s[/]\n")


def _options(variant: Variant) -> dict[str, str | None]:
    return {"weights": variant.weights, "activations": variant.activations, "backend": variant.backend}


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
        f"One run of each on {threads} threads; tokens a second, the first new token counted as prefill. Decode reads "
        "every weight for each token: GB/s, and how much of what memory was measured to give. int8 activations are "
        "rounded, so their text may part from the others'. `gptfast bench` measures with more care, against more."
    )
