"""The ops as PyTorch knows them: torch.library ops with shapes for tracing and gradients, each backward an op too.

A public function calls its kernel directly where nobody looks; route() says when somebody does. gptfast::<op> then
returns the results and what the backward reads (statistics, log-sum-exp), and gptfast::<op>_backward the gradients.
Gradients of gradients are autograd's, through the reference.

All functions given here take an op's arguments by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gptfast.ops import dispatch

_LIBRARY = torch.library.Library("gptfast", "DEF")
_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  (pyright knows no such attribute)
_ORDINARY = (Tensor, torch.nn.Parameter)
_UNSEEN = frozenset((*_ORDINARY, *dispatch.PLAIN))  # types of arguments that make PyTorch look at no call
Gradients = Mapping[str, Tensor | None]  # of arguments, by name


class Registered:
    """An op that PyTorch knows. Where nothing but gradients is recorded, a call goes past PyTorch's dispatcher, which
    takes as long for an op written in Python as a small kernel takes ten times: to the function, or, for its gradients,
    to an autograd.Function of the same two functions that are registered."""

    def __init__(self, op: Any, run: Callable[..., Any]) -> None:
        self.op, self.run, self.names = op, run, argument_names(op)
        self.apply: Any = None  # an autograd.Function's, where the op has gradients
        self.planned: Any = None  # the same of one that takes a Plan, where the op has it

    def __call__(self, *given: Any, **named: Any) -> Any:
        arguments = dict(zip(self.names, given)) | named
        if watched(arguments):
            return self.op(**arguments)
        if self.apply is None or not recorded(arguments):
            return self.run(**arguments)
        return self.apply(*[arguments[name] for name in self.names])


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Registered:
    """gptfast::<name> from its schema, `run` for tensors that hold values and `fake` for those that hold none.

    Neither may return an argument or a view of one.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.gptfast, name).default
    names = argument_names(op)
    _LIBRARY.impl(name, lambda *given: run(**dict(zip(names, given))), "CompositeExplicitAutograd")
    torch.library.register_fake(f"gptfast::{name}", lambda *given: fake(**dict(zip(names, given))), lib=_LIBRARY)
    return Registered(op, run)


