"""Several processes as `torchrun` starts them: who this one is, and what training does together with the others.

DDP holds a whole model in each process and averages gradients; FSDP2 (torch.distributed.fsdp.fully_shard) gives each
process a part of every parameter, gradient and moment. A step's batch is the same with any number of processes: each
computes a part of it, and the loss is divided by what the whole batch learns, so that the gradient is one process's.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

KINDS = ("ddp", "fsdp")
M = TypeVar("M", bound=nn.Module)
FORWARDS = (
    "loss",
    "hidden",
    "logprobs",
    "scores",
    "each",
)  # methods that compute with a module's parameters, as forward does


class World:
    """The processes that train together; one process without torchrun."""

    def __init__(self, rank: int = 0, size: int = 1, kind: str = "ddp", device: torch.device | None = None) -> None:
        if kind not in KINDS:
            raise ValueError(f"expected {' or '.join(KINDS)} as the way to train with several processes, got {kind!r}")
        self.rank, self.size, self.kind = rank, size, kind
        self.device = device or torch.device("cpu")

    @staticmethod
    def join(kind: str = "ddp", device: str | None = None) -> World:
        """The world that torchrun's environment describes (RANK, WORLD_SIZE, LOCAL_RANK); one process without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World(0, 1, kind, torch.device(device or "cpu"))
        import torch.distributed as dist

        local = int(os.environ.get("LOCAL_RANK", "0"))
        on_gpu = device is not None and device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(local)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if on_gpu else "gloo")
        return World(dist.get_rank(), size, kind, torch.device("cuda", local) if on_gpu else torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def prepare(self, modules: Mapping[str, nn.Module]) -> None:
        """FSDP2: cuts the modules' parameters into each process's part, block by block."""
        if self.size == 1 or self.kind != "fsdp":
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        # Said at each step, of outputs that are views, where something writes into one in place: nothing of ours does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in modules.values():
            for part in module.modules():
                if type(part).__name__ == "Block":
                    fully_shard(part, mesh=mesh)
            fully_shard(module, mesh=mesh)
            for method in FORWARDS:
                if hasattr(module, method):
                    register_fsdp_forward_method(module, method)

    def settle(self, modules: Mapping[str, nn.Module]) -> None:
        """FSDP2: cuts again what a forward pass without a backward one has left whole, a module's outermost parameters.
        Before anything looks at them."""
        if self.size > 1 and self.kind == "fsdp":
            for module in modules.values():
                sharded: Any = module
                sharded.reshard()

    def runner(self, modules: Mapping[str, nn.Module], function: Callable[..., Any]) -> Runner:
        """The function, which calls these modules, such that its backward pass leaves the mean of all processes'
        gradients."""
        return Runner(self, modules, function)

    def whole(self, module: M, blank: Callable[[], M]) -> M | None:
        """The module with all of its parameters in this process. Cut by FSDP2, they are gathered into what `blank`
        makes (on the meta device), in the first process alone: None in the others, all of which call this."""
        if self.size == 1 or self.kind != "fsdp":
            return module
        gathered = {}
        for name, tensor in module.state_dict().items():
            value: Any = tensor
            full = value.full_tensor() if hasattr(value, "full_tensor") else value
            if self.first:
                gathered[name] = full.detach().cpu()
        if not self.first:
            return None
        made = blank()
        made.load_state_dict(gathered, assign=True)
        return made.train(module.training)

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """These numbers added up over all processes (fp64), the same everywhere."""
        if self.size == 1:
            return dict(values)
        import torch.distributed as dist

        flat = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(flat)
        return dict(zip(values, flat.tolist()))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def agree(self, flag: bool) -> bool:
        """Whether any process says yes."""
        return self.sum({"flag": float(flag)})["flag"] > 0


class _Forward(nn.Module):
    """A function of some modules as the one module that DistributedDataParallel wants."""

    def __init__(self, modules: Mapping[str, nn.Module], function: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(modules))
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Runner:
    """A function of modules, differentiable, with all processes' gradients averaged."""

    def __init__(self, world: World, modules: Mapping[str, nn.Module], function: Callable[..., Any]) -> None:
        self.world, self.modules = world, dict(modules)
        self.run: Any = function
        if world.size > 1 and world.kind == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            self.run = DistributedDataParallel(_Forward(modules, function))

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch: processes exchange gradients in the last one only."""
        if self.world.size == 1:
            yield
        elif self.world.kind == "fsdp":
            for module in self.modules.values():
                sharded: Any = module
                sharded.set_requires_gradient_sync(last)
            yield
        elif last:
            yield
        else:
            with self.run.no_sync():
                yield
