"""What a GPT is made of, as data: the GPT-2 and the Llama family under one set of names, with their costs.

gpt2    LayerNorm, learned positions, biases everywhere, up -> GELU -> down, dense attention
llama   RMSNorm, rotary positions, gate * up -> down, grouped-query attention; Mistral adds a sliding window, Qwen2
        biases on q, k, v, Qwen3 an RMSNorm on each head of q and k
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class GPTConfig:
    """One model's architecture. Sizes are counts of elements; a window counts tokens, the query's own included."""

    family: str  # "gpt2" or "llama": whose names the tensors have in Hugging Face folders
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    context: int
    n_kv_head: int = 0  # 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    ffn_dim: int = 0  # 0: 4 n_embd
    norm: str = "layer_norm"  # or "rms_norm"
    norm_eps: float = 1e-5
    positions: str = "learned"  # or "rope"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None  # as in Hugging Face configs, with "rope_type"
    rotary_dim: int = 0  # the leading part of a head that is rotated; 0: all of it
    activation: str = "gelu_tanh"  # or "gelu", "swiglu", "geglu"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None  # which layers have the window; None: all
    tie_embeddings: bool = True
    dropout: float = 0.0  # in training: of embeddings, attention and both branches of a block
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("n_kv_head", self.n_head), ("ffn_dim", 4 * self.n_embd)):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        if not self.head_dim:
            self._require(self.n_embd % self.n_head == 0, "n_embd a multiple of n_head or a head_dim", self.n_embd)
            object.__setattr__(self, "head_dim", self.n_embd // self.n_head)
        if self.positions == "rope" and not self.rotary_dim:
            object.__setattr__(self, "rotary_dim", self.head_dim)
        for name, values in (
            ("family", ("gpt2", "llama")),
            ("norm", ("layer_norm", "rms_norm")),
            ("positions", ("learned", "rope")),
            ("activation", ("gelu_tanh", "gelu", *GATED)),
        ):
            self._require(getattr(self, name) in values, f"{name} one of {', '.join(values)}", getattr(self, name))
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "context", "head_dim", "ffn_dim"):
            value = getattr(self, name)
            self._require(isinstance(value, int) and value > 0, f"{name} a positive whole number", value)
        self._require(
            self.n_head % self.n_kv_head == 0, f"n_head a multiple of n_kv_head {self.n_kv_head}", self.n_head
        )
        self._require(self.rotary_dim % 2 == 0 and self.rotary_dim <= self.head_dim,
                      f"rotary_dim even and at most head_dim {self.head_dim}", self.rotary_dim)  # fmt: skip
        self._require(self.window is None or self.window > 0, "window None or a positive number of tokens", self.window)
        self._require(self.window_layers is None or len(self.window_layers) == self.n_layer,
                      f"window_layers one flag for each of {self.n_layer} layers", self.window_layers)  # fmt: skip
        self._require(0 <= self.dropout < 1, "0 <= dropout < 1", self.dropout)

    @staticmethod
    def _require(condition: bool, expected: str, got: object) -> None:
        if not condition:
            raise ValueError(f"GPTConfig: expected {expected}, got {got}")

    @staticmethod
    def from_huggingface(config: dict[str, Any]) -> GPTConfig:
        """From the contents of a config.json. Raises ValueError for a model that GPT can't compute."""
        from gptfast.model.huggingface import read_config

        return read_config(config)

    def to_huggingface(self) -> dict[str, Any]:
        """The contents of a config.json that transformers reads as the same model."""
        from gptfast.model.huggingface import write_config

        return write_config(self)

    @staticmethod
    def from_gguf(metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> GPTConfig:
        """From a GGUF file's metadata and the shapes of its tensors by name (PyTorch's order)."""
        from gptfast.model.gguf import read_config

        return read_config(metadata, tensors)

    def replace(self, **changes: Any) -> GPTConfig:
        """The same configuration but for these fields."""
        return replace(self, **changes)

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies a gate with its up projection."""
        return self.activation in GATED

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """The rows of q, k and v in the fused projection."""
        return self.n_head * self.head_dim, self.n_kv_head * self.head_dim, self.n_kv_head * self.head_dim

    def layer_window(self, layer: int) -> tuple[int, int]:
        """The window of a layer as the attention ops take it: (keys to the left of the query's own, to the right)."""
        if self.window is None or not (self.window_layers is None or self.window_layers[layer]):
            return (-1, -1)
        return (self.window - 1, 0)

    def matrix_parameters(self) -> int:
        """Elements of all matrices that multiply a token's activations, the LM head among them."""
        ups = 2 if self.gated else 1
        attention = self.n_embd * (sum(self.qkv_rows) + self.n_head * self.head_dim)
        return self.n_layer * (attention + (ups + 1) * self.n_embd * self.ffn_dim) + self.vocab_size * self.n_embd

    def parameters(self) -> int:
        """The number of distinct parameters."""
        norm = self.n_embd * (2 if self.norm == "layer_norm" else 1)
        biases = sum(self.qkv_rows) * self.qkv_bias + self.n_embd * self.out_bias
        biases += (self.ffn_dim * (2 if self.gated else 1) + self.n_embd) * self.mlp_bias
        total = self.matrix_parameters() + self.n_layer * (2 * norm + biases + 2 * self.head_dim * self.qk_norm) + norm
        total += self.context * self.n_embd if self.positions == "learned" else 0
        return total if self.tie_embeddings else total + self.vocab_size * self.n_embd

    def attended(self, layer: int, context: int) -> int:
        """How many keys a query sees in this layer when `context` tokens, its own included, are there."""
        left, _ = self.layer_window(layer)
        return context if left < 0 else min(context, left + 1)

    def flops_per_token(self, context: int) -> int:
        """FLOPs of one token's forward pass (a multiply-add counts two) that sees `context` tokens, its own included.

        Every matrix once, and for each head q k and p v. Training costs three times this; the average token of a
        training row of T tokens sees (T + 1) / 2.
        """
        keys = sum(self.attended(layer, context) for layer in range(self.n_layer))
        return 2 * self.matrix_parameters() + 4 * self.n_head * self.head_dim * keys

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.float32) -> int:
        """Bytes that one token takes in the KV cache."""
        return 2 * self.n_layer * self._position_bytes(dtype)

    def kv_bytes_read(self, context: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the KV cache that one row's decode step must read."""
        keys = sum(self.attended(layer, context) for layer in range(self.n_layer))
        return 2 * keys * self._position_bytes(dtype)

    def _position_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all heads' keys, or values, at one position of one layer; each head of int8 has a scale."""
        return self.n_kv_head * (self.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))

    def bytes_per_step(self, batch: int, context: int, dtype: torch.dtype = torch.float32) -> int:
        """The fewest bytes that a decode step of `batch` rows moves: every matrix once, each row's keys and values.

        `dtype` is that of weights and cache. GPT.bytes_per_step counts the weights that a model really holds.
        """
        return self.matrix_parameters() * dtype.itemsize + batch * self.kv_bytes_read(context, dtype)