def argument_names(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def differentiate(known: Registered, save: Callable[..., None], backward: Callable[..., Gradients]) -> None:
    """Registers the op's gradients at PyTorch's Autograd key.

    save(ctx, arguments, output) keeps what backward(ctx, needs, *gradients of the outputs) reads; needs[name] says
    whether that argument's gradient is asked for.
    """
    op, names = known.op, known.names

    def by_name(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, dict(zip(names, inputs)), output)

    def in_order(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = dict(zip(names, ctx.needs_input_grad))
        found = backward(ctx, needs, *gradients)
        return tuple(found.get(name) if needs[name] else None for name in names)

    torch.library.register_autograd(f"gptfast::{op._opname}", in_order, setup_context=by_name, lib=_LIBRARY)

    def forward(ctx: Any, *given: Any) -> Any:  # no setup_context: apply would read this function's signature each time
        output = known.run(**dict(zip(names, given)))
        by_name(ctx, given, output)
        return output

    methods = {"forward": forward, "backward": in_order}
    function = type(op._opname, (torch.autograd.Function,), {k: staticmethod(f) for k, f in methods.items()})
    known.apply = direct(function)


def direct(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its apply() without its own look at transforms, for calls that are not watched()."""
    return getattr(super(torch.autograd.Function, function), "apply")  # noqa: B009


def differentiate_through(op: Registered, function: Callable[..., Any]) -> None:
    """Gradients of an op by autograd through `function`, which computes the same with PyTorch's ops."""

    def save(ctx: Any, arguments: dict[str, Any], output: Any) -> None:
        ctx.others = {name: x for name, x in arguments.items() if not isinstance(x, Tensor)}
        ctx.names = [name for name in arguments if name not in ctx.others]
        ctx.save_for_backward(*(arguments[name] for name in ctx.names))
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, needs: dict[str, bool], *gradients: Tensor | None) -> Gradients:
        arguments = {**ctx.others, **dict(zip(ctx.names, ctx.saved_tensors))}
        wanted = [name for name in ctx.names if needs[name]]
        return dict(zip(wanted, gradients_through(function, arguments, wanted, gradients)))

    differentiate(op, save, backward)


def gradients_through(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    wanted: Sequence[str],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of the arguments `wanted`, given those of the function's outputs; differentiable in turn where
    gradients are being recorded."""
    again = torch.is_grad_enabled()
    with _recording(), torch.enable_grad():
        # a view of each: its gradient is wanted even if it is no leaf, or stands for two arguments
        inputs = {n: x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_()
                  for n, x in arguments.items() if n in wanted}  # fmt: skip
        outputs = function(**{**arguments, **inputs})
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        pairs = [(o, g) for o, g in zip(outputs, gradients) if g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        return list(
            torch.autograd.grad(
                [o for o, _ in pairs],
                [inputs[name] for name in wanted],
                [g for _, g in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )


def _recording() -> Any:
    """Within an op PyTorch's dispatcher leaves autograd out; within this it doesn't."""
    c: Any = torch._C
    autograd = c.DispatchKeySet(c.DispatchKey.ADInplaceOrView)
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        autograd |= c.DispatchKeySet(getattr(c.DispatchKey, key))
    excluded = c._dispatch_tls_local_exclude_set()
    return c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded - autograd)


def route(
    op: str, backend: Any, arguments: dict[str, Any], check: Callable[..., None] = lambda **_: None
) -> tuple[Any, dispatch.Plan | bool]:
    """Which way a call goes: the backend to ask for, and whether by the op that PyTorch knows; then the arguments have
    been checked by check(**arguments), if not in this call then in one with the same signature. Their Plan is true
    too, where nothing but gradients is recorded.

    That one is for calls that PyTorch must see and a kernel would serve. Without a kernel the reference, which is
    PyTorch's ops, is seen by itself; so it is under torch.func's transforms, which take no registered gradients, and in
    forward mode.
    """
    if backend == "reference" or isinstance(backend, dispatch.Explain):
        return backend, False
    if not watched(arguments):
        if not recorded(arguments):
            return backend, False
        random = {"seed": 0, "stream": 0} if arguments.get("dropout_p") else {}  # which are others in each call
        return backend, dispatch.served(op, backend, arguments | random if random else arguments, check) or False
    if not torch.compiler.is_compiling():
        if transformed():
            if backend is not None:
                raise dispatch.BackendError(
                    f"{op}: torch.func's transforms and forward mode go through the reference, not {backend!r}"
                )
            return "reference", False
        device = next(x for x in arguments.values() if isinstance(x, Tensor))
        if dispatch.choose(op, backend, device, arguments)[1] is None:
            return backend, False
    check(**arguments)
    return backend, True


def needed(arguments: Mapping[str, Any]) -> bool:
    """Whether PyTorch must see a call with these arguments: to record it for gradients, to trace or transform it, or
    because a tensor is no ordinary one."""
    return recorded(arguments) or watched(arguments)


def recorded(arguments: Mapping[str, Any]) -> bool:
    """Whether gradients will be asked for."""
    if torch.is_grad_enabled():
        for x in arguments.values():  # any() of a generator takes twice as long, and this is asked of every call
            if isinstance(x, Tensor) and x.requires_grad:
                # within inference mode enable_grad() records nothing; a compiler knows no such question
                return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    return False


def watched(arguments: Mapping[str, Any]) -> bool:
    """Whether PyTorch traces or transforms the call, or a tensor is no ordinary one."""
    if torch.compiler.is_compiling():
        return True
    if not _UNSEEN.issuperset(map(type, arguments.values())):
        for x in arguments.values():
            if isinstance(x, Tensor) and type(x) not in _ORDINARY:
                return True
    return torch._C._len_torch_dispatch_stack() > 0 or transformed()


def transformed() -> bool:
    """Whether torch.func transforms the call, or its tensors may have the tangents of forward mode."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def untransformed(op: str, arguments: Mapping[str, Any]) -> None:
    """Raises BackendError where one of the arguments is transformed: for ops that know no such thing."""
    if torch.compiler.is_compiling() or not transformed():
        return
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
        if tangent or _functorch.is_functorch_wrapped_tensor(x):
            what = "a tangent of forward mode" if tangent else "one of torch.func's transforms"
            raise dispatch.BackendError(f"{op}: expected {name} as an ordinary tensor, got one under {what}")


def under_autocast(x: Tensor, *others: Tensor | None) -> bool:
    """Whether dtypes differ because autocast made some of them: then an op takes them as PyTorch's own would."""
    return any(t is not None and t.dtype != x.dtype for t in others) and autocasting(x)


def as_autocast(*operands: Tensor | None) -> tuple[Any, ...]:
    """The operands of a product, in autocast's dtype where it is on: what PyTorch's own products make of theirs."""
    x = operands[0]
    if x is None or not autocasting(x):
        return operands
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if t is None else t.to(dtype) for t in operands)


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def traced(t: Tensor) -> bool:
    """Whether a tensor's values can't be read here."""
    return torch.compiler.is_compiling() or type(t) not in _ORDINARY or t.device.type == "meta"


def check_seed(op: str, seed: Any) -> None:
    """Raises ValueError unless it is a seed: an int, or one int64 in a tensor."""
    whole = seed.dtype == torch.int64 and seed.numel() == 1 if isinstance(seed, Tensor) else isinstance(seed, int)
    got = dispatch.shape(seed) if isinstance(seed, Tensor) else repr(seed)
    dispatch.require(whole, f"{op}: expected seed as an int or an int64 tensor of one, got {got}")


def seed_tensor(seed: Tensor | int, like: Tensor) -> Tensor:
    """A seed, int or int64 tensor, as the tensor that an op's schema takes, so that no graph depends on its value."""
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64, device=like.device)


def nothing(like: Tensor) -> Tensor:
    """What an op returns in the place of a tensor that this call doesn't have."""
    return like.new_empty(0)
