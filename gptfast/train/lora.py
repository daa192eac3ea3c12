"""Low-rank adapters: a model is fine-tuned by a few small matrices beside its own, which stay as they are.

    y = x W^T + b + scale (x' A^T) B^T,   scale = alpha / r  (rank-stabilised: alpha / sqrt(r))

Hu et al.: LoRA (arXiv:2106.09685); Kalajdzievski: rsLoRA (arXiv:2312.03732). x' is x, with dropout in training. A is
uniform in +-1/sqrt(K) as PEFT starts it, B zero: a model with fresh adapters computes what it did before.

Our linear layers are some of Hugging Face's put together, and each of those has an adapter of its own, so that a saved
one is PEFT's: rows of A and of B for each part.

    attention.qkv   q_proj, k_proj, v_proj    A (3 r, K)    B (H D + 2 Hk D, r)       GPT-2: c_attn, one part
    mlp.up          gate_proj, up_proj        A (2 r, K)    B (2 F, r)                GPT-2: c_fc, one part
    attention.out   o_proj                    A (r, K)      B (C, r)                  GPT-2: attn.c_proj
    mlp.down        down_proj                 A (r, K)      B (C, r)                  GPT-2: mlp.c_proj

The base may be quantised (SmolLM2's file is): products use the values of its 4 or 8 bits, gradients pass through them
(gptfast.ops.linear_gradients), and one matrix at a time is held in fp32 for it. In add_lora's hands such a model
computes with exact activations, in training and without gradients alike, unless `activations` says otherwise.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.formats.extras import need
from gptfast.formats.files import FormatError, read_json, replacing
from gptfast.formats.huggingface import write_safetensors
from gptfast.layers import Dropout, Linear, Weight, set_weight
from gptfast.model import GPT, convert, huggingface
from gptfast.quantize import PackedWeight, QuantizedWeight

CONFIG, ADAPTERS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
# What PEFT's configuration may ask for that is not computed here, and how it says that it doesn't.
BEYOND = {
    **dict(bias="none", use_dora=False, rank_pattern={}, alpha_pattern={}, modules_to_save=None),
    **dict(layers_to_transform=None, layer_replication=None, lora_bias=False, target_parameters=None),
}
TARGETS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")


@dataclass(frozen=True)
class LoRAConfig:
    """rank and alpha are the formula's r and alpha; targets: which layers of each block."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = set(self.targets) - set(TARGETS)
        for condition, expected, got in (
            (isinstance(self.rank, int) and self.rank > 0, "rank a positive whole number", self.rank),
            (math.isfinite(self.alpha) and self.alpha > 0, "alpha a positive number", self.alpha),
            (0 <= self.dropout < 1, "0 <= dropout < 1", self.dropout),
            (self.targets and not unknown, f"targets among {', '.join(TARGETS)}", ", ".join(self.targets) or "none"),
        ):
            if not condition:
                raise ValueError(f"LoRAConfig: expected {expected}, got {got}")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(Linear):
    """A Linear with an adapter; it holds the same weight and bias, frozen.

    lora_A  (parts r, K) fp32, of each part r rows; lora_B (N, r) fp32, the rows of a part those of its outputs
    """

    def __init__(self, base: Linear, parts: Sequence[int], config: LoRAConfig, generator: torch.Generator) -> None:
        """parts: of the N outputs, how many belong to each adapter."""
        nn.Module.__init__(self)  # the weight is the base's: nothing is allocated for another
        self.in_features, self.out_features = base.in_features, base.out_features
        self.activations, self.backend = base.activations, base.backend
        self.set_weight(base.weight)
        self.register_parameter("bias", base.bias)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.parts, self.config, self.enabled = tuple(parts), config, True
        device, r = base.weight.device, config.rank
        bound = 1 / math.sqrt(self.in_features)
        A = torch.empty(len(parts) * r, self.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device))

    def forward(self, x: Tensor, *, skip_bias: bool = False) -> Tensor:
        y = super().forward(x, skip_bias=skip_bias)
        return y + self.delta(x).to(y.dtype) if self.enabled else y

    def delta(self, x: Tensor) -> Tensor:
        """What the adapters add, (..., N) fp32."""
        if self.training and self.config.dropout:
            x = _dropped(x, self.config.dropout, self.backend)
        hidden = ops.linear(x.to(self.lora_A.dtype), self.lora_A, backend=self.backend) * self.config.scale
        sides = zip(hidden.split(self.config.rank, -1), self.lora_B.split(self.parts))
        y = [ops.linear(h.contiguous(), B, backend=self.backend) for h, B in sides]
        return y[0] if len(y) == 1 else torch.cat(y, -1)

    def merged(self) -> Tensor:
        """The weight with what the adapters add to it, (N, K) in the weight's dtype; fp32 where it is quantised."""
        weight = self.weight
        if not isinstance(weight, Tensor):
            weight = weight.unpack() if isinstance(weight, PackedWeight) else weight.dequantize()
        pairs = zip(self.lora_B.detach().split(self.parts), self.lora_A.detach().split(self.config.rank))
        added = torch.cat([B @ A for B, A in pairs]) * self.config.scale
        return (weight.detach().float() + added).to(weight.dtype)


