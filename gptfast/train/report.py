"""The recipe's report card: every figure by name (report.json), a page to read (report.md), and one to look at
(report.html, with plots)."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import gptfast
from gptfast import hardware
from gptfast.formats.extras import need
from gptfast.formats.files import replacing
from gptfast.train.logs import read_table

if TYPE_CHECKING:
    from gptfast.train.recipe import Recipe

LANGUAGES = {"en": "English", "zh": "Chinese"}


class Check(NamedTuple):
    """A figure and what it should be."""

    name: str
    value: float
    bar: str
    met: bool
    note: str = ""


def write_report(recipe: Recipe) -> dict[str, Any]:
    """Writes the three files into the recipe's folder; report.json's content."""
    found = collect(recipe)
    plots = draw(recipe, found)
    texts = {
        "report.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        "report.md": markdown(found),
        "report.html": page(found, plots),
    }
    for name, text in texts.items():
        with replacing(recipe.out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return found


def collect(recipe: Recipe) -> dict[str, Any]:
    """Everything by name, from what the stages left."""
    stages = {name: recipe.stage(name) for name in ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")}
    here = hardware.machine()
    evaluated = stages["evaluate"]
    held = read_table(recipe.out / "sft" / "evaluations.csv")
    found = {
        "preset": recipe.name,
        "seed": recipe.seed,
        "dials": recipe.dials,
        "machine": {"cpu": here.cpu, "cores": here.cores, "isa": here.isa, "threads": here.threads},
        "versions": {"gptfast": gptfast.__version__, "torch": torch.__version__},
        "kernels": {name: reason or "used" for name, reason in gptfast.backends().items()},
        "minutes": sum(s["seconds"] for s in stages.values()) / 60,
        "stages": {name: _cost(stage) for name, stage in stages.items()},
        "parameters": stages["pretrain"]["parameters"],
        "corpus_tokens": stages["pretrain"]["corpus_tokens"],
        "pretrain": {
            "bits_per_byte": {
                name.removeprefix("bits_per_byte_"): value
                for name, value in stages["pretrain"]["evaluation"].items()
                if name.startswith("bits_per_byte_")
            },
            "baselines": stages["tokenizer"]["baselines"],
            "bytes_per_token": {
                name.removeprefix("bytes_per_token_"): value
                for name, value in stages["tokenizer"].items()
                if name.startswith("bytes_per_token_")
            },
        },
        "sft": {
            "loss_before": {n.removeprefix("loss_"): v for n, v in held[0].items() if n.startswith("loss_")},
            "loss_after": {n.removeprefix("loss_"): v for n, v in held[-1].items() if n.startswith("loss_")},
            **evaluated["sft"],
        },
        "reward": {
            **stages["reward"]["evaluation"],
            "naive_bayes": stages["reward"]["naive_bayes"],
            "answers": stages["reward"]["answers"],
            "pairs": stages["reward"]["pairs"],
            "ranking": stages["reward"]["ranking"],
        },
        "ppo": evaluated["ppo"],
        "samples": evaluated["samples"],
    }
    return found | {"checks": [c._asdict() for c in checks(found)]}


def _cost(stage: dict[str, Any]) -> dict[str, float]:
    names = ("seconds", "step_seconds", "steps", "tokens", "flops")
    found = {name: float(stage[name]) for name in names if name in stage}
    if found.get("step_seconds"):
        found["tokens_per_s"] = found["tokens"] / found["step_seconds"]
        found["gflops"] = found.get("flops", 0.0) / found["step_seconds"] / 1e9
    return found


def checks(found: dict[str, Any]) -> list[Check]:
    """What the recipe promises, and whether this run kept it."""
    out = []
    for language, bits in found["pretrain"]["bits_per_byte"].items():
        xz = found["pretrain"]["baselines"][language]["xz -9"]
        name = f"pre-training, {LANGUAGES.get(language, language)}: bits per byte"
        out.append(Check(name, bits, f"< {xz:.3f} (xz -9 of the same bytes)", bits < xz))
    ended = found["sft"]["ended"]
    out.append(Check("SFT: answers that end by themselves", ended["value"], ">= 0.95", ended["value"] >= 0.95,
                     f"{ended['low']:.3f}-{ended['high']:.3f}, n = {ended['n']}"))  # fmt: skip
    second = found["sft"]["ended_second_turn"]
    out.append(Check("SFT: the same in a second turn", second["value"], ">= 0.95", second["value"] >= 0.95,
                     f"{second['low']:.3f}-{second['high']:.3f}, n = {second['n']}"))  # fmt: skip
    ours, bayes, gain = (found["reward"]["ranking"][name] for name in ("reward_model", "naive_bayes", "gain"))
    note = f"{ours['low']:.3f}-{ours['high']:.3f}; Bayes {bayes['low']:.3f}-{bayes['high']:.3f}; "
    note += f"gain {gain['low']:+.3f} to {gain['high']:+.3f}"
    out.append(Check("reward model: held-out accuracy, all pairs", ours["value"], f">= {bayes['value']:.3f} "
                     "(naive Bayes)", ours["value"] >= bayes["value"], note))  # fmt: skip
    ppo = found["ppo"]
    for name, key, least, most in (
        ("PPO: gain of the reward in standard deviations", "gain_in_std", 1.0, None),
        ("PPO: gain of an independent judge's positive share, points", "gain_in_points", 15.0, None),
        ("PPO: KL to the fine-tuned model, nats an answer", "kl", None, 10.0),
        ("PPO: distinct-2 over the fine-tuned model's", "distinct_2_ratio", 0.8, None),
        ("PPO: base-model perplexity over the fine-tuned model's", "perplexity_ratio", None, 2.0),
    ):
        value = float(ppo[key])
        bar = f">= {least:g}" if least is not None else f"<= {most:g}"
        met = value >= least if least is not None else most is not None and value <= most
        out.append(Check(name, value, bar, met))
    return out


# -- pages ---------------------------------------------------------------------------------------------------------


def markdown(found: dict[str, Any]) -> str:
    """report.md."""
    lines = [f"# Report card: {found['preset']}, seed {found['seed']}", "", summary(found), ""]
    for title, head, rows in tables(found):
        lines += [f"## {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ⏎ ")


def summary(found: dict[str, Any]) -> str:
    """What ran, where, how long."""
    m, tokens = found["machine"], found["stages"]["pretrain"]["tokens"]
    kept = sum(c["met"] for c in found["checks"])
    return (
        f"{found['parameters']:,} parameters, {tokens:,.0f} tokens of text, all in {found['minutes']:.1f} minutes "
        f"on {m['cores']} cores of {m['cpu']} ({m['isa']} kernels, {m['threads']} threads, torch "
        f"{found['versions']['torch']}). {kept} of {len(found['checks'])} promises kept."
    )


def tables(found: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, head, rows) of everything that is read in rows."""
    languages = [str(LANGUAGES.get(lang, lang)) for lang in found["pretrain"]["bits_per_byte"]]
    promised = [
        [c["name"], f"{c['value']:.3f}", c["bar"], "yes" if c["met"] else "NO", c["note"]] for c in found["checks"]
    ]
    bits = found["pretrain"]["bits_per_byte"]
    baselines = found["pretrain"]["baselines"]
    names = list(next(iter(baselines.values())))
    compared = [["this model", *(f"{bits[lang]:.3f}" for lang in bits)]]
    compared += [[name, *(f"{baselines[lang][name]:.3f}" for lang in bits)] for name in names]
    sft = found["sft"]
    tuned = [
        [LANGUAGES.get(lang, lang), f"{sft['loss_before'][lang]:.3f}", f"{sft['loss_after'][lang]:.3f}"]
        for lang in sft["loss_after"]
    ]
    reward = found["reward"]
    ranked, bayes = reward["ranking"], reward["naive_bayes"]
    ours = {"value": reward["accuracy"], "low": reward["accuracy_low"], "high": reward["accuracy_high"]}
    counted = (f"all {ranked['reward_model']['n']:,} pairs", f"{reward['pairs']:,} drawn pairs without a common text")
    judged = [
        ["this model", _percent(ranked["reward_model"]), _percent(ours)],
        ["naive Bayes", _percent(ranked["naive_bayes"]), _percent(bayes)],
    ]
    before, after = found["ppo"]["sft"], found["ppo"]["ppo"]
    changed = [
        ["reward (its own units: sd of SFT's answers)", f"{before['score']:.2f}", f"{after['score']:.2f}"],
        ["judged positive (VADER)", _percent(before["positive"]), _percent(after["positive"])],
        ["distinct-2", f"{before['distinct_2']:.3f}", f"{after['distinct_2']:.3f}"],
        ["base model's perplexity", f"{before['base_perplexity']:.1f}", f"{after['base_perplexity']:.1f}"],
        ["end by themselves", f"{before['ended']:.1%}", f"{after['ended']:.1%}"],
        ["tokens an answer", f"{before['tokens']:.1f}", f"{after['tokens']:.1f}"],
    ]
    spent = []
    for name, s in found["stages"].items():
        speed = [f"{s['tokens']:,.0f}", f"{s['tokens_per_s']:,.0f}"] if s.get("tokens_per_s") else ["", ""]
        spent.append([name, f"{s['seconds']:.0f}", *speed, f"{s['gflops']:.0f}" if s.get("gflops") else ""])
    said = [[s["language"], s["prompt"], s["base"], s["sft"], s["ppo"]] for s in found["samples"]]
    return [
        ("What was promised", ("figure", "value", "bar", "kept", "95% interval"), promised),
        ("Bits per byte of held-out text", ("", *languages), compared),
        ("Fine-tuning: nats a token of held-out answers", ("", "before", "after"), tuned),
        (f"Reward model: {reward['ranking']['texts']:,} held-out texts", ("", *counted), judged),
        ("PPO, on held-out prompts", ("", "SFT", "PPO"), changed),
        ("Side by side", ("", "prompt", "base", "SFT", "PPO"), said),
        ("Time", ("stage", "seconds", "tokens", "tokens/s", "GFLOP/s"), spent),
    ]


