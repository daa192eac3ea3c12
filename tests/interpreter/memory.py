"""Triton's interpreter, watching memory: an access outside the kernel's arguments, which would be a segmentation fault
or somebody else's number, and one whose result depends on which program, or which thread of a program, is faster.

An access must lie within the elements of the tensor that its pointer began at; the gaps of a strided one aren't its
elements. A pointer that a kernel loaded may lead to any of the launch's tensors. Each launch notes for every element
which program wrote it and which read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

import gptfast.kernels.triton as triton_backend

Array = np.ndarray[Any, Any]
SEVERAL = -1  # in `reader`: more than one program


class OutOfBounds(IndexError):
    """A lane reads or writes outside all of the launch's tensors."""


class Race(RuntimeError):
    """The outcome depends on the order in which programs, or a program's threads, run."""


class Region:
    """A tensor's elements, and who has touched them."""

    def __init__(self, name: str, t: Tensor) -> None:
        self.name, self.size, self.start = name, t.element_size(), t.data_ptr()
        self.shape, self.stride = tuple(t.shape), t.stride()
        last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
        self.stop = self.start + (last + 1) * self.size if t.numel() else self.start
        dims = sorted(((s, n) for s, n in zip(t.stride(), t.shape) if s and n > 1), reverse=True)
        # Where each dimension's elements leave room for the next there are gaps at most, and no overlaps.
        apart = all(s >= sum((m - 1) * r for r, m in dims[i + 1 :]) + 1 for i, (s, _) in enumerate(dims))
        dense = last + 1 == int(np.prod([n for _, n in dims]))
        self.dims = [] if dense or not apart else dims

    def holds(self, addresses: Array, size: int) -> Array:
        """Which addresses are those of elements."""
        inside = (addresses >= self.start) & (addresses + np.uint64(size) <= self.stop)
        if self.dims and inside.any():
            rest = np.where(inside, addresses - np.uint64(self.start), np.uint64(0)) // np.uint64(self.size)
            for stride, n in self.dims:
                inside &= rest // np.uint64(stride) < n
                rest %= np.uint64(stride)
            inside &= rest == 0
        return inside


