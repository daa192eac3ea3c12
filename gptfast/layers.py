"""nn.Modules over the ops: the parts of a GPT, each usable on its own.

State dicts have the names of torch's own modules (`weight`, `bias`). `backend` of a layer is passed to every op that it
calls; `activations` of a Linear says how it rounds its input. Dimensions: batch B, tokens T, heads H, key heads Hk,
head_dim D, width C, MLP width F, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.ops.philox import dropout_keep
from gptfast.quantize import PackedWeight, QuantizedWeight

Weight: TypeAlias = Tensor | QuantizedWeight | PackedWeight


class Cache(Protocol):
    """What a layer needs of a KV cache: for each layer, k and v (B, capacity, Hk, D) of any float dtype, or int8 with
    their scales (B, capacity, Hk) fp32; lengths (B,) int32."""

    k: list[Tensor]
    v: list[Tensor]
    k_scale: list[Tensor] | None
    v_scale: list[Tensor] | None
    lengths: Tensor


class Dropout(NamedTuple):
    """Dropout of one op in one training step; every op has a stream of its own, every step a seed."""

    p: float
    seed: Tensor | int
    stream: int

    def on(self, stream: int) -> Dropout:
        return self._replace(stream=stream)

    def __call__(self, x: Tensor) -> Tensor:
        """x with dropped elements 0 and the others scaled by 1 / (1 - p)."""
        return x * dropout_keep(tuple(x.shape), self.p, self.seed, self.stream, x.device) / (1 - self.p)

    def arguments(self) -> dict[str, Any]:
        """As the ops take it."""
        return {"dropout_p": self.p, "seed": self.seed, "stream": self.stream}


def _chosen(x: Tensor, rows: Tensor | None, backend: str | None) -> Tensor:
    """x (1, T, C) -> (1, M, C): these of its tokens, by the op whose gradient is made quickly."""
    return x if rows is None else ops.embedding(rows[None], x.flatten(0, 1), backend=backend)


def _drop(dropout: Dropout | None) -> dict[str, Any]:
    return {} if dropout is None else dropout.arguments()


class Layer(nn.Module):
    """A module whose ops can be told where to run."""

    backend: str | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        """What .to(), .cuda() and their like are made of: a weight that is no parameter moves too. One packed for
        the CPU's kernels is unpacked on its way to another device."""
        super()._apply(fn, recurse)
        weight = self.__dict__.get("weight")
        if isinstance(weight, QuantizedWeight):
            set_weight(self, weight.moved(fn))
        elif isinstance(weight, PackedWeight) and fn(weight.packed[:0]).device != weight.device:
            set_weight(self, fn(weight.unpack()))
        return self


def fill_normal(weight: Tensor, std: float = 0.02) -> None:
    """N(0, std), as GPT-2 starts; nothing on the meta device, where it would only take time."""
    if weight.device.type != "meta":
        nn.init.normal_(weight, std=std)