def _dropped(x: Tensor, p: float, backend: str | None) -> Tensor:
    """x with dropout. A norm's kernel does it on the way to the sum that it returns; Philox in PyTorch's ops would take
    ten times as long (62 against 5 ms for 1024 x 576)."""
    dropout = Dropout(p, torch.randint(1 << 62, ()), 0)
    one = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    _, dropped = ops.rms_norm(x, one, residual=torch.zeros_like(x), backend=backend, **dropout.arguments())
    return dropped


def add_lora(model: GPT, config: LoRAConfig | None = None, *, seed: int = 0) -> GPT:
    """Gives the targeted layers adapters, in place, and freezes everything else; returns the model.

    seed: of the A matrices. Raises ValueError for a model that has adapters.
    """
    config = config or LoRAConfig()
    if adapted(model):
        raise ValueError("add_lora: expected a model without adapters, got one with: merge_lora comes first")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    sources, quantised = huggingface.names(model.config), False
    for i, block in enumerate(model.blocks):
        for target in config.targets:
            base = block.get_submodule(target)
            assert isinstance(base, Linear)
            quantised |= isinstance(base.weight, QuantizedWeight)
            source = sources[f"blocks.{i}.{target}.weight"]
            parts = convert.part_sizes(model.config, source, base.out_features)
            block.set_submodule(target, LoRALinear(base, parts, config, generator))
    if quantised and model.activations is None:
        model.activations = "exact"
    return model


def blank_of(model: GPT) -> GPT:
    """A model of the same layers whose parameters are on the meta device, to be loaded; what is quantised, which no
    parameter holds, is shared."""
    made = GPT(model.config, device="meta")
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, (QuantizedWeight, PackedWeight)):
            set_weight(made.get_submodule(name), weight)
    if adapted(model):
        add_lora(made, lora_config(model))
    made.activations, made.backend = model.activations, model.backend
    return made


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def lora_config(model: nn.Module) -> LoRAConfig:
    """The configuration of a model's adapters. Raises ValueError where it has none."""
    layers = adapted(model)
    if not layers:
        raise ValueError("expected a model with adapters, got one without: add_lora or load_adapter comes first")
    return next(iter(layers.values())).config


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by the names of the model's parameters."""
    lora_config(model)
    pairs = [(f"{n}.{end}", getattr(layer, end)) for n, layer in adapted(model).items() for end in ("lora_A", "lora_B")]
    return dict(pairs)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without its adapters: the reference of DPO and PPO, with no second model."""
    layers = list(adapted(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, was in zip(layers, before):
            layer.enabled = was


def _hold(linear: Linear, weight: Weight) -> Linear:
    """A Linear of this weight and the other's bias and settings."""
    made = Linear(linear.in_features, linear.out_features, device="meta")
    made.set_weight(weight)
    made.bias = linear.bias
    made.activations, made.backend = linear.activations, linear.backend
    return made.train(linear.training)


