"""The `gptfast` command."""

from __future__ import annotations

import os
import sys

from gptfast import uncollected

# Between two of its ops PyTorch's idle OpenMP threads spin, on cores that our kernels' threads could have: a training
# step of 512 tokens took 254 ms so, and 198 ms where they sleep (Zen 3, 2 cores). Read when torch is loaded: later.
TRAINING = ("train", "recipe")


def main() -> None:
    """Runs the command; a missing extra is one sentence, not a traceback."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with uncollected():
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