class Linear(Layer):
    """x (..., K) -> (..., N): x weight^T + bias, the weight a parameter (N, K), a QuantizedWeight or a PackedWeight.

    activations: None = the fast choice ("int8" with a quantised weight, "exact" with a plain one), "exact" or "int8";
        a plain weight always takes exact activations.
    """

    activations: str | None = None
    weight: nn.Parameter | QuantizedWeight | PackedWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        fill_normal(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_weight(self, weight: Weight) -> None:
        """Holds this weight from now on, as it is."""
        set_weight(self, weight)

    def pack(self) -> None:
        """Holds a float weight packed for the CPU's kernels and no longer as a parameter: it can't be trained then."""
        if isinstance(self.weight, Tensor):
            set_weight(self, PackedWeight.pack(self.weight.detach()))

    def forward(self, x: Tensor, *, skip_bias: bool = False) -> Tensor:
        """skip_bias: the caller adds the bias, fused with what follows."""
        return project(x, self.weight, None if skip_bias else self.bias, self.activations, self.backend)


def set_weight(module: nn.Module, weight: Weight) -> None:
    """Makes `weight` the module's: a parameter, or a plain attribute where it is quantised or packed."""
    if not isinstance(weight, Tensor):
        module._parameters.pop("weight", None)
        module.__dict__["weight"] = weight
    else:
        module.__dict__.pop("weight", None)
        module._parameters["weight"] = nn.Parameter(weight)  # in its old place: the order of parameters stays


def project(x: Tensor, weight: Weight, bias: Tensor | None, activations: str | None, backend: str | None) -> Tensor:
    """ops.linear with the fast choice of activations where none is given."""
    if isinstance(weight, QuantizedWeight):
        return ops.linear(x, weight, bias, activations=activations or "int8", backend=backend)
    return ops.linear(x, weight, bias, backend=backend)


class Embedding(Layer):
    """ids (...) int64 -> (..., C), rows of the weight (V, C), which may be quantised or packed."""

    weight: nn.Parameter | QuantizedWeight | PackedWeight

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, device=device, dtype=dtype))
        fill_normal(self.weight)

    def set_weight(self, weight: Weight) -> None:
        """Holds this weight from now on, as it is."""
        set_weight(self, weight)

    def pack(self) -> None:
        """As Linear.pack, for an embedding that is the head too."""
        if isinstance(self.weight, Tensor):
            set_weight(self, PackedWeight.pack(self.weight.detach()))

    def forward(self, ids: Tensor, positions: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """With positions (broadcast to ids, int64) and their table (P, C), the sum of both rows."""
        if isinstance(self.weight, QuantizedWeight):
            return self.weight.embed(ids, positions, None if table is None else table.float())
        if isinstance(self.weight, PackedWeight):
            return self.weight.embed(ids, positions, table)
        return ops.embedding(ids, self.weight, positions=positions, position_weight=table, backend=self.backend)


class LayerNorm(Layer):
    """Layer normalisation over the last dimension; with a residual, returns (norm(x + residual), x + residual)."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout: Dropout | None = None):
        options = _drop(dropout)
        return ops.layer_norm(x, self.weight, self.bias, self.eps, residual=residual, backend=self.backend, **options)


class RMSNorm(Layer):
    """RMS normalisation over the last dimension; with a residual, returns (norm(x + residual), x + residual)."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout: Dropout | None = None):
        return ops.rms_norm(x, self.weight, self.eps, residual=residual, backend=self.backend, **_drop(dropout))


class MLP(Layer):
    """x (..., C) -> (..., C). Plain: down(gelu(up(x))). Gated: down(act(gate(x)) * up(x)), where the rows of `up` are
    gate's F and then up's F, one product.

    activation: "gelu_tanh", "gelu", "swiglu" or "geglu" (exact GELU).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "gelu_tanh",
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.hidden = activation, hidden
        self.gated = activation in ("swiglu", "geglu")
        self.up = Linear(dim, hidden * (2 if self.gated else 1), bias, device=device, dtype=dtype)
        self.down = Linear(hidden, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            h = self.up(x, skip_bias=True)
            return self.down(ops.bias_gelu(h, self.up.bias, approximate=approximate, backend=self.backend))
        h = self.up(x)
        gate, up = h.split(self.hidden, -1)  # one gradient for both, where slices would have two of h's size
        if self.activation == "swiglu":
            return self.down(ops.swiglu(gate, up, backend=self.backend))
        return self.down(ops.geglu(gate, up, approximate="none", backend=self.backend))


class Attention(Layer):
    """Causal self-attention with one fused projection: x (B, T, C) -> (B, T, C).

    The rows of `qkv` are q's H D, k's Hk D and v's Hk D; q, k and v are views of its output. With a cache, the T tokens
    stand behind each row's length: they are written there and see all that is before them.
    """

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None

    def __init__(
        self,
        dim: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        *,
        qkv_bias: bool = True,
        out_bias: bool = True,
        qk_norm_eps: float | None = None,
        window: tuple[int, int] = (-1, -1),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.window = n_head, n_kv_head, head_dim, window
        self.qkv = Linear(dim, (n_head + 2 * n_kv_head) * head_dim, qkv_bias, device=device, dtype=dtype)
        self.out = Linear(n_head * head_dim, dim, out_bias, device=device, dtype=dtype)
        if qk_norm_eps is None:
            self.q_norm = self.k_norm = None
        else:
            self.q_norm = RMSNorm(head_dim, qk_norm_eps, device=device, dtype=dtype)
            self.k_norm = RMSNorm(head_dim, qk_norm_eps, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        dropout: Dropout | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """tables: cos and sin (S, R/2) of the positions from 0, or None. cache: its k[layer] and v[layer] are used.
        cu_seqlens (n + 1,) int32: the one row of x is n sequences side by side, and tables has a row for each token.
        rows (M,) int64: which tokens' results are wanted, where B = 1; all tokens are attended to."""
        B, T, _ = x.shape
        H, Hk = self.n_head, self.n_kv_head
        heads = self.qkv(x).view(B, T, H + 2 * Hk, self.head_dim)
        q, k, v = heads.split((H, Hk, Hk), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is not None:
            cos, sin = tables if tables is not None else (None, None)
            scales = {}
            if cache.k_scale is not None and cache.v_scale is not None:
                scales = {"k_scale": cache.k_scale[layer], "v_scale": cache.v_scale[layer]}
            rounds = isinstance(self.qkv.weight, QuantizedWeight) and self.qkv.activations != "exact" and not scales
            # The CPU's kernel takes a cache of another dtype with fp32 queries alone; on the reference a row's bits
            # would depend on how many are fed together.
            wider = q.device.type == "cpu" and cache.k[layer].dtype != q.dtype in (torch.bfloat16, torch.float16)
            if wider:
                q, k, v = q.float(), k.float(), v.float()
            mixed = ops.attention_kvcache(
                *(q, cache.k[layer], cache.v[layer], cache.lengths),
                **dict(k=k, v=v, window=self.window, cos=cos, sin=sin, backend=self.backend, **scales),
                activations="rounded" if rounds else "exact",
            )
            if wider:
                mixed = mixed.to(x.dtype)
        else:
            if tables is not None:
                q, k = ops.rope(q, k, tables[0][:T], tables[1][:T], backend=self.backend)
            packed: dict[str, Any] = {}
            if cu_seqlens is not None:
                q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
                packed = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            options = packed | _drop(dropout)
            mixed = ops.attention(q, k, v, causal=True, window=self.window, backend=self.backend, **options)
        return self.out(_chosen(mixed.reshape(B, T, H * self.head_dim), rows, self.backend))


class Block(Layer):
    """Attention and MLP, each behind a norm that adds the branch before it to the residual stream.

    (branch, stream) -> (branch, stream): what goes in and comes out is a branch that is not yet part of the stream, so
    that the addition is fused with the norm that needs it. The first block gets the embeddings and None.
    """

    def __init__(
        self, attention_norm: LayerNorm | RMSNorm, attention: Attention, mlp_norm: LayerNorm | RMSNorm, mlp: MLP
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp

    def forward(
        self,
        branch: Tensor,
        stream: Tensor | None,
        tables: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        dropout: Dropout | None = None,
        cu_seqlens: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """dropout: its streams 3 layer, + 1 and + 2 serve the branch that comes in, the attention and its branch.
        rows: as Attention has them; the MLP runs on these alone."""
        at = 3 * layer
        if stream is None:
            h, stream = self.attention_norm(branch), branch
        else:
            h, stream = self.attention_norm(branch, stream, dropout and dropout.on(at))
        h = self.attention(h, tables, cache, layer, dropout and dropout.on(at + 1), cu_seqlens, rows)
        assert stream is not None
        h, stream = self.mlp_norm(h, _chosen(stream, rows, self.backend), dropout and dropout.on(at + 2))
        assert stream is not None
        return self.mlp(h), stream
