"""GPT: one class for the GPT-2 and the Llama family, for training, prefill and decode."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.layers import (
    MLP,
    Attention,
    Block,
    Cache,
    Dropout,
    Embedding,
    Layer,
    LayerNorm,
    Linear,
    RMSNorm,
    Weight,
    fill_normal,
    project,
)
from gptfast.model.config import GPTConfig
from gptfast.ops.library import traced
from gptfast.ops.rope import rope_tables
from gptfast.quantize import PackedWeight, QuantizedWeight

ACTIVATIONS = (None, "exact", "int8")


class GPT(nn.Module):
    """A GPT by its configuration; the parameters start as GPT-2's do.

    ids (B, T) int64 -> logits (B, T, V) fp32. The residual stream has the parameters' dtype; fp32 where they are
    quantised.
    """

    def __init__(
        self, config: GPTConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        on: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = Embedding(config.vocab_size, config.n_embd, **on)
        self.positions = Embedding(config.context, config.n_embd, **on) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(_block(config, layer, on) for layer in range(config.n_layer))
        self.norm = _norm(config, on)
        self.head = None if config.tie_embeddings else Linear(config.n_embd, config.vocab_size, False, **on)
        self._activations: str | None = None
        self._backend: str | None = None
        self._tables: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = (
            None  # for which device and length; cos, sin
        )
        # GPT-2: what adds to the residual stream is scaled down, so that its variance does not grow with depth.
        for block in self.blocks:
            assert isinstance(block, Block)
            for linear in (block.attention.out, block.mlp.down):
                fill_normal(_parameter(linear.weight), 0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, ids: Tensor, cache: Cache | None = None, *, last: Tensor | None = None) -> Tensor:
        """Logits in fp32, (B, T, V).

        ids    (B, T) int64
        cache  a KVCache of B rows: the tokens stand behind each row's length and are written there. The lengths stay as
               they are; say cache.advance(...) afterwards.
        last   (B,) int64: the one position 0 .. T-1 of each row whose logits are wanted; the result is (B, V), and the
               LM head runs on these rows only

        Raises ValueError where the tokens don't fit the cache or the model's context.
        """
        return self.logits(ids, cache, last=last).float()

    def logits(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        *,
        last: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The logits as `forward` has them, in the dtype of the residual stream.

        positions (B, T) int64: where learned positions are looked up; None = computed from the cache's lengths
        """
        return self.head_of(self.hidden(ids, cache, last=last, positions=positions))

    def head_of(self, x: Tensor) -> Tensor:
        """The logits of final hidden states."""
        if self.head is not None:
            return self.head(x)
        return project(x, self.embedding.weight, None, self._activations, self._backend)

    def loss(self, ids: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
        """The mean cross-entropy of the next tokens, () fp32, without ever storing all logits.

        ids, targets  (B, T) int64: targets[b, t] is the token that follows ids[b, t], or ignore_index (-100)
        cu_seqlens    (n + 1,) int32, or None: see `hidden`
        options       those of gptfast.ops.linear_cross_entropy: label_smoothing, z_loss, reduction, ...

        Raises ValueError where shapes don't fit. Quantised weights get no gradients: what is trained then is what was
        added to them (gptfast.train.lora).
        """
        weight, bias = self._head_for("loss", ids, targets)
        each = options.get("reduction", "mean") == "none"  # a loss for every token
        rows = None if each else _wanted(targets, cu_seqlens, options.get("ignore_index", -100))
        x = self.hidden(ids, cu_seqlens=cu_seqlens, rows=rows).flatten(0, 1)
        if rows is not None:
            targets = targets[:, rows]
        return ops.linear_cross_entropy(x, weight, targets.flatten(), bias=bias, backend=self._backend, **options)

    def logprobs(
        self, ids: Tensor, targets: Tensor, *, cu_seqlens: Tensor | None = None, **options: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The log-probability of each target, (B, T) fp32, without ever storing all logits; 0 where it is ignored.

        ids, targets, cu_seqlens  as in `loss`
        options                   those of gptfast.ops.token_logprobs: temperature, return_entropy, ignore_index

        Raises ValueError where shapes don't fit.
        """
        weight, bias = self._head_for("logprobs", ids, targets)
        rows = _wanted(targets, cu_seqlens, options.get("ignore_index", -100))
        x = self.hidden(ids, cu_seqlens=cu_seqlens, rows=rows)
        wanted = targets if rows is None else targets[:, rows]
        found = ops.token_logprobs(x, weight, wanted, bias=bias, backend=self._backend, **options)
        if rows is None:
            return found
        made = [
            torch.zeros(targets.shape, dtype=f.dtype, device=f.device).index_copy(1, rows, f)
            for f in (found if isinstance(found, tuple) else (found,))
        ]
        return (made[0], made[1]) if isinstance(found, tuple) else made[0]

    def _head_for(self, name: str, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias, for what needs them without the logits."""
        if targets.shape != ids.shape:
            raise ValueError(f"GPT.{name}: expected targets like ids {tuple(ids.shape)}, got {tuple(targets.shape)}")
        return self.head_weight(), None if self.head is None else self.head.bias

    def head_weight(self) -> Tensor:
        """The matrix (V, C) that makes logits of hidden states, as ops.linear_cross_entropy and ops.token_logprobs take
        it: the parameter itself, or the values of a quantised or packed one, fp32, made anew by each call."""
        weight = (self.embedding if self.head is None else self.head).weight
        if isinstance(weight, Tensor):
            return weight
        return weight.unpack() if isinstance(weight, PackedWeight) else weight.dequantize()

    def hidden(
        self,
        ids: Tensor,
        cache: Cache | None = None,
        *,
        last: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What the head turns into logits, (B, T, C) or (B, C) with `last`; arguments as in `forward` and `logits`.

        cu_seqlens (n + 1,) int32: the one row of ids (1, T) is n sequences side by side, of the tokens
            cu_seqlens[i] .. cu_seqlens[i + 1] - 1. Each begins at position 0, and none sees another
        rows (M,) int64: which tokens of that row are wanted; the result is (1, M, C), and what follows the last block's
            attention runs on these alone. Their bits are those that they have among all

        Raises ValueError where the tokens don't fit, and for rows without cu_seqlens.
        """
        if rows is not None and (cu_seqlens is None or rows.dim() != 1 or rows.dtype != torch.int64):
            got = f"{tuple(rows.shape)} {rows.dtype}" + " without cu_seqlens" * (cu_seqlens is None)
            raise ValueError(f"GPT: expected rows (M,) int64 of packed sequences, got {got}")
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"GPT: expected ids (B, T) int64, got {tuple(ids.shape)} {ids.dtype}")
        if cu_seqlens is not None:
            positions = self._packed_positions(ids, cache, cu_seqlens)
            end = min(ids.shape[1], self.config.context)
        else:
            end = self._end(ids, cache)
        dropout = self._dropout()
        if self.positions is None:
            x = self.embedding(ids)
        else:
            x = self.embedding(ids, _positions(ids, cache) if positions is None else positions, self.positions.weight)
        if dropout is not None:
            x = dropout.on(0)(x)
        tables = self.rope_tables(end, x.device) if self.config.positions == "rope" else None
        if tables is not None and cu_seqlens is not None:
            assert positions is not None
            tables = (tables[0][positions[0]], tables[1][positions[0]])
        branch, stream = self._blocks(x, tables, cache, dropout, cu_seqlens, rows)
        if last is not None:
            rows = torch.arange(ids.shape[0], device=ids.device)
            branch, stream = branch[rows, last], stream[rows, last]
        return self.joined(branch, stream, dropout)

    def _blocks(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        dropout: Dropout | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The last block's branch and the stream that it is not yet part of."""
        stream: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            wanted = rows if layer == len(self.blocks) - 1 else None
            x, stream = block(x, stream, tables, cache, layer, dropout, cu_seqlens, wanted)
        assert stream is not None
        return x, stream

    def branches(self, ids: Tensor, cache: Cache, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `joined` turns into what `hidden` gives, for ids and positions (B, T) int64 that are known to fit: a
        branch and the stream, (B, T, C) both, any of whose rows may be joined alone."""
        if self.positions is None:
            x = self.embedding(ids)
        else:
            x = self.embedding(ids, positions, self.positions.weight)
        rotary = self.config.positions == "rope"
        tables = self.rope_tables(cache.k[0].shape[1], x.device) if rotary else None
        return self._blocks(x, tables, cache)

    def joined(self, branch: Tensor, stream: Tensor, dropout: Dropout | None = None) -> Tensor:
        """The final hidden states (..., C) of what `branches` gives."""
        x, _ = self.norm(branch, stream, dropout and dropout.on(3 * len(self.blocks)))
        return x

    def _end(self, ids: Tensor, cache: Cache | None) -> int:
        """The number of positions that the longest row will have had."""
        B, T = ids.shape
        start = 0
        if cache is not None:
            if cache.lengths.shape[0] != B:
                raise ValueError(f"GPT: expected ids for the cache's {cache.lengths.shape[0]} rows, got {B}")
            start = int(cache.lengths.max())
            capacity = cache.k[0].shape[1]
            if start + T > capacity:
                raise ValueError(
                    f"GPT: expected at most {capacity - start} more tokens in a cache of {capacity}, got {T}"
                )
        if start + T > self.config.context:
            context = self.config.context
            raise ValueError(f"GPT: expected at most {context - start} more tokens in a context of {context}, got {T}")
        return start + T

    def _packed_positions(self, ids: Tensor, cache: Cache | None, cu_seqlens: Tensor) -> Tensor:
        """The place of each token in its sequence, (1, T)."""
        if ids.shape[0] != 1 or cache is not None:
            raise ValueError(f"GPT: expected one row of packed sequences without a cache, got {ids.shape[0]} rows")
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            got = f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            raise ValueError(f"GPT: expected cu_seqlens (n + 1,) int32, got {got}")
        lengths = cu_seqlens.diff()
        T, context = ids.shape[1], self.config.context
        if not torch.compiler.is_compiling():
            if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != T or int(lengths.min()) < 0:
                raise ValueError(f"GPT: expected cu_seqlens from 0 to {T}, never falling, got {cu_seqlens.tolist()}")
            if int(lengths.max()) > context:
                raise ValueError(f"GPT: expected sequences of at most {context} tokens, got {int(lengths.max())}")
        starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths, output_size=T)
        return (torch.arange(T, device=ids.device) - starts)[None]

    def _dropout(self) -> Dropout | None:
        if not self.training or not self.config.dropout:
            return None
        return Dropout(self.config.dropout, torch.randint(1 << 62, ()), 0)  # a tensor: a compiled step takes any seed

    def rope_tables(self, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin (S, R/2) fp32 of the positions 0 .. S-1, S >= end; made once and kept."""
        c = self.config
        # Longrope alone has other frequencies beyond the length that the model was first trained with.
        long = None
        if c.rope_scaling is not None and c.rope_scaling["rope_type"] == "longrope":
            long = end > c.rope_scaling.get("original_max_position_embeddings", c.context)
        kept = self._tables  # read once: another thread may be replacing it
        if kept is None or kept[0] != (device, long) or kept[1][0].shape[0] < end:
            size = min(c.context, max(256, 1 << (end - 1).bit_length()))
            length = None if long is None else c.context if long else 1
            cos, sin = rope_tables(size, c.rotary_dim, c.rope_theta, c.rope_scaling, c.context, length=length)
            self._tables = kept = ((device, long), (cos.to(device), sin.to(device)))
        return kept[1]

    @property
    def activations(self) -> str | None:
        """How products with quantised weights round their input: None = the fast choice, "exact" or "int8"."""
        return self._activations

    @activations.setter
    def activations(self, value: str | None) -> None:
        if value not in ACTIVATIONS:
            raise ValueError(f"GPT.activations: expected None, 'exact' or 'int8', got {value!r}")
        self._activations = value
        for module in self.modules():
            if isinstance(module, Linear):
                module.activations = value

    @property
    def backend(self) -> str | None:
        """Passed to every op as `backend=`."""
        return self._backend

    @backend.setter
    def backend(self, value: str | None) -> None:
        self._backend = value
        for module in self.modules():
            if isinstance(module, Layer):
                module.backend = value

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def weight_bytes(self) -> int:
        """Bytes of all weights as they are held."""
        return sum(p.numel() * p.element_size() for p in self.parameters()) + sum(w.nbytes for w in self._packed())

    def bytes_per_step(self, batch: int, context: int, cache_dtype: torch.dtype | None = None) -> int:
        """The fewest bytes that a decode step moves: every weight that multiplies once, each row's keys and values."""
        gathered = [self.positions] if self.positions is not None else []
        gathered += [self.embedding] if self.head is not None else []
        skipped = sum(_nbytes(module.weight) for module in gathered)
        return self.weight_bytes() - skipped + batch * self.config.kv_bytes_read(context, cache_dtype or self.dtype)

    def _packed(self) -> list[QuantizedWeight | PackedWeight]:
        weights = [getattr(module, "weight", None) for module in self.modules()]
        return [w for w in weights if isinstance(w, QuantizedWeight | PackedWeight)]

    def pack(self) -> GPT:
        """Holds the float matrices of all linear layers packed for the CPU's kernels, one after another, so that never
        more than one is there twice; an embedding too where it is the head. They are no parameters then: for a model
        that only runs."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
        if self.head is None:
            self.embedding.pack()
        return self

    @staticmethod
    def from_folder(path: str | os.PathLike[str], *, weights: str | None = None) -> GPT:
        """Reads a Hugging Face folder (config.json, *.safetensors). `weights`: see gptfast.model.convert."""
        from gptfast.model import convert

        return convert.from_folder(path, weights)

    @staticmethod
    def from_gguf(gguf: Any, *, weights: str | None = None) -> GPT:
        """From an open GGUF file; quantised tensors stay as they are stored. `weights`: see gptfast.model.convert."""
        from gptfast.model import convert

        return convert.from_gguf(gguf, weights)

    @staticmethod
    def from_huggingface_model(model: nn.Module, *, weights: str | None = None) -> GPT:
        """From a live transformers model, whose weights are copied. `weights`: see gptfast.model.convert."""
        from gptfast.model import convert

        return convert.from_huggingface_model(model, weights)

    def save_folder(self, path: str | os.PathLike[str]) -> None:
        """Writes config.json and safetensors as transformers has them; quantised weights as fp32."""
        from gptfast.model import convert

        convert.save_folder(self, path)

    def save_gguf(self, path: str | os.PathLike[str], kind: str | None = None) -> None:
        """Writes a GGUF file without a tokenizer, its matrices of this kind (F32, F16, BF16, Q8_0, Q4_0, Q4_1) or as
        they are held."""
        from gptfast.model import convert

        convert.save_gguf(self, path, kind)


def _wanted(targets: Tensor, cu_seqlens: Tensor | None, ignored: int) -> Tensor | None:
    """Which tokens of packed sequences have a target, (M,) int64. None where nearly all or none have one, or values
    can't be read: all are computed then."""
    if cu_seqlens is None or traced(targets):
        return None
    rows = (targets[0] != ignored).nonzero().squeeze(1)
    return rows if 0 < 8 * len(rows) <= 7 * targets.shape[1] else None


def _positions(ids: Tensor, cache: Cache | None) -> Tensor:
    steps = torch.arange(ids.shape[1], device=ids.device)
    return steps.expand(ids.shape) if cache is None else cache.lengths[:, None] + steps


def _parameter(weight: Weight) -> Tensor:
    assert isinstance(weight, Tensor)
    return weight


def _nbytes(weight: Weight) -> int:
    return weight.nbytes


def _norm(c: GPTConfig, on: dict[str, Any]) -> LayerNorm | RMSNorm:
    return LayerNorm(c.n_embd, c.norm_eps, **on) if c.norm == "layer_norm" else RMSNorm(c.n_embd, c.norm_eps, **on)


def _block(c: GPTConfig, layer: int, on: dict[str, Any]) -> Block:
    attention = Attention(
        *(c.n_embd, c.n_head, c.n_kv_head, c.head_dim),
        qkv_bias=c.qkv_bias,
        out_bias=c.out_bias,
        qk_norm_eps=c.norm_eps if c.qk_norm else None,
        window=c.layer_window(layer),
        **on,
    )
    return Block(_norm(c, on), attention, _norm(c, on), MLP(c.n_embd, c.ffn_dim, c.activation, c.mlp_bias, **on))
