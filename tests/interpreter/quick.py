"""Triton's interpreter made quick. Most of its time goes into types that it makes anew for each value it computes: a
block's type checks and prints its shape, a tensor's shape becomes constants, and which type two operands have together
is worked out again. Here each is made once; what is computed stays as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

Method = Callable[..., Any]
_core: Any = tl.core
NUMBERS = 1000  # as many blocks of one number are kept


def pointers(init: Method) -> Method:
    """pointer_type.__new__: one object for an element type and what else is asked for."""
    known: dict[Any, Any] = {}

    def new(cls: type, element_ty: Any, *more: Any, **named: Any) -> Any:
        key = id(element_ty), more, *named.items()
        if (found := known.get(key)) is None:
            found = known[key] = object.__new__(cls)
            init(found, element_ty, *more, **named)  # it holds the element type, whose id stays its own
        return found

    return new


def blocks(init: Method) -> Method:
    """block_type.__new__: one object for an element type and a shape, and one shape for all blocks of that shape."""
    known: dict[tuple[int, tuple[int, ...]], Any] = {}
    shapes: dict[tuple[int, ...], Any] = {}

    def new(cls: type, element_ty: Any, shape: Any) -> Any:
        sizes = tuple(s.value if type(s) is _core.constexpr else s for s in shape)
        if (found := known.get((id(element_ty), sizes))) is None:
            found = object.__new__(cls)
            init(found, element_ty, shape)
            found.shape = shapes.setdefault(sizes, found.shape)
            known[id(element_ty), sizes] = found
        return found

    return new


def of_its_type(init: Method) -> Method:
    """tensor.__init__, which sets the same attributes, but for its handle, for all tensors of one type."""
    known: dict[int, dict[str, Any]] = {}

    def of_type(self: Any, handle: Any, type: Any) -> None:
        if (found := known.get(id(type))) is None:
            init(self, handle, type)
            known[id(type)] = dict(vars(self))
            return
        vars(self).update(found)
        self.handle = handle

    return of_type


def answered_once(method: Method) -> Method:
    """A method of types and flags that answers the same question alike."""
    known: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def answer(*asked: Any) -> Any:
        key = tuple(map(id, asked))
        if (found := known.get(key)) is None:
            found = known[key] = (method(*asked), *asked)  # what is held keeps its id
        return found[0]

    return answer


def alike_first(equal: Method) -> Method:
    return lambda self, other: self is other or equal(self, other)


def unlike_shapes_only(broadcast: Method) -> Method:
    """broadcast_impl_value, of two values whose shapes are one."""

    def of_values(lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a is b or (a.is_block() and b.is_block() and a.shape is b.shape):
            return lhs, rhs
        return broadcast(lhs, rhs)

    return of_values


def typed_already(check: Method, broadcast: Method) -> Method:
    """binary_op_type_checking_impl, of two values of one element type, which only a division may still convert, and of
    a value and a number, which is made a block once."""
    known: dict[Any, tuple[Any, Any]] = {}

    def numbered(value: Any, number: Any) -> Any:
        key = id(value.type), type(number), number, repr(number)  # 0.0 equals -0.0
        if (found := known.get(key)) is None:
            converted, block = check(value, number)
            if converted is not value:
                return converted, block
            if len(known) == NUMBERS:
                known.clear()
            block.handle.data.flags.writeable = False  # it is shared
            found = known[key] = block, value.type
        return value, found[0]

    def checked(lhs: Any, rhs: Any, *rest: Any, **named: Any) -> Any:
        if len(rest) < 3 and not named and type(lhs) is tl.tensor and not lhs.dtype.is_ptr():
            if type(rhs) in (int, float, bool):
                return numbered(lhs, rhs)
            if type(rhs) is tl.tensor and lhs.dtype is rhs.dtype:
                return broadcast(lhs, rhs)
        return check(lhs, rhs, *rest, **named)  # a third and fourth argument say that it is a division

    return checked


def numpy_type(other: Method) -> Method:
    """_get_np_dtype, which makes a table of all types at each call."""
    known: dict[str, Any] = {}

    def of_type(dtype: Any) -> Any:
        if type(dtype) is tl.block_type:
            dtype = dtype.element_ty
        if type(dtype) is not tl.dtype:  # a pointer's
            return other(dtype)
        if (found := known.get(dtype.name)) is None:
            found = known[dtype.name] = other(dtype)
        return found

    return of_type


@contextmanager
def quick() -> Iterator[None]:
    """Within it interpreted kernels take less than half the time. For processes with TRITON_INTERPRET=1."""
    module: Any = interpreter
    semantic, builder = module.interpreter_semantic, module.interpreter_builder
    with ExitStack() as replaced:

        def replace(owner: Any, name: str, value: Any) -> None:
            if name in vars(owner):
                replaced.callback(setattr, owner, name, vars(owner)[name])
            else:
                replaced.callback(delattr, owner, name)
            setattr(owner, name, value)

        for kind, made_once in ((_core.pointer_type, pointers), (_core.block_type, blocks)):
            replace(kind, "__new__", made_once(kind.__init__))
            replace(kind, "__init__", lambda *_, **__: None)
        for kind in (_core.dtype, _core.pointer_type, _core.block_type):
            replace(kind, "__eq__", alike_first(kind.__eq__))
        replace(_core.tensor, "__init__", of_its_type(_core.tensor.__init__))
        replace(semantic, "computation_type_impl", answered_once(semantic.computation_type_impl))
        broadcast = unlike_shapes_only(semantic.broadcast_impl_value)
        replace(semantic, "broadcast_impl_value", broadcast)
        check = typed_already(semantic.binary_op_type_checking_impl, broadcast)
        replace(semantic, "binary_op_type_checking_impl", check)
        replace(module, "_get_np_dtype", numpy_type(module._get_np_dtype))
        if not builder.options.debug:  # all sums again in 64 bits, for an assertion that is made for debugging only
            replace(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield
