"""Walks over a model's modules and puts in what each can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gptfast.compat import huggingface
from gptfast.ops.dispatch import NAMES
from gptfast.patch import attention, linears, loss, mlps, norms, probe, rope
from gptfast.patch.changes import Replacement, put, taken
from gptfast.patch.report import Entry, PatchReport

LINEAR = f"ops.linear in training, and for up to {linears.ROWS} rows without gradients"


def apply(model: nn.Module, kinds: set[str], backend: str | None) -> PatchReport:
    """gptfast.patch for these kinds."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"gptfast.patch expected an nn.Module, got {type(model).__name__}")
    if backend is not None and backend not in NAMES:
        raise ValueError(f"gptfast.patch expected backend to be one of {', '.join(NAMES)}, got {backend!r}")
    work = _Work(model, backend)
    if "attention" in kinds:
        work.attention()
    for name, module in work.modules:
        if "mlp" in kinds:
            work.mlp(name, module)
        if "norm" in kinds:
            work.norm(name, module)
        if "linear" in kinds and linears.is_projection(module):
            work.put(name, "linear", module, linears.Linear(module, backend), LINEAR)
        if "rope" in kinds:
            work.rope(name, module)
    if "loss" in kinds:
        work.loss()
    return work.report


class _Work:
    """One call of patch()."""

    def __init__(self, model: nn.Module, backend: str | None) -> None:
        self.model, self.backend, self.report = model, backend, PatchReport()
        own = type(self).__module__.split(".")[0] + "."
        self.modules = [
            (name, m)
            for name, m in model.named_modules()
            if not (type(m).__module__.startswith(own) or isinstance(m, torch.jit.ScriptModule))
        ]
        self.known: dict[Any, Any] = {}  # what a kind of module was recognised as
        self.served: set[int] = set()  # modules inside an MLP that is replaced as a whole

    def patched(self, name: str, kind: str, text: str) -> None:
        self.report.patched.append(Entry(name, kind, text))

    def skipped(self, name: str, kind: str, reason: str) -> None:
        self.report.skipped.append(Entry(name, kind, reason))

    def put(self, name: str, kind: str, module: nn.Module, new: Replacement, text: str) -> None:
        """`new` as the module's forward, unless something else stands there; one of ours stays where it is alike."""
        if (reason := taken(module)) is not None:
            self.skipped(name, kind, reason)
            return
        there: Any = module.__dict__.get("forward")
        if type(there) is not type(new) or there.backend != new.backend:
            put(module, "forward", new)
        self.patched(name, kind, text)

    def recognised(self, module: nn.Module, recognise: Callable[[nn.Module], Any]) -> Any:
        """recognise(module), asked once for each kind of module."""
        key = recognise, probe.kind(module)
        if key not in self.known:
            self.known[key] = recognise(module)
        return self.known[key]

    def norm(self, name: str, module: nn.Module) -> None:
        formula = self.recognised(module, norms.recognise)
        if isinstance(formula, norms.Formula):
            self.put(name, "norm", module, norms.Norm(module, formula, self.backend), str(formula))
        elif formula is not None:
            self.skipped(name, "norm", formula)

    def mlp(self, name: str, module: nn.Module) -> None:
        form = self.recognised(module, mlps.recognise)
        if isinstance(form, mlps.Plain | mlps.Gated):
            new = mlps.PlainMLP if isinstance(form, mlps.Plain) else mlps.GatedMLP
            self.put(name, "mlp", module, new(module, form, self.backend), str(form))  # pyright: ignore[reportArgumentType]
            self.served |= {id(child) for child in module.children()}
        elif form is not None:
            self.skipped(name, "mlp", form)
        elif id(module) not in self.served:
            self.activation(name, module)

    def activation(self, name: str, module: nn.Module) -> None:
        approximate = self.recognised(module, mlps.recognise_activation)
        if approximate is not None:
            new = mlps.Activation(module, approximate, self.backend)
            self.put(name, "mlp", module, new, f"{mlps.GELUS[approximate]} without a bias")
        elif mlps.is_activation(module):
            self.skipped(name, "mlp", f"{type(module).__name__} is neither form of GELU, and no op fuses it by itself")

    def rope(self, name: str, module: nn.Module) -> None:
        reason = rope.recognise(module)
        if reason is None:
            self.put(name, "rope", module, rope.Rope(module, self.backend), "ops.rope")
        elif reason:
            self.skipped(name, "rope", reason)

    def attention(self) -> None:
        reasons: dict[int, str | None] = {}
        for module, config in attention.huggingface_configs(self.model):
            reasons[id(config)] = reason = attention.unreachable(module)
            if reason is None:
                huggingface.register()
                put(module, attention.SETTING, huggingface.NAME, owner=config)
        for name, module in self.modules:
            theirs = reasons.get(id(getattr(module, "config", None)), "")
            if attention.uses_interface(module) or attention.is_gpt_neo_attention(module):
                if theirs is None:
                    self.huggingface_attention(name, module)
                else:
                    self.skipped(name, "attention", theirs or "it belongs to no model with a config")
            elif isinstance(module, nn.MultiheadAttention):
                self.skipped(name, "attention", "nn.MultiheadAttention computes all in one function of PyTorch's")
            elif attention.calls_sdpa(module):
                self.routed(name, module)

    def huggingface_attention(self, name: str, module: nn.Module) -> None:
        if self.backend is not None or "_gptfast_backend" in module.__dict__:
            put(module, "_gptfast_backend", self.backend)
        if attention.is_gpt_neo_attention(module):
            put(module, "_attn", attention.GPTNeoAttend(module))
            self.patched(name, "attention", "ops.attention in the place of its _attn")
        else:
            self.patched(name, "attention", f'attn_implementation="{huggingface.NAME}"')

    def routed(self, name: str, module: nn.Module) -> None:
        if self.recognised(module, attention.never_reaches_sdpa):
            self.skipped(name, "attention", "it ran without calling the scaled_dot_product_attention that it names")
        else:
            new = attention.Routed(module, self.backend)
            self.put(name, "attention", module, new, "its scaled_dot_product_attention runs on ops.attention")

    def loss(self) -> None:
        for name, module in self.modules:
            reason = loss.recognise(module)
            if reason is None:
                self.put(name, "loss", module, loss.Loss(module, self.backend), "ops.linear_cross_entropy in training")
            elif reason:
                self.skipped(name, "loss", reason)
