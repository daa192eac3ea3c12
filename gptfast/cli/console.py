"""What the commands share: consoles, errors as one sentence, and a word when something takes long."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import typer
from rich.console import Console

PATIENCE = 2.0  # seconds before a wait is explained
ERRORS = (ValueError, OSError, ImportError, RuntimeError, TypeError, KeyError, MemoryError)

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
settings = {"traceback": False}


def fail(message: str) -> typer.Exit:
    """Says what is wrong on stderr; the exception to raise."""
    err.print(f"gptfast: {message}", markup=False, soft_wrap=True)
    return typer.Exit(1)


def reported(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors are one sentence on stderr and exit status 1; --traceback shows where they come from."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output left
            sys.stderr.close()
            raise typer.Exit(0) from None
        except ERRORS as error:
            if settings["traceback"]:
                raise
            raise fail(str(error.args[0] if isinstance(error, KeyError) else error) or type(error).__name__) from None

    return run


def write(text: str) -> None:
    """A piece of a model's text, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class Waiting:
    """Shows what is being waited for, on a terminal, once it takes longer than PATIENCE."""

    def __init__(self, message: str) -> None:
        self.status = err.status(f"[dim]{message}[/]")
        self.since = perf_counter()
        self._timer = threading.Timer(PATIENCE, self.status.start)
        self._timer.daemon = True

    def progress(self, done: int, total: int) -> None:
        """For generate(progress=...)."""
        if perf_counter() - self.since > PATIENCE:
            self.status.update(f"[dim]reading the prompt: {done:,} of {total:,} tokens[/]")

    def stop(self) -> None:
        if self._timer.is_alive():
            self._timer.cancel()
            self._timer.join()
        self.status.stop()


@contextmanager
def waiting(message: str) -> Iterator[Waiting]:
    """A Waiting for the length of a block."""
    shown = Waiting(message)
    if err.is_terminal:
        shown._timer.start()
    try:
        yield shown
    finally:
        shown.stop()
