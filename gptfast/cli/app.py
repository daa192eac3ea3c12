"""gptfast generate | chat | info | bench | demo | data | train | recipe | export | plan."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import gptfast
from gptfast.cli.console import out, reported, settings, waiting, write
from gptfast.cli.data import data
from gptfast.cli.export import export
from gptfast.cli.kernels import kernels
from gptfast.cli.plan import plan
from gptfast.cli.train import recipe, train
from gptfast.generate import DraftModel, Generation, LanguageModel, load

app = typer.Typer(
    help="GPT models made fast with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a .gguf file or a Hugging Face folder.")]
Weights = Annotated[
    str | None, typer.Option(help="fp32, bf16, fp16, q8, q4, q8_0, q4_0 or q4_1; as stored where not given.")
]
Activations = Annotated[str | None, typer.Option(help="exact or int8; the fast choice where not given.")]
KVCacheDtype = Annotated[
    str | None, typer.Option("--kv-cache", help="fp32, bf16, fp16 or int8; the fast choice if not given.")
]
Backend = Annotated[str | None, typer.Option(help="reference, cpu, triton or cuda; the best one where not given.")]
Device = Annotated[str | None, typer.Option(help="As PyTorch names it: cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
MaxNew = Annotated[int, typer.Option(min=0, help="Tokens to write at most.")]
MinNew = Annotated[int, typer.Option(min=0, help="No end before so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Only the k likeliest tokens; 0 = all.")]
TopP = Annotated[float, typer.Option(help="Only the likeliest tokens that make up this probability.")]
MinP = Annotated[float, typer.Option(help="Only tokens at least so likely as this part of the likeliest.")]
TypicalP = Annotated[float, typer.Option(help="Only the most typical tokens that make up this probability.")]
Repetition = Annotated[float, typer.Option(help="Above 1: tokens that were there are less likely.")]
Presence = Annotated[float, typer.Option(help="Taken off the logit of tokens written before.")]
Frequency = Annotated[float, typer.Option(help="Taken off it for each time.")]
Seed = Annotated[int | None, typer.Option(help="The same seed writes the same text; drawn where not given.")]
Speculation = Annotated[
    str | None, typer.Option(help="prompt-lookup: guesses from the text so far; same text, sooner.")
]
DraftOption = Annotated[str | None, typer.Option(help="A smaller model with the same tokens that guesses; same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. May be given several times.")]


@app.callback()
def common(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where errors come from.")] = False,
) -> None:
    settings["traceback"] = traceback


def open_model(
    model: str,
    weights: str | None,
    activations: str | None,
    kv_cache: str | None,
    backend: str | None,
    device: str | None,
    threads: int | None,
) -> LanguageModel:
    """The model as the options ask for it."""
    if threads is not None:
        torch.set_num_threads(threads)
    with waiting(f"loading {model}"):
        return load(model, weights=weights, activations=activations, kv_cache=kv_cache, backend=backend, device=device)


def _speculation(name: str | None, draft: str | None, *how: str | None) -> Any:
    """What --speculation and --draft ask for."""
    if draft is None:
        return name
    if name is not None:
        raise ValueError(f"expected either --speculation or --draft, got {name} and {draft}")
    activations, backend, device = how
    return DraftModel(open_model(draft, None, activations, None, backend, device, None))


@app.command()
@reported
def generate(
    model: Model = "smollm2",
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[str | None, typer.Option(help="A file with the text to continue; - is stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a message: answer it.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat, the system message.")] = None,
    max_new_tokens: MaxNew = 256,
    min_new_tokens: MinNew = 0,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    typical_p: TypicalP = 1.0,
    repetition_penalty: Repetition = 1.0,
    presence_penalty: Presence = 0.0,
    frequency_penalty: Frequency = 0.0,
    seed: Seed = None,
    n: Annotated[int, typer.Option(min=1, help="Texts to write.")] = 1,
    stop: Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Don't end at the model's end token.")] = False,
    parse_special: Annotated[bool, typer.Option("--parse-special", help="<|name|> means the token.")] = False,
    logprobs: Annotated[bool, typer.Option("--logprobs", help="With --json: log-probabilities.")] = False,
    speculation: Speculation = None,
    draft: DraftOption = None,
    weights: Weights = None,
    activations: Activations = None,
    kv_cache: KVCacheDtype = None,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Continue a text."""
    text = _prompt_text(prompt, prompt_file)
    if system is not None and not chat:
        raise ValueError("--system needs --chat")
    lm = open_model(model, weights, activations, kv_cache, backend, device, threads)
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
        parse_special=parse_special,
        speculation=_speculation(speculation, draft, activations, backend, device),
    )
    messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]
    start = lm.chat_prompt(messages) if chat else text
    with waiting("reading the prompt") as wait:
        options["progress"] = wait.progress
        if as_json or n > 1:
            found = lm.generate(start, n=n, return_logprobs=logprobs, **options)
            wait.stop()
            _print_texts(lm, found if isinstance(found, list) else [found], as_json)
        else:
            stream = lm.stream(start, **options)
            try:
                for piece in stream:
                    wait.stop()
                    write(piece)
            except KeyboardInterrupt:
                stream.close()
            out.print()
            out.print(stats_line(lm, stream.generation), style="dim", soft_wrap=True)


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("expected either --prompt or --prompt-file, got " + ("neither" if prompt is None else "both"))
    if prompt is not None:
        return prompt
    data = sys.stdin.buffer.read() if prompt_file == "-" else Path(str(prompt_file)).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a prompt in UTF-8, got {error.reason} at byte {error.start}") from None


