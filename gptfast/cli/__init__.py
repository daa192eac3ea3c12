"""The `gptfast` command."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gptfast import uncollected

# Between two of its ops PyTorch's idle OpenMP threads spin, on cores that our kernels' threads could have: a training
# step of 512 tokens took 254 ms so, and 198 ms where they sleep (Zen 3, 2 cores). Read when torch is loaded: later.
TRAINING = ("train", "recipe")


@contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once meanwhile, as nothing can be lost yet: half-loaded modules would swallow Python's
    exception, or print their whole stack."""
    mine = threading.current_thread() is threading.main_thread()
    mine = mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if mine:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Runs the command; a missing extra is one sentence, not a traceback."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with uncollected(), _ended_by_ctrl_c():
            from gptfast.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "rich"):
            raise
        print(
            f"gptfast: the command line needs the package {error.name}: run `pip install 'gptfast-kernels[cli]'`",
            file=sys.stderr,
        )
        sys.exit(1)
    app(prog_name="gptfast")
