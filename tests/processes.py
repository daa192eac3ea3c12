"""Processes that train together. They are forked from one that has imported what they need and started no thread yet:
imports take longer than most of what they do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import start_processes

IMPORTED = [
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "pytest",
    "gptfast.train.trainer",
    "gptfast.optim",
]


def together(process: Callable[..., None], *args: Any, processes: int = 2) -> None:
    """Runs process(rank, *args) in each; raises what one of them raises."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    start_processes(process, args=args, nprocs=processes, start_method="forkserver")
