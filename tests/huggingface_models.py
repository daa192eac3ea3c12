"""Tiny random Hugging Face models of the families that gptfast.patch knows, for the tests of patching."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

SMALL: dict[str, Any] = dict(
    vocab_size=211, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=96, max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
UNGROUPED = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
GPT2: dict[str, Any] = dict(
    model_type="gpt2", vocab_size=211, n_positions=128, n_embd=64, n_layer=3, n_head=4, bos_token_id=None,
    eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
GPT_NEO: dict[str, Any] = dict(
    model_type="gpt_neo", vocab_size=211, hidden_size=64, num_layers=4, num_heads=4, window_size=9, bos_token_id=None,
    max_position_embeddings=128, eos_token_id=None, attention_types=[[["global", "local"], 2]],
    resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
OPT: dict[str, Any] = dict(
    model_type="opt", vocab_size=211, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, ffn_dim=96,
    word_embed_proj_dim=64, max_position_embeddings=128, dropout=0.0, attention_dropout=0.0, layerdrop=0.0,
    pad_token_id=1, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
PHI = dict(UNGROUPED, model_type="phi", resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0)
GEMMA2 = dict(
    SMALL, model_type="gemma2", head_dim=16, sliding_window=9, query_pre_attn_scalar=16, attn_logit_softcapping=5.0
)

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gpt2-gelu": dict(
        GPT2, activation_function="gelu", tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True
    ),
    "gpt_neo": GPT_NEO,
    "gpt_neox": dict(UNGROUPED, model_type="gpt_neox", rotary_pct=0.25, hidden_dropout=0.0, attention_dropout=0.0),
    "opt": OPT,
    "opt-gelu": dict(OPT, activation_function="gelu", do_layer_norm_before=False),
    "llama": dict(SMALL, model_type="llama"),
    "mistral": dict(SMALL, model_type="mistral", sliding_window=9),
    "qwen2": dict(SMALL, model_type="qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1),
    "qwen3": dict(SMALL, model_type="qwen3", head_dim=32),
    "phi": dict(PHI, partial_rotary_factor=0.5),
    "phi-normed": dict(PHI, qk_layernorm=True),
    "gemma2": GEMMA2,
}  # fmt: skip


class Fp64RMSNorm(nn.Module):
    """transformers' own computes in fp32 whatever the dtype."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Tensor
        self.weight, self.eps = norm.weight, getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        self.plus_one = float("Gemma" in type(norm).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return (self.plus_one + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + float(self.eps or 0))


def family(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with seeded random parameters, large enough that every part matters, in eval mode."""
    import transformers

    values = dict(FAMILIES[name], **changes)
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            ones = "norm" in key or ".ln_" in key
            p.copy_(noise * 0.15 + (1.0 if ones and key.endswith("weight") and "gemma" not in name else 0.0))
    for p in model.parameters():
        p.data = p.data.to(dtype)  # the parameters only: model.to(dtype) would round rope's frequencies too
    return model.eval()


def exact(model: Any) -> Any:
    """The same weights, everything in fp64 and attention in plain PyTorch."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("exact", exact_attention)
    AttentionMaskInterface.register("exact", lambda **given: sdpa_mask(**dict(given, **NO_SKIP)))
    wide = copy.deepcopy(model).double()
    wide.config._attn_implementation_internal = "exact"
    for parent in list(wide.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, Fp64RMSNorm(child))
            if type(child).__name__ == "GPTNeoSelfAttention":
                child._attn = Fp64GPTNeo(child)
    return wide


NO_SKIP: dict[str, Any] = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def exact_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float = 1.0,
    softcap: Any = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention by its formula in the dtype of q (B, H, Sq, D); mask bool, never None. Rows without a key give 0."""
    groups = q.shape[1] // k.shape[1]
    s = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    p = s.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return (p @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


class Fp64GPTNeo:
    """In the place of GPTNeoSelfAttention._attn, which computes in fp32."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, None]:
        seen = self.module.bias[:, :, k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]].bool()
        out, _ = exact_attention(self.module, q, k, v, mask & seen)
        return out.transpose(1, 2), None


def text(rows: int = 2, length: int = 41, vocabulary: int = 211) -> Tensor:
    """Token ids (rows, length), longer than every window above."""
    return torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def padding(ids: Tensor, side: str, lengths: tuple[int, ...]) -> Tensor:
    """The attention mask (rows, length) of rows that are so long, padded on this side."""
    at = torch.arange(ids.shape[1])
    return torch.stack([(at < n) if side == "right" else (at >= ids.shape[1] - n) for n in lengths]).long()