def _percent(share: dict[str, float]) -> str:
    return f"{share['value']:.1%} ({share['low']:.1%}-{share['high']:.1%})"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 2rem; font-size: .9rem; }
th { text-align: left; border-bottom: 2px solid #888; } td, th { padding: .3rem .6rem; vertical-align: top; }
td { border-bottom: 1px solid #ddd; white-space: pre-wrap; overflow-wrap: anywhere; }
.yes { color: #176b2c; font-weight: 600; } .no { color: #a11; font-weight: 600; } img { max-width: 100%; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #ddd; } td { border-color: #333; }
  img { background: #fff; } .yes { color: #6c6; } .no { color: #f77; } }
"""


def page(found: dict[str, Any], plots: list[tuple[str, bytes]]) -> str:
    """report.html: one file, nothing is fetched."""
    esc = html.escape
    title = f"Report card: {found['preset']}, seed {found['seed']}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{esc(title)}</title>",
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style>",
        f"<h1>{esc(title)}</h1><p>{esc(summary(found))}</p>",
    ]
    marks = {"yes": "<span class=yes>yes</span>", "NO": "<span class=no>no</span>"}
    for i, (name, head, rows) in enumerate(tables(found)):
        parts.append(f"<h2>{esc(name)}</h2><table><tr>{''.join(f'<th>{esc(h)}' for h in head)}</tr>")
        parts += ["<tr>" + "".join(f"<td>{marks.get(c, esc(c))}" for c in row) + "</tr>" for row in rows]
        parts.append("</table>")
        if i == 0:
            parts += [
                f"<p><img alt='{esc(alt)}' src='data:image/png;base64,{base64.b64encode(png).decode()}'></p>"
                for alt, png in plots
            ]
            if not plots:
                parts.append("<p>Plots need matplotlib: pip install 'gptfast-kernels[train]'</p>")
    return "\n".join(parts) + "\n"


def draw(recipe: Recipe, found: dict[str, Any]) -> list[tuple[str, bytes]]:
    """(what it shows, PNG) of each plot; none where matplotlib is missing."""
    try:
        need("matplotlib", "train").use("Agg")
    except ImportError:
        return []
    import matplotlib.pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    _draw_bits(a, recipe.out / "pretrain", found)
    _draw_sft(b, recipe.out / "sft")
    _draw_reward(c, recipe.out / "reward", found)
    _draw_ppo(d, recipe.out / "ppo")
    for axes in (a, b, c, d):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return [("pre-training, fine-tuning, reward model and PPO over their steps", buffer.getvalue())]


def _draw_bits(axes: Any, run: Path, found: dict[str, Any]) -> None:
    rows = read_table(run / "evaluations.csv")
    for i, (language, baseline) in enumerate(found["pretrain"]["baselines"].items()):
        name = LANGUAGES.get(language, language)
        key = f"bits_per_byte_{language}"
        axes.plot([r["step"] for r in rows], [r[key] for r in rows], f"C{i}o-", label=f"{name}")
        axes.axhline(baseline["xz -9"], color=f"C{i}", ls="--", lw=1, label=f"{name}, xz -9")
        axes.axhline(baseline["5-gram"], color=f"C{i}", ls=":", lw=1, label=f"{name}, 5-gram of bytes")
    axes.set(title="Pre-training", xlabel="step", ylabel="bits per byte, held-out", ylim=(1, 5))


def _draw_sft(axes: Any, run: Path) -> None:
    rows = read_table(run / "train.csv")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], "C7", lw=1, label="training")
    held = read_table(run / "evaluations.csv")
    for i, (language, name) in enumerate(LANGUAGES.items()):
        key = f"loss_{language}"
        if held and key in held[0]:
            axes.plot([r["step"] for r in held], [r[key] for r in held], f"C{i}o-", label=f"held-out, {name}")
    axes.set(title="Fine-tuning", xlabel="step", ylabel="nats a token of the answers")


def _draw_reward(axes: Any, run: Path, found: dict[str, Any]) -> None:
    rows = read_table(run / "evaluations.csv")
    steps = [r["step"] for r in rows]
    axes.plot(steps, [r["accuracy"] for r in rows], "C2o-", label="held-out pairs")
    axes.fill_between(
        steps, [r["accuracy_low"] for r in rows], [r["accuracy_high"] for r in rows], color="C2", alpha=0.15
    )
    axes.axhline(found["reward"]["naive_bayes"]["value"], color="C3", ls="--", lw=1, label="naive Bayes")
    axes.set(title="Reward model", xlabel="step", ylabel="accuracy", ylim=(0.4, 1))


def _draw_ppo(axes: Any, run: Path) -> None:
    rows = read_table(run / "train.csv")
    steps = [r["step"] for r in rows]
    axes.plot(steps, [r["objective/score"] for r in rows], "C4", label="reward (sd of SFT's answers)")
    axes.plot(steps, [r["objective/kl"] for r in rows], "C5", lw=1, label="KL, nats an answer")
    axes.set(title="PPO", xlabel="iteration")
