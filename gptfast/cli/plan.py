"""`gptfast plan`: training and serving on paper."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.panel import Panel
from rich.table import Table

from gptfast.cli.console import out, reported
from gptfast.formats.files import read_json
from gptfast.model.config import GPTConfig
from gptfast.model.presets import PRESETS, preset
from gptfast.train import plan as planning
from gptfast.train.plan import Job, Plan, Serving, Training


@reported
def plan(
    model: Annotated[str, typer.Option("--model", "-m", help="A preset, or a folder with config.json.")] = "gpt2-124m",
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to train on.")] = 8,
    gpu: Annotated[str, typer.Option(help=f"{', '.join(planning.BOARDS)}.")] = "h100",
    tokens: Annotated[str | None, typer.Option(help="To train on: 300e9, 1.4T; 20 a parameter if not given.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of a sequence; the model's if not given.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a step; half a million tokens if not.")] = None,
    micro: Annotated[int, typer.Option(min=0, help="Sequences of one GPU at once; the fastest if not given.")] = 0,
    precision: Annotated[str, typer.Option(help="bf16 (with fp32 AdamW) or fp32.")] = "bf16",
    parallel: Annotated[str, typer.Option(help="auto, ddp, zero1, fsdp or tp.")] = "auto",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Compute activations again.")] = False,
    mfu: Annotated[float, typer.Option(help="Part of the peak FLOP/s that is reached.")] = planning.MFU,
    mbu: Annotated[float, typer.Option(help="Part of the memory's bandwidth that is reached.")] = planning.MBU,
    price: Annotated[float | None, typer.Option(min=0, help="Of a GPU for an hour.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Sequences served together.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What training and serving a model would take: memory, time, communication, cost."""
    job = Job(
        config(model), gpu.lower(), gpus, 0.0 if tokens is None else number(tokens), context or 0, batch or 0, micro,
        precision, parallel, checkpointing, mfu, mbu, price, rows,
    )  # fmt: skip
    found = planning.plan(job)
    if as_json:
        print(json.dumps(as_object(found), ensure_ascii=False))
    else:
        show(model, found)


def config(model: str) -> GPTConfig:
    """A preset's configuration, or that of a folder. Raises ValueError that says what there is."""
    if model in PRESETS:
        return preset(model)
    file = Path(model) / "config.json"
    if file.is_file():
        return GPTConfig.from_huggingface(read_json(file))
    raise ValueError(f"expected a folder with config.json or a preset among {', '.join(PRESETS)}, got {model!r}")


