"""What an op page declares: its reference, its cost, its cases. Tests and benchmarks are made from this alone."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.bfloat16, torch.float16)


class Inputs:
    """Makes a case's inputs: random, reproducible, rounded to the storage dtype."""

    def __init__(self, dtype: torch.dtype, key: str = "", device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{key}/{dtype}".encode()))

    def randn(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values in the storage dtype (or `dtype`)."""
        x = torch.randn(shape, generator=self.generator) * scale + shift
        return x.to(self.device, dtype or self.dtype)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform values in [0, 1)."""
        return torch.rand(shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def randint(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device, dtype)


class Unread(Inputs):
    """Makes them for calls that nobody runs: what is large stays as memory has it."""

    LARGE = 1 << 16  # elements

    def randn(self, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        if math.prod(shape) > self.LARGE:
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return super().randn(*shape, scale=scale, shift=shift, dtype=dtype)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if math.prod(shape) > self.LARGE:
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return super().rand(*shape, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """One named set of arguments. `make` returns the keyword arguments of the public function."""

    name: str
    make: Callable[[Inputs], dict[str, Any]]
    tags: frozenset[str] = frozenset()  # "bench": timed; "big": too large for interpreters, its test is slow

    def arguments(self, dtype: torch.dtype, device: str = "cpu", draw: int = 0) -> dict[str, Any]:
        """Other draws have other random numbers."""
        return self.make(Inputs(dtype, self.name + (f"/{draw}" if draw else ""), device))

    def unread(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the same shapes, for what looks at nothing else."""
        return self.make(Unread(dtype, self.name))


@dataclass(frozen=True)
class Cost:
    """What an ideal implementation must do: the roofline of a call."""

    flops: float  # floating-point (or integer multiply-add) operations, a multiply-add counting two
    bytes: float  # the fewest bytes that must cross memory: inputs read once, outputs written once
    unit: str = "fp32"  # the arithmetic peak that bounds it: "fp32", "bf16" or "int8"


@dataclass(frozen=True)
class Op:
    """An op page, as data."""

    name: str
    function: Callable[..., Any]  # the public function
    reference: Callable[..., Any]  # the meaning, in plain PyTorch; takes the public function's arguments but `backend`
    cost: Callable[..., Cost]  # of the public function's arguments
    cases: Callable[[], list[Case]]
    # What a user would write with PyTorch today, for timing and for the tolerance; None = the reference itself.
    baseline: Callable[..., Any] | None = None
    # What the tolerance is taken from where the baseline can't serve (it draws other random numbers).
    plain: Callable[..., Any] | None = None
    dtypes: tuple[torch.dtype, ...] = STORAGE
    mutates: tuple[str, ...] = ()  # arguments written in place, where given; they count as outputs
    train_cost: Callable[..., Cost] | None = None  # of a forward and a backward together
    differentiable: tuple[str, ...] = ()  # arguments that get gradients, from a backward kernel where there is one
    double_backward: bool = False  # whether its gradients can be differentiated in turn
    exact: bool = False  # outputs equal the reference's bit for bit
    host: tuple[str, ...] = ()  # arguments that stay on the CPU wherever the others are
    # The backends with kernels. On a CPU none would pay where a call works on a number for each sequence; on a GPU each
    # of PyTorch's ops is a launch, which takes as long for one number as for many thousands.
    kernels: tuple[str, ...] = ("cpu", "triton")
    # The arguments of row `b` of the batch alone, and how many rows a call has; None = no batch.
    take: Callable[[Mapping[str, Any], int], dict[str, Any]] | None = None
    batch: Callable[[Mapping[str, Any]], int] = field(default=lambda arguments: next(iter(arguments.values())).shape[0])


def products(*operands: Any) -> str:
    """The unit of a Cost that products of these bound."""
    return "bf16" if all(getattr(x, "dtype", None) == torch.bfloat16 for x in operands) else "fp32"


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of all of them together, None counting nothing."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def map_tensors(f: Callable[[Tensor], Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with f applied to each tensor, those in lists too."""

    def of(value: Any) -> Any:
        return f(value) if isinstance(value, Tensor) else [of(v) for v in value] if isinstance(value, list) else value

    return {name: of(value) for name, value in arguments.items()}


def double(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with every floating tensor in fp64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t.clone(), arguments)


def outputs(result: Any) -> list[Tensor]:
    """A call's outputs as a list of tensors."""
    return [result] if isinstance(result, Tensor) else [r for r in result or () if r is not None]


def written(op: Op, arguments: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that the op writes in place."""
    return [t for name in op.mutates for t in outputs(arguments.get(name))]


def leaves(op: Op, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments, those that get gradients asking for them; strides stay."""
    return {
        name: x.detach().requires_grad_() if name in op.differentiable and isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }


def upstream(op: Op, arguments: Mapping[str, Any], key: str = "") -> list[Tensor]:
    """Random gradients of the floating outputs, rounded to their dtype."""
    with torch.enable_grad():
        results = [r for r in outputs(op.reference(**leaves(op, arguments))) if r.is_floating_point()]
    inputs = Inputs(results[0].dtype, key + "/upstream", str(results[0].device))
    return [inputs.randn(*r.shape, dtype=r.dtype) for r in results]


def gradients(
    function: Callable[..., Any], op: Op, arguments: Mapping[str, Any], given: Sequence[Tensor], **more: Any
) -> dict[str, Tensor]:
    """The gradient of each differentiable argument, those of the outputs being given."""
    mine = leaves(op, arguments)
    with torch.enable_grad():
        results = [r for r in outputs(function(**mine, **more)) if r.is_floating_point()]
    results, given = zip(*[(r, u.to(r.dtype)) for r, u in zip(results, given, strict=True) if r.requires_grad])
    asked = [name for name in op.differentiable if isinstance(mine.get(name), Tensor)]
    found = torch.autograd.grad(results, [mine[name] for name in asked], given, allow_unused=True)
    return {name: torch.zeros_like(mine[name]) if g is None else g for name, g in zip(asked, found)}


def ulp(scale: float, dtype: torch.dtype) -> float:
    """One unit in the last place of `dtype` at values of this magnitude."""
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(max(scale, 1e-30)).log2().floor().item()


def tolerance(baseline: Tensor, exact: Tensor) -> float:
    """The largest error a kernel may make: twice what PyTorch's own op makes, plus one unit in the last place.

    `baseline` is PyTorch's result in the storage dtype, `exact` the reference's in fp64, on the same inputs.
    """
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    error = baseline.double() - exact
    if not finite.all():
        error, exact = error[finite], exact[finite]
    return 2 * error.abs_().nan_to_num_(posinf=0.0).max().item() + ulp(exact.abs().max().item(), baseline.dtype)
