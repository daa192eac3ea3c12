"""The dials of a training stage: a dataclass a stage, from YAML and from flags, each field typed and explained.

A field's default says its type, its `dial(...)` what it does and between what. Whatever comes from outside is checked
when the dataclass is made, so that a wrong value is one sentence before anything has run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from gptfast.formats.extras import need

SCHEDULES = ("cosine", "linear", "constant")
C = TypeVar("C", bound="StageConfig")


def dial(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field with its help text and what values it takes (least and most included)."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True)
class StageConfig:
    """What every stage has: how many steps, the optimiser (AdamW), and how often it reports and saves."""

    steps: int = dial(1000, "optimiser steps (iterations of PPO and GRPO)", least=1)
    seed: int = dial(0, "decides the weights' start, the order of the data, dropout and samples", least=0)
    lr: float = dial(1e-3, "learning rate at its highest", least=0)
    min_lr: float = dial(0.1, "where the schedule ends, as a part of lr", least=0, most=1)
    warmup: int = dial(50, "steps in which the learning rate rises", least=0)
    schedule: str = dial("cosine", "how the learning rate falls after the warm-up", choices=SCHEDULES)
    weight_decay: float = dial(0.1, "AdamW's, of matrices only", least=0)
    beta1: float = dial(0.9, "AdamW's average of gradients", least=0, most=1)
    beta2: float = dial(0.95, "AdamW's average of their squares", least=0, most=1)
    clip: float = dial(1.0, "the longest that all gradients together may be; 0 = any length", least=0)
    log_every: int = dial(10, "steps between rows of the log", least=1)
    eval_every: int = dial(100, "steps between evaluations; 0 = at the end only", least=0)
    save_every: int = dial(100, "steps between checkpoints; 0 = at the end only", least=0)
    keep: int = dial(2, "checkpoints that are kept", least=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, about = getattr(self, f.name), f.metadata
            wanted = _type_of(type(self), f.name)
            if not _fits(value, wanted):
                raise ValueError(f"{f.name}: expected {_name_of(wanted)}, got {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name}: expected a finite number, got {value}")
            if value is None or not about:
                continue
            if about["choices"] and value not in about["choices"]:
                raise ValueError(f"{f.name}: expected one of {', '.join(about['choices'])}, got {value!r}")
            if about["least"] is not None and value < about["least"]:
                raise ValueError(f"{f.name}: expected at least {about['least']}, got {value}")
            if about["most"] is not None and value > about["most"]:
                raise ValueError(f"{f.name}: expected at most {about['most']}, got {value}")

    def learning_rate(self, step: int) -> float:
        """Of a step counted from 0: lr (step + 1) / (warmup + 1) while it warms up, then from lr down to min_lr lr.

        cosine: Loshchilov and Hutter (arXiv:1608.03983), eq. 5, without restarts.
        """
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.lr
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        low = self.lr * self.min_lr
        fall = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return low + fall * (self.lr - low)

    def to_json(self) -> dict[str, Any]:
        """Every dial by name."""
        return dataclasses.asdict(self)


def _type_of(cls: type, name: str) -> Any:
    return typing.get_type_hints(cls)[name]


def _options(wanted: Any) -> tuple[Any, ...]:
    """The types of a union; the type itself."""
    return typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)


def _fits(value: Any, wanted: Any) -> bool:
    for option in _options(wanted):
        origin = typing.get_origin(option)
        if origin is tuple:
            if isinstance(value, tuple) and all(_fits(v, typing.get_args(option)[0]) for v in value):
                return True
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif isinstance(value, option):
            return True
    return False


def _name_of(wanted: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return " or ".join(
        f"a list of {_name_of(typing.get_args(o)[0])}" if typing.get_origin(o) is tuple else names.get(o, str(o))
        for o in _options(wanted)
    )


def from_mapping(cls: type[C], given: dict[str, Any], where: str) -> C:
    """A stage's configuration from plain values (JSON, YAML). Raises ValueError with `where` for a name that isn't a
    dial's, a value of another type or out of range."""
    known = {f.name for f in fields(cls)}
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: there is no dial {name!r}: expected one of {', '.join(sorted(known))}")
    values = {name: _plain(value, _type_of(cls, name)) for name, value in given.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _plain(value: Any, wanted: Any) -> Any:
    """YAML has no tuples, and reads 1e-3 as text."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and float in _options(wanted) and str not in _options(wanted):
        try:
            return float(value)
        except ValueError:
            return value
    if isinstance(value, int) and not isinstance(value, bool) and float in _options(wanted):
        return float(value) if int not in _options(wanted) else value
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ValueError where it holds something else, OSError where it can't be read."""
    yaml = need("yaml", "train")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: expected YAML, got {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path.name}: expected names with values, got {type(found).__name__}")
    return found


def parser(cls: type[C], prog: str, description: str) -> argparse.ArgumentParser:
    """A command line with a flag for each dial, and --config for a YAML file that they overrule."""
    made = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    made.add_argument("--config", metavar="FILE", help="a YAML file with these dials by name; flags overrule it")
    for f in fields(cls):
        wanted = _options(_type_of(cls, f.name))
        about, flag = f.metadata, "--" + f.name.replace("_", "-")
        help = f"{about['help']} ({_shown(f.default)})".replace("%", "%%")
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": help}
        if bool in wanted:
            made.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif any(typing.get_origin(option) is tuple for option in wanted):
            made.add_argument(flag, nargs="+", metavar="X", **options)
        else:
            kind = next(t for t in wanted if t is not type(None))
            made.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **options)
    return made


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None or default == "" else str(default)


def from_flags(cls: type[C], arguments: argparse.Namespace, preset: dict[str, Any] | None = None) -> C:
    """What a preset says, overruled by the YAML file, overruled by the flags."""
    known = {f.name for f in fields(cls)}
    values = dict(preset or {})
    where = "the command line"
    if arguments.config is not None:
        path = Path(arguments.config)
        values |= read_yaml(path)
        where = path.name
    return from_mapping(cls, values | {n: v for n, v in vars(arguments).items() if n in known}, where)


def same_but(old: dict[str, Any], new: StageConfig, free: tuple[str, ...]) -> list[str]:
    """The dials whose values differ, but for those that may change when a run goes on."""
    now = json.loads(json.dumps(new.to_json()))
    return [name for name, value in now.items() if name not in free and old.get(name) != value]