def merge_lora(model: GPT) -> GPT:
    """Adds the adapters to the weights, in place, and takes them away; returns the model.

    A quantised weight becomes fp32: its blocks couldn't hold what is added. In floating point it can't be undone
    exactly; where the adapters are still needed, `merged_copy` leaves the model as it is.
    """
    lora_config(model)
    for name, layer in adapted(model).items():
        model.set_submodule(name, _hold(layer, layer.merged()))
    return model


@torch.no_grad()
def merged_copy(model: GPT, weights: str | None = None) -> GPT:
    """A model to generate with: the adapters merged into weights of its own, everything else shared with the given one.

    A layer with an adapter takes two small products more, between which a decode step can't be replayed; rollouts are
    better written by this copy, made anew after each update. Give a new LanguageModel(merged_copy(model), tokenizer) to
    each, for one keeps recorded steps.

    weights  None: floats, packed for the CPU's kernels; "q8_0", "q4_0" or "q4_1": quantised anew, which reads less
             and changes the distribution a little
    """
    lora_config(model)
    made = _shallow(model).eval()
    for name, layer in adapted(model).items():
        values = layer.merged()
        if weights is not None:
            held = QuantizedWeight.quantize(values, weights)
        else:
            held = PackedWeight.pack(values) if values.device.type == "cpu" else values
        made.set_submodule(name, _hold(layer, held).eval())
    assert isinstance(made, GPT)
    return made


def _shallow(module: nn.Module) -> nn.Module:
    """Modules of their own that share all tensors."""
    made = copy.copy(module)
    made._parameters, made._buffers = dict(module._parameters), dict(module._buffers)
    made._modules = {name: None if child is None else _shallow(child) for name, child in module._modules.items()}
    return made


def _pieces(model: GPT) -> Iterator[tuple[str, Tensor, Tensor]]:
    """PEFT's name of each adapter, and its rows of A and B, which are views."""
    sources = huggingface.names(model.config)
    for name, layer in adapted(model).items():
        A, B = layer.lora_A.detach().split(layer.config.rank), layer.lora_B.detach().split(layer.parts)
        for theirs, a, b in zip(sources[f"{name}.weight"].names, A, B):
            yield "base_model.model." + theirs.removesuffix(".weight"), a, b