def _print_texts(lm: LanguageModel, found: list[Generation], as_json: bool) -> None:
    if as_json:
        first = {"model": lm.name, **found[0].to_dict(), "backend": lm.backend, "threads": torch.get_num_threads()}
        samples = [{k: v for k, v in vars(g).items() if k != "stats" and v is not None} for g in found]
        print(json.dumps(first | ({"samples": samples} if len(found) > 1 else {}), ensure_ascii=False))
        return
    for i, generation in enumerate(found):
        out.print(f"[dim]{i + 1}.[/] ", end="")
        write(generation.text + "\n")
    out.print(stats_line(lm, found[0]), style="dim", soft_wrap=True)


def stats_line(lm: LanguageModel, generation: Generation) -> str:
    """One line on how a call went."""
    s = generation.stats
    parts = [
        f"{generation.prompt_tokens} + {len(generation.token_ids)} tokens",
        f"prefill {s.prefill_tokens_per_s:.0f}/s",
    ]
    parts += [f"decode {s.decode_tokens_per_s:.1f}/s"] if s.decode_tokens else []
    parts += [f"{s.accepted} of {s.drafted} guesses right"] if s.drafted else []
    parts += [f"ends by {generation.finish_reason}", f"seed {generation.seed}", f"backend {lm.backend}"]
    return " · ".join(parts)


@app.command()
@reported
def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    speculation: Speculation = None,
    draft: DraftOption = None,
    weights: Weights = None,
    activations: Activations = None,
    kv_cache: KVCacheDtype = None,
    backend: Backend = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Talk with a model. /help lists what can be said to the program itself."""
    from gptfast.cli.chat import Chat

    lm = open_model(model, weights, activations, kv_cache, backend, device, threads)
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
    )
    Chat(lm, system, options, _speculation(speculation, draft, activations, backend, device)).run()


@app.command()
@reported
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure the ceilings again.")] = False,
) -> None:
    """This machine, its ceilings, and which backends are here."""
    from gptfast import hardware
    from gptfast.cli.info import print_info

    machine = hardware.machine()
    with waiting("measuring this machine's ceilings"):
        ceilings = hardware.ceilings(refresh) if machine.isa is not None else None
    if as_json:
        found = {
            "gptfast": gptfast.__version__,
            "machine": dataclasses.asdict(machine),
            "ceilings": dataclasses.asdict(ceilings)["rates"] if ceilings is not None else None,
            "backends": gptfast.backends(),
        }
        print(json.dumps(found, ensure_ascii=False))
    else:
        print_info(machine, ceilings)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@reported
def bench(context: typer.Context) -> None:
    """Time ops and generation against PyTorch, each checked first. `gptfast bench --help` lists its options."""
    from gptfast.bench.cli import main

    raise typer.Exit(main(context.args))


@app.command()
@reported
def demo(
    model: Model = "smollm2",
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")] = "",
    recipe: Annotated[bool, typer.Option(help="Train a small model through every stage too, for a minute.")] = True,
    threads: Threads = None,
) -> None:
    """A real model answers, then the same answer on fused kernels and on PyTorch's own ops, side by side; and a small
    model goes through every stage of the recipe."""
    from gptfast.demo import run

    if threads is not None:
        torch.set_num_threads(threads)
    run(model, question, recipe=recipe)


app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train)
app.command()(recipe)
app.command()(export)
app.command()(plan)
app.command()(kernels)
app.add_typer(data, name="data")
