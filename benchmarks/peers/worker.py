"""A contender in a process and an environment of its own: one JSON list a line in, one JSON object a line out.

    ["prepare", folder, weights]          makes the files that `load` wants, from the model's files in the folder
    ["load", folder, weights, threads]    -> load_s, weight_bytes
    ["run", prompts, new]                 -> prefill_s, decode_s, tokens
    ["peak_memory"]                       -> bytes

Between two requests the process is stopped: an idle engine's threads spin on the cores that the next one wants.
This file needs Linux and the standard library alone, since every engine's environment imports it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Timed:
    """One run: seconds to the first new token of every row, seconds for the others, all new tokens."""

    prefill_s: float
    decode_s: float
    tokens: list[list[int]]


@dataclass(frozen=True)
class Model:
    """A loaded model: greedy continuations of token ids with so many new ones each, and the bytes of its weights."""

    run: Callable[[list[list[int]], int], Timed]
    weight_bytes: int


def serve(prepare: Callable[[Path, str], None], load: Callable[[Path, str, int], Model]) -> None:
    """The engine's end: answers until the end of stdin."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody else would end a stopped process
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    model = None
    for line in sys.stdin:
        reply: dict[str, Any] = {}
        match json.loads(line):
            case ["prepare", folder, weights]:
                prepare(Path(folder), weights)
            case ["load", folder, weights, threads]:
                start = perf_counter()
                model = load(Path(folder), weights, threads)
                reply = {"load_s": perf_counter() - start, "weight_bytes": model.weight_bytes}
            case ["run", prompts, new] if model is not None:
                reply = asdict(model.run(prompts, new))
            case ["peak_memory"]:
                reply = {"bytes": _peak_memory()}
            case other:
                raise ValueError(f"expected a request that worker.py lists, got {other}")
        print(json.dumps(reply), file=replies, flush=True)


def _peak_memory() -> int:
    """Of this program alone: getrusage's figure begins with that of the process that started it."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


class Worker:
    """The driver's end. Raises RuntimeError with the engine's last words where it ends early."""

    def __init__(self, python: Path, module: str) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [str(python), "-m", module],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def ask(self, *request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = self._process.stdout.readline()
        if not reply:
            self._said.seek(0)
            lines = self._said.read().strip().splitlines() or ["ended without a word"]
            raise RuntimeError(lines[-1])
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # now it is off the cores
        return json.loads(reply)
