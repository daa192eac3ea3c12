"""Runs stages in processes that can be killed, forked from one that has imported everything: a start takes
milliseconds. Started by test_killed.py, it reads jobs from stdin and says a process's id, then how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 (torch.optim imports it with the first optimiser, which takes seconds)
from tiny_training import stage

from gptfast.train.trainer import Trainer

CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # what Python says before it does it


def watch(folder: str, last: int) -> list[int]:
    """Counts what is opened, made, renamed and removed in a folder; the process dies before number `last` (0: never)
    is done. The list's one number is the count."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # rmtree names what it removes from inside of the folder.
        if event in CHANGES and (folder in str(arguments[0]) or event in ("os.remove", "os.rmdir")):
            count[0] += 1
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def work(job: dict[str, Any]) -> None:
    made = stage(job["stage"], **job["dials"])
    run = Path(job["run"])
    count = watch(str(run), job["last"])
    Trainer(made, run, quiet=True).run()
    found = {"changes": count[0], "cpu_seconds": time.process_time()}
    (run.parent / f"{run.name}.json").write_text(json.dumps(found))


def main() -> None:
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                work(json.loads(line))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