def number(text: str) -> float:
    """300e9, 10B, 1.4T."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    unit = units.get(text[-1:].upper(), 1.0)
    try:
        found = float(text[:-1] if unit != 1.0 else text) * unit
    except ValueError:
        found = 0.0
    if found == 0:
        raise ValueError(f"expected --tokens as a number such as 300e9, 10B or 1.4T, got {text!r}")
    return found


def as_object(found: Plan) -> dict[str, Any]:
    """The plan for programs: SI units, bytes and seconds."""
    job = {k: v for k, v in vars(found.job).items() if k != "config"}
    job |= {"parameters": found.job.config.parameters(), "gpu": found.job.board.gpu.name}
    whole = {"job": job, "training": dataclasses.asdict(found.training), "serving": dataclasses.asdict(found.serving)}
    whole["training"] |= {"memory": found.training.memory, "fits": found.training.fits}
    whole["serving"]["fits"] = found.serving.fits
    return whole | {"smallest": found.smallest}


def show(name: str, found: Plan) -> None:
    """The plan for people."""
    job = found.job
    c, b = job.config, job.board
    kv = f", {c.n_kv_head} of keys" if c.n_kv_head != c.n_head else ""
    head = (
        f"[bold]{si(c.parameters())}[/] parameters: {c.n_layer} layers of {c.n_embd:,}, {c.n_head} heads{kv}, "
        f"context {job.context:,}\n"
        f"[bold]{job.gpus:,} x {b.gpu.name}[/]: {si(job.peak)}FLOP/s in {job.precision}, {b.memory / 1e9:.0f} GB at "
        f"{b.gpu.bytes_per_s / 1e12:.1f} TB/s, links {b.link / 1e9:g} GB/s, network {b.network / 1e9:g} GB/s each"
    )
    out.print(Panel(head, title=f"plan for {name}", title_align="left", border_style="cyan", expand=False))
    out.print(_memory(found.training))
    out.print(_training(job, found.training))
    out.print(_serving(job, found.serving))
    ways = ", ".join(f"{k} {'more than ' + format(planning.MOST, ',') if n is None else format(n, ',')}"
                     for k, n in found.smallest.items())  # fmt: skip
    out.print(f"[bold]fewest GPUs[/] that hold the training (activations computed again): {ways}")
    out.print(
        f"Assumed: {job.mfu:.0%} of the peak FLOP/s (Llama 3: 38-43%), {job.mbu:.0%} of the memory's bandwidth, "
        f"{planning.RESERVED:.0%} of memory kept free. Formulas and sources: gptfast/train/plan.py.",
        style="dim",
    )


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False,
                  pad_edge=False)  # fmt: skip
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="dim")
    return table


def _memory(t: Training) -> Table:
    how = f"{t.parallel}, {t.tensor} GPUs to a layer" if t.tensor > 1 else t.parallel
    how += f", {t.micro} sequence{'s' * (t.micro > 1)} at once"
    table = _table(f"memory of a GPU in training ({how})")
    table.add_row("weights", gb(t.weights), "")
    table.add_row("gradients", gb(t.gradients), "")
    table.add_row("optimiser", gb(t.optimizer), "AdamW's moments and the fp32 copy")
    if t.gathered:
        table.add_row("gathered", gb(t.gathered), "two blocks' weights at a time")
    kept, other = t.activations, t.activations_checkpointed
    if t.checkpointing:
        table.add_row("activations", gb(other), f"computed again; all kept: {gb(kept)}")
    else:
        table.add_row("activations", gb(kept), f"computed again (a third more FLOPs): {gb(other)}")
    verdict = "[green]fits[/]" if t.fits else f"[red]doesn't fit[/]: {t.memory / t.capacity:.1f} times too much"
    table.add_row("[bold]together[/]", f"[bold]{gb(t.memory)}[/]", f"of {gb(t.capacity)} usable: {verdict}")
    return table


def _training(job: Job, t: Training) -> Table:
    table = _table("training")
    table.add_row("tokens", si(job.tokens), f"{job.tokens / job.config.parameters():.1f} a parameter; {t.steps:,.0f} "
                  f"steps of {job.batch:,} x {job.context:,}")  # fmt: skip
    more = "; a forward pass more in this plan" if t.checkpointing else ""
    table.add_row("FLOPs", f"{t.flops:.2e}", f"6 N D = {t.flops_6nd:.2e}{more}")
    table.add_row("time", f"[bold]{duration(t.hours * 3600)}[/]", f"{t.hours * t.gpus:,.0f} GPU hours")
    table.add_row("speed", f"{si(t.tokens_per_s)} tokens/s", f"{t.tokens_per_s / t.gpus:,.0f} a GPU")
    hidden = "hides behind it" if t.sent_s <= t.compute_s else "[red]is what a step waits for[/]"
    table.add_row("a step", seconds(t.step_s), f"computing {seconds(t.compute_s)}")
    if t.sent:
        table.add_row("sent in a step", gb(t.sent), f"by each GPU: {seconds(t.sent_s)}, {hidden}")
    if t.cost is not None:
        table.add_row("cost", f"[bold]{t.cost:,.0f}[/]", f"at {job.price:g} a GPU hour")
    return table


def _serving(job: Job, s: Serving) -> Table:
    table = _table(f"serving {s.rows} sequences of {s.context:,} tokens on {s.tensor} GPU{'s' * (s.tensor > 1)}")
    table.add_row("weights", gb(s.weights), "of each GPU")
    verdict = f"room for {s.most_rows:,} sequences" if s.fits else "[red]doesn't fit[/]"
    table.add_row("KV cache", gb(s.kv_cache), f"{gb(s.kv_cache / s.rows)} a sequence; {verdict}")
    table.add_row("prefill", f"{si(s.prefill_per_s)} tokens/s", "bound by FLOPs")
    waits = {"memory": "memory's bandwidth", "compute": "FLOPs", "link": "the links between GPUs"}[s.bound]
    table.add_row("decode", f"[bold]{si(s.decode_per_s)} tokens/s[/]",
                  f"{1 / s.step_s:,.1f} a sequence, bound by {waits}")  # fmt: skip
    if s.cost_per_million is not None:
        table.add_row("a million tokens", f"{s.cost_per_million:,.2f}", f"at {job.price:g} a GPU hour")
    return table


def si(value: float) -> str:
    """1.75e11 as 175 G."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"


def seconds(value: float) -> str:
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"


def duration(value: float) -> str:
    for unit, size in (("years", 365.25 * 86400), ("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if value >= 2 * size:
            return f"{value / size:,.1f} {unit}"
    return seconds(value)
