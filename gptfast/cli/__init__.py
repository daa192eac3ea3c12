"""The `gptfast` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command; a missing extra is one sentence, not a traceback."""
    try:
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