def save_adapter(model: GPT, folder: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Writes the adapters as PEFT does: adapter_config.json and adapter_model.safetensors, in fp32.

    base: what PEFT looks the base model up by, a folder or a name. Raises ValueError for a model without adapters.
    """
    c = lora_config(model)
    tensors: dict[str, Tensor] = {}
    for name, a, b in _pieces(model):
        tensors |= {f"{name}.lora_A.weight": a.cpu().clone(), f"{name}.lora_B.weight": b.cpu().clone()}
    # The last two names of a path: "c_proj" alone would be the attention's and the MLP's.
    targets = sorted({".".join(name.split(".")[-2:]) for name, _, _ in _pieces(model)})
    config = {
        **dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True),
        **dict(r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout, use_rslora=c.rslora, target_modules=targets),
        **dict(fan_in_fan_out=model.config.family == "gpt2", bias="none", init_lora_weights=True),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ADAPTERS) as part:
        write_safetensors(tensors, part)
    with replacing(folder / CONFIG) as part:
        part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(model: GPT, folder: str | os.PathLike[str]) -> GPT:
    """Reads adapters that save_adapter or PEFT wrote; the model gets them if it has none. Returns the model.

    Where PEFT adapted only some of a fused layer's projections (q_proj and v_proj, say), the others' A and B are zero
    and stay so in training. Raises FormatError (a ValueError) for files of another kind, with tensors that don't fit
    the model, or that ask for more than the formula above; ValueError for a model whose adapters are set up otherwise.
    """
    folder = Path(folder)
    for name in (CONFIG, ADAPTERS):
        if not (folder / name).is_file():
            raise FormatError(f"{folder.name}: expected {CONFIG} and {ADAPTERS}, found no {name}")
    tensors = _read_tensors(folder / ADAPTERS)
    config = _read_config(read_json(folder / CONFIG), _targets(model, tensors))
    if adapted(model) and (own := lora_config(model)) != config:
        raise ValueError(f"load_adapter: expected the model's own {own}, got {config}")
    _check_tensors(tensors, _shapes(model, config))
    if not adapted(model):
        add_lora(model, config)
    pieces = {f"{name}.lora_{end}.weight": t for name, a, b in _pieces(model) for end, t in (("A", a), ("B", b))}
    for name, piece in pieces.items():
        if name in tensors:
            piece.copy_(tensors[name])
        else:
            piece.zero_()
    return model


def _shapes(model: GPT, config: LoRAConfig) -> dict[str, tuple[int, int]]:
    """The shape of each tensor of adapters for this model, by PEFT's name."""
    sources, shapes = huggingface.names(model.config), dict[str, tuple[int, int]]()
    for i, block in enumerate(model.blocks):
        for target in config.targets:
            source, base = sources[f"blocks.{i}.{target}.weight"], block.get_submodule(target)
            assert isinstance(base, Linear)
            rows = convert.part_sizes(model.config, source, base.out_features)
            for theirs, n in zip(source.names, rows):
                name = "base_model.model." + theirs.removesuffix(".weight")
                shapes[f"{name}.lora_A.weight"] = config.rank, base.in_features
                shapes[f"{name}.lora_B.weight"] = n, config.rank
    return shapes


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, int]]) -> None:
    for name, tensor in tensors.items():
        if name not in wanted:
            raise FormatError(f"{ADAPTERS}: expected adapters of this model's layers, got {name}")
        if tuple(tensor.shape) != wanted[name] or not tensor.is_floating_point():
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise FormatError(f"{ADAPTERS}: expected {name} of {wanted[name]} floats, got {got}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    library = need("safetensors", "models")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except library.SafetensorError as error:
        raise FormatError(f"{path.name}: expected a safetensors file, got {error}") from None


def _targets(model: GPT, tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """The layers that the tensors are adapters of."""
    sources = huggingface.names(model.config)
    there = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    return tuple(
        target
        for target in TARGETS
        if any(
            theirs.removesuffix(".weight") in there
            for i in range(model.config.n_layer)
            for theirs in sources[f"blocks.{i}.{target}.weight"].names
        )
    )


def _read_config(given: dict[str, Any], targets: tuple[str, ...]) -> LoRAConfig:
    if given.get("peft_type") != "LORA":
        raise FormatError(f"{CONFIG}: expected peft_type 'LORA', got {given.get('peft_type')!r}")
    for name, without in BEYOND.items():
        if (value := given.get(name)) not in (None, without):
            raise FormatError(f"{CONFIG}: expected {name} {without!r}, got {value!r:.80}")
    if not targets:
        raise FormatError(f"{ADAPTERS}: expected adapters of {', '.join(TARGETS)}, got none of them")
    rank = given.get("r")
    asked = given.get("lora_alpha"), given.get("lora_dropout", 0.0)
    numbers: list[Any] = [value for value in asked if type(value) in (int, float)]
    if type(rank) is not int or len(numbers) < 2:
        got = {name: given.get(name) for name in ("r", "lora_alpha", "lora_dropout")}
        raise FormatError(f"{CONFIG}: expected r, lora_alpha and lora_dropout as numbers, got {got!r:.200}")
    try:
        return LoRAConfig(rank, float(numbers[0]), float(numbers[1]), bool(given.get("use_rslora")), targets)
    except ValueError as error:
        raise FormatError(f"{CONFIG}: {error}") from None