class Shadow:
    """Of one storage's elements: the program that wrote each (0: none), in which of its phases between barriers, and
    the one that read it."""

    def __init__(self, start: int, nbytes: int, size: int) -> None:
        self.start, self.stop, self.size = start, start + nbytes, size
        self.writer, self.phase, self.reader = (np.zeros(nbytes // size + 1, np.int32) for _ in range(3))

    def places(self, addresses: Array) -> Array:
        return ((addresses - np.uint64(self.start)) // np.uint64(self.size)).astype(np.int64)


class Memory:
    """Goes before the interpreter's own builder, whose methods make each access."""

    regions: list[Region]
    shadows: list[Shadow]
    program = 1
    phase = 0

    def watch(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """A launch begins, with these tensors."""
        self.regions, shadows = [], {}
        for name, t in named:
            if t.device.type != "cpu":
                continue
            self.regions.append(Region(name, t))
            storage = t.untyped_storage()
            size = min(t.element_size(), shadows[storage.data_ptr()][1]) if storage.data_ptr() in shadows else None
            shadows[storage.data_ptr()] = (storage.nbytes(), size or t.element_size())
        self.shadows = [Shadow(start, nbytes, size) for start, (nbytes, size) in shadows.items()]
        self.phase = 0

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)  # pyright: ignore
        _, ny, nz = self.grid_dim  # pyright: ignore
        self.program = 1 + (x * ny + y) * nz + z
        self.phase += 1

    def create_barrier(self, *args: Any) -> Any:
        self.phase += 1
        return super().create_barrier(*args)  # pyright: ignore

    def create_addptr(self, ptr: Any, offset: Any) -> Any:
        made = super().create_addptr(ptr, offset)  # pyright: ignore
        made.origin = self._origin(ptr)
        return made

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        return self._same_origin(arg, super().create_splat(ret_ty, arg))  # pyright: ignore

    def create_broadcast(self, arg: Any, shape: Any) -> Any:
        return self._same_origin(arg, super().create_broadcast(arg, shape))  # pyright: ignore

    def create_expand_dims(self, arg: Any, axis: int) -> Any:
        return self._same_origin(arg, super().create_expand_dims(arg, axis))  # pyright: ignore

    def create_reshape(self, arg: Any, shape: Any, allow_reorder: Any) -> Any:
        return self._same_origin(arg, super().create_reshape(arg, shape, allow_reorder))  # pyright: ignore

    def _same_origin(self, arg: Any, made: Any) -> Any:
        if isinstance(arg.dtype, tl.pointer_type):
            made.origin = self._origin(arg)
        return made

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        addresses, _ = self._lanes(ptrs, mask, "load")
        for shadow, places in self._shadowed(addresses):
            writers = shadow.writer[places]
            if (others := (writers != 0) & (writers != self.program)).any():
                raise Race(self._pair("reads", "wrote", writers[others][0], addresses))
            if ((writers != 0) & (shadow.phase[places] == self.phase)).any():
                raise Race(f"{self._here()} reads what it wrote with no barrier in between{self._at(addresses)}")
            readers = shadow.reader[places]
            same = (readers == 0) | (readers == self.program)
            shadow.reader[places] = np.where(same, self.program, SEVERAL)
        return super().create_masked_load(ptrs, mask, *rest, **named)  # pyright: ignore

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        addresses, lanes = self._lanes(ptrs, mask, "store")
        values = np.broadcast_to(value.data, ptrs.data.shape).reshape(-1)[lanes]
        for shadow, places in self._shadowed(addresses):
            for who, did in ((shadow.writer[places], "wrote"), (shadow.reader[places], "read")):
                if (others := (who != 0) & (who != self.program)).any():
                    raise Race(self._pair("writes", did, who[others][0], addresses))
            self._check_lanes(shadow, places, values, addresses)
            shadow.writer[places], shadow.phase[places] = self.program, self.phase
        return super().create_masked_store(ptrs, value, mask, *rest)  # pyright: ignore

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        self._lanes(ptr, mask, "atomic")
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)  # pyright: ignore

    def _lanes(self, ptrs: Any, mask: Any, what: str) -> tuple[Array, Array]:
        """The addresses of the lanes that the mask lets through, and which those are."""
        bits = getattr(ptrs.get_element_ty(), "primitive_bitwidth", 64)
        size = max(1, bits // 8)
        lanes = np.broadcast_to(mask.data, ptrs.data.shape).reshape(-1).astype(bool)
        addresses = ptrs.data.reshape(-1)[lanes]
        outside = np.ones(addresses.shape, bool)
        regions = self._origin(ptrs)
        for region in regions:
            if not outside.any():
                break
            outside &= ~region.holds(addresses, size)
        if outside.any():
            n, first = int(outside.sum()), int(addresses[outside][0])
            raise OutOfBounds(f"{self._here()}: {n} of {ptrs.data.size} lanes of a {what} are outside "
                              f"{self._nearest(first, regions)}")  # fmt: skip
        return addresses, lanes

    def _origin(self, ptrs: Any) -> list[Region]:
        """The tensors that a pointer may lead to: those that begin where it began; all, where it was loaded."""
        if (known := getattr(ptrs, "origin", None)) is not None:
            return known
        found = [r for r in self.regions if ptrs.data.size == 1 and r.start == ptrs.data.item()]
        return found or self.regions

    def _shadowed(self, addresses: Array) -> Iterator[tuple[Shadow, Array]]:
        for shadow in self.shadows:
            mine = (addresses >= shadow.start) & (addresses < shadow.stop)
            if mine.all():
                yield shadow, shadow.places(addresses)
                return
            if mine.any():
                yield shadow, shadow.places(addresses[mine])

    def _check_lanes(self, shadow: Shadow, places: Array, values: Array, addresses: Array) -> None:
        if len(places) != len(values):
            return
        order = np.argsort(places, kind="stable")
        places, values = places[order], values[order]
        twice = places[1:] == places[:-1]
        if twice.any() and (values[1:] != values[:-1])[twice].any():
            raise Race(f"two lanes of one store of {self._here()} write unlike values{self._at(addresses)}")

    def _here(self) -> str:
        return f"program {self.grid_idx}"  # pyright: ignore

    def _pair(self, does: str, did: str, other: int, addresses: Array) -> str:
        return f"{self._here()} {does} what {self._name(other)} {did}{self._at(addresses)}"

    def _name(self, program: int) -> str:
        if program == SEVERAL:
            return "several programs"
        _, ny, nz = self.grid_dim  # pyright: ignore
        n = int(program) - 1
        return f"program {(n // (ny * nz), n // nz % ny, n % nz)}"

    def _at(self, addresses: Array) -> str:
        names = [r.name for r in self.regions if r.holds(addresses, r.size).any()]
        return f", in {' or '.join(names)}"

    def _nearest(self, address: int, regions: list[Region]) -> str:
        if not regions:
            return "the launch has no tensors"
        near = min(regions, key=lambda r: min(abs(address - r.start), abs(address - r.stop)))
        place = (address - near.start) // near.size
        return f"{near.name}, {near.shape} with strides {near.stride}; the first at its element {place}"


class Executor(interpreter.GridExecutor):
    """A launch that tells the builder which tensors it has; numpy doesn't warn of what masked lanes compute."""

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args, named = super()._init_args_hst(args_dev, kwargs)
        builder: Any = interpreter.interpreter_builder
        builder.watch(
            _tensors(
                [
                    *zip(self.arg_names, args),
                    *named.items(),
                    *(("what a table leads to", t) for t in triton_backend.reached),
                ]
            )
        )
        return args, named

    def __call__(self, *args: Any, **named: Any) -> Any:
        with np.errstate(all="ignore"):
            return super().__call__(*args, **named)


def _tensors(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for name, x in named:
        if isinstance(x, torch.Tensor):
            yield name, x
        elif isinstance(x, tuple):
            yield from _tensors((f"{name}[{i}]", y) for i, y in enumerate(x))
        elif isinstance(base := getattr(x, "base", None), torch.Tensor):  # a descriptor, a reinterpreted pointer
            yield name, base
