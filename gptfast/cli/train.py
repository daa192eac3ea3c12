"""`gptfast train STAGE` and `gptfast recipe`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from gptfast.cli.console import err, out, reported


@reported
def train(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(help="tokenizer, pretrain, sft, reward, ppo, grpo or dpo.")],
) -> None:
    """Run one stage of training. `gptfast train STAGE --help` lists its dials."""
    from gptfast.train.run import main

    if stage in ("--help", "-h"):
        print(context.get_help())
        return
    code = main(stage, context.args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # PyTorch's own teardown of DDP on gloo can lock up: a thread is joined with Python's lock held.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


@reported
def recipe(
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Where everything goes; goes on if it is there.")],
    preset: Annotated[str, typer.Option(help="tiny (15 minutes on 2 cores), taste (two) or a published one.")] = "tiny",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same models, bit for bit.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="TensorBoard's files too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json and nothing else.")] = False,
) -> None:
    """Make a chatting model from text: tokenizer, pre-training, fine-tuning, reward model, PPO, report card."""
    from gptfast.train.recipe import Recipe
    from gptfast.train.report import summary

    if threads is not None:
        torch.set_num_threads(threads)
    made = Recipe(out_folder, preset, seed, tensorboard=tensorboard, quiet=as_json)
    try:
        found = made.run()
    except KeyboardInterrupt as error:
        err.print(f"{str(error) or 'stopped'}; the same command goes on", markup=False)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(found, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    for title in ("promise", "value", "bar", "kept"):
        table.add_column(title, justify="right" if title == "value" else "left")
    for check in found["checks"]:
        kept = "[green]yes[/]" if check["met"] else "[red]no[/]"
        table.add_row(check["name"], f"{check['value']:.3f}", check["bar"], kept)
    out.print(table)
    out.print(summary(found), soft_wrap=True, markup=False)
    out.print(f"{out_folder}/report.html shows it all; `gptfast chat --model {out_folder}/ppo/model` talks with it",
              soft_wrap=True, markup=False)  # fmt: skip
