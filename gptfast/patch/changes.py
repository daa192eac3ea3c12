"""Changes of attributes that can be undone, and the calls that are put in the place of a module's forward.

What was changed is written on the changed module itself, so that it is copied, pickled and thrown away with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

RECORD = "_gptfast_changes"


@dataclass
class Change:
    """An attribute in an object's own dictionary and what was there before: (value,), or () for nothing."""

    owner: Any
    name: str
    before: tuple[Any, ...]

    def undo(self) -> None:
        if self.before:
            self.owner.__dict__[self.name] = self.before[0]
        else:
            self.owner.__dict__.pop(self.name, None)


def put(module: nn.Module, name: str, value: Any, owner: Any = None) -> None:
    """Sets an attribute of the module (or of `owner`, an object that goes with it) in its own dictionary."""
    owner = module if owner is None else owner
    record: list[Change] = module.__dict__.setdefault(RECORD, [])
    if not any(change.owner is owner and change.name == name for change in record):
        record.append(Change(owner, name, (owner.__dict__[name],) if name in owner.__dict__ else ()))
    owner.__dict__[name] = value


def undo(model: nn.Module) -> None:
    """Takes back all changes of the model's modules."""
    for module in model.modules():
        for change in reversed(module.__dict__.pop(RECORD, [])):
            change.undo()


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """After it, the model's modules have the changes that they had before it, and no others."""
    before = [
        (module, list(changes), [change.owner.__dict__.get(change.name) for change in changes])
        for module in model.modules()
        if (changes := module.__dict__.get(RECORD))
    ]
    try:
        yield
    finally:
        undo(model)
        for module, changes, values in before:
            for change, value in zip(changes, values):
                put(module, change.name, value, change.owner)


class Replacement(ABC):
    """Stands in a module's dictionary as `forward`, and calls the module's own where an op can't serve.

    Copies and pickles with the module. `backend` is passed to every op.
    """

    def __init__(self, module: nn.Module, backend: str | None) -> None:
        self.module, self.backend = module, backend

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module's class."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """For inspect.signature, which transformers asks for the arguments that a model takes."""
        return type(self.module).forward.__get__(self.module)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward from now on."""


def taken(module: nn.Module) -> str | None:
    """Why the module's forward can't be replaced, or None."""
    there = module.__dict__.get("forward")
    if there is None or isinstance(there, Replacement):
        return None
    return "its forward has been replaced already by something else, which ours would undo"
