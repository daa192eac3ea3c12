"""The calls whose kernels are compiled ahead of time: each op's at the sizes of known models, so that every tile that
ships is among them. Few rows: the number of rows decides no tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gptfast import ops
from gptfast.ops.spec import Inputs, Op, leaves, outputs
from gptfast.quantize import QuantizedWeight

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Make = Callable[[Inputs], dict[str, Any]]


def _norm(C: int, bias: bool, i: Inputs, **more: Any) -> dict[str, Any]:
    arguments = {"x": i.randn(64, C), "weight": i.randn(C), **more}
    return arguments | ({"bias": i.randn(C)} if bias else {})


def _residual(C: int, bias: bool, i: Inputs) -> dict[str, Any]:
    return _norm(C, bias, i, residual=i.randn(64, C))


def _dropout(C: int, bias: bool, i: Inputs) -> dict[str, Any]:
    return _norm(C, bias, i, residual=i.randn(64, C), dropout_p=0.1, seed=7)


def _gelu(C: int, approximate: str, i: Inputs) -> dict[str, Any]:
    return {"x": i.randn(64, C), "bias": i.randn(C), "approximate": approximate}


def _gated(C: int, i: Inputs) -> dict[str, Any]:
    return {"gate": i.randn(64, C), "up": i.randn(64, C)}


def _rope(H: int, Hk: int, D: int, interleaved: bool, i: Inputs) -> dict[str, Any]:
    angles = i.rand(16, D // 2, dtype=torch.float32)
    q, k = i.randn(2, 16, H, D), i.randn(2, 16, Hk, D)
    return {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}


def _embedding(C: int, i: Inputs) -> dict[str, Any]:
    positions = {"positions": torch.arange(64), "position_weight": i.randn(64, C)}
    return {"ids": i.randint(0, 64, (64,)), "weight": i.randn(64, C), **positions}


def _adamw(masters: bool, i: Inputs) -> dict[str, Any]:
    params = [i.randn(1024, 64), i.randn(1024)]
    moments = [[p.float() for p in params] for _ in range(2)]
    more = {"masters": [p.float() for p in params]} if masters else {}
    steps = [torch.tensor(1.0) for _ in params]
    grads = [p.clone() for p in params]
    return dict(params=params, grads=grads, exp_avgs=moments[0], exp_avg_sqs=moments[1], steps=steps, **more)


def _norms(i: Inputs) -> dict[str, Any]:
    return {"grads": [i.randn(1024, 64), i.randn(1024)]}


def _attention(Sq: int, Sk: int, H: int, Hk: int, D: int, i: Inputs, **more: Any) -> dict[str, Any]:
    return {
        "q": i.randn(2, Sq, H, D),
        "k": i.randn(2, Sk, Hk, D),
        "v": i.randn(2, Sk, Hk, D),
        **{"causal": True, **more},
    }


def _terms(D: int, terms: tuple[str, ...], fixed: dict[str, Any], i: Inputs) -> dict[str, Any]:
    """Attention with something in its scores that isn't q . k."""
    makers: dict[str, Callable[[], torch.Tensor]] = {
        "bias": lambda: i.randn(1, 8, 256, 256),
        "mask": lambda: i.rand(2, 1, 256, 256) > 0.4,
        "alibi_slopes": lambda: i.rand(8, dtype=torch.float32),
        "sinks": lambda: i.randn(8, dtype=torch.float32),
    }
    return _attention(256, 256, 8, 2, D, i, **{name: makers[name]() for name in terms}, **fixed)


def _varlen(D: int, i: Inputs) -> dict[str, Any]:
    edges = torch.tensor([0, 3, 131, 256], dtype=torch.int32)
    tensors = {"q": i.randn(256, 8, D), "k": i.randn(256, 2, D), "v": i.randn(256, 2, D)}
    return {**tensors, "cu_seqlens_q": edges, "cu_seqlens_k": edges, "causal": True}


def _decode(Sq: int, D: int, terms: tuple[str, ...], i: Inputs) -> dict[str, Any]:
    """New tokens of three sequences beside a cache of 1,024 slots, four chunks; "int8" is under fp32 queries."""
    H, Hk, room, page = 8, 2, 1024, 16
    wide = torch.float32 if "int8" in terms else None
    caches = (3 * room // page, page, Hk, D) if "pages" in terms else (3, room, Hk, D)
    arguments: dict[str, Any] = {"q": i.randn(3, Sq, H, D, dtype=wide)}
    arguments |= {name: i.randn(3, Sq, Hk, D, dtype=wide) for name in ("k", "v")}
    arguments["lengths"] = torch.tensor([5, 130, 900], dtype=torch.int32)
    for name in ("k", "v"):
        if "int8" in terms:
            arguments[f"{name}_cache"] = i.randint(-127, 128, caches, torch.int8)
            arguments[f"{name}_scale"] = i.rand(*caches[:3], dtype=torch.float32)
        else:
            arguments[f"{name}_cache"] = i.randn(*caches)
    if "pages" in terms:
        arguments["block_table"] = torch.arange(3 * room // page, dtype=torch.int32).view(3, -1)
    angles = i.rand(room, D // 2, dtype=torch.float32)
    return arguments | {"cos": angles.cos(), "sin": angles.sin()}


def _sample(V: int, more: dict[str, Any], i: Inputs) -> dict[str, Any]:
    return {"logits": i.randn(4, V, dtype=torch.float32), "seed": 1, "temperature": 0.8, **more}


def _cross_entropy(V: int, i: Inputs) -> dict[str, Any]:
    return {"logits": i.randn(16, V), "target": i.randint(0, V, (16,))}


def _linear_cross_entropy(V: int, C: int, i: Inputs) -> dict[str, Any]:
    return {"x": i.randn(64, C), "weight": i.randn(V, C), "target": i.randint(0, V, (64,))}


def _linear(M: int, kind: str, activations: str, i: Inputs) -> dict[str, Any]:
    """A kind of "" is a float weight of x's dtype."""
    weight = i.randn(256, 2048, dtype=torch.float32 if kind else None)
    quantised = QuantizedWeight.quantize(weight, kind) if kind else weight
    return {"x": i.randn(M, 2048), "weight": quantised, "bias": i.randn(256), "activations": activations}


def _case(name: str, case: str, i: Inputs) -> dict[str, Any]:
    """One of a page's own cases."""
    return next(c for c in ops.pages()[name].cases() if c.name == case).make(i)


TERMS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # of attention
    "bias": (("bias",), {}),
    "alibi": (("alibi_slopes",), {}),
    "dropout": ((), {"dropout_p": 0.1, "seed": 7}),
    "window softcap": ((), {"window": (64, 0), "softcap": 30.0}),
    "sinks": (("sinks",), {}),
    "everything": (("bias", "mask", "alibi_slopes", "sinks"), {"window": (64, 0), "softcap": 30.0}),
}
DECODES: dict[str, tuple[int, tuple[str, ...]]] = {  # queries, terms
    "contiguous": (1, ()),
    "pages": (1, ("pages",)),
    "pages prefill": (64, ("pages",)),
    "int8": (1, ("int8",)),
}
NO_GRADIENT = ("bias", "sinks")  # of attention: no Triton kernel makes these
PREFERENCES = ("reward", "dpo", "simpo", "orpo", "kto")
CALLS: dict[str, tuple[str, Make]] = {  # op, arguments
    **{f"layer_norm {C}": ("layer_norm", partial(_residual, C, True)) for C in (64, 768, 4096, 8192, 16384, 65536)},
    **{f"rms_norm {C}": ("rms_norm", partial(_norm, C, False)) for C in (128, 576, 4096, 8192, 12288, 65536)},
    "rms_norm 4096 dropout": ("rms_norm", partial(_dropout, 4096, False)),
    **{f"bias_gelu 11008 {a}": ("bias_gelu", partial(_gelu, 11008, a)) for a in ("none", "tanh")},
    **{f"{op} {C}": (op, partial(_gated, C)) for op in ("swiglu", "geglu") for C in (1536, 11008)},
    "rope 32/8 128": ("rope", partial(_rope, 32, 8, 128, False)),
    "rope 9/3 64": ("rope", partial(_rope, 9, 3, 64, False)),
    "rope 32/8 128 interleaved": ("rope", partial(_rope, 32, 8, 128, True)),
    "embedding 4096": ("embedding", partial(_embedding, 4096)),
    "adamw": ("adamw", partial(_adamw, False)),
    "adamw masters": ("adamw", partial(_adamw, True)),
    "gradient_norm": ("gradient_norm", _norms),
    **{f"attention {D}": ("attention", partial(_attention, 256, 256, 8, 2, D)) for D in (64, 80, 96, 128, 256)},
    **{
        f"attention {D} {name}": ("attention", partial(_terms, D, terms, fixed))
        for D in (64, 128)
        for name, (terms, fixed) in TERMS.items()
    },
    "attention 256 window softcap": ("attention", partial(_terms, 256, *TERMS["window softcap"])),  # as Gemma 2's
    **{f"attention {D} varlen": ("attention", partial(_varlen, D)) for D in (64, 128)},
    **{
        f"decode {D} {name}": ("attention_kvcache", partial(_decode, Sq, D, terms))
        for D in (64, 128)
        for name, (Sq, terms) in DECODES.items()
    },
    "sample plain": ("sample", partial(_sample, 128256, {})),
    "sample greedy": ("sample", partial(_sample, 128256, {"temperature": 0.0})),
    "sample top_k top_p": ("sample", partial(_sample, 128256, {"top_k": 50, "top_p": 0.95})),
    "cross_entropy 128256": ("cross_entropy", partial(_cross_entropy, 128256)),
    **{f"linear {M}": ("linear", partial(_linear, M, "", "exact")) for M in (1, 64)},
    **{
        f"linear {M} {kind} {how}": ("linear", partial(_linear, M, kind, how))
        for M in (1, 64)
        for kind in ("q8_0", "q4_0", "q4_1")
        for how in ("exact", "int8")
    },
    "linear_cross_entropy": ("linear_cross_entropy", partial(_linear_cross_entropy, 4096, 512)),
    "token_logprobs": ("token_logprobs", partial(_case, "token_logprobs", "512-4096x512-return_entropyTrue")),
    "token_kl": ("token_kl", partial(_case, "token_kl", "256-4096x512x256")),
    "policy_loss": ("policy_loss", partial(_case, "policy_loss", "64x512-mask-reference-beta=0.04")),
    "value_loss": ("value_loss", partial(_case, "value_loss", "64x512-mask")),
    "gae": ("gae", partial(_case, "gae", "64x512-mask")),
    "group_advantages": ("group_advantages", partial(_case, "group_advantages", "8x8-grpo")),
    "whiten": ("whiten", partial(_case, "whiten", "64x512-mask")),
    "kl_estimate": ("kl_estimate", partial(_case, "kl_estimate", "k3")),
    **{f"{loss}_loss": (f"{loss}_loss", partial(_case, f"{loss}_loss", "64")) for loss in PREFERENCES},
    "dpo_loss robust": ("dpo_loss", partial(_case, "dpo_loss", "33-reduction=none-kind=robust-label_smoothing=0.1")),
    "speculative_sampling": ("speculative_sampling", partial(_case, "speculative_sampling", "3x50257")),
}


# Of attention's terms fp32 has all at once, which need the most registers, and bf16, of larger tiles, each alone.
ALONE = {f"attention {D} {name}" for D in (64, 128, 256) for name in (*TERMS, "varlen") if name != "dropout"}
TOGETHER = {f"attention {D} everything" for D in (64, 128)}
FP32 = TOGETHER | {f"decode {D} int8" for D in (64, 128)}


def names(dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[str]:
    """Every call by name and dtype: "layer_norm 768 bf16"."""
    without = {"fp32": ALONE - TOGETHER, "bf16": FP32}
    return [f"{name} {dtype}" for name in CALLS for dtype in dtypes if name not in without.get(dtype, ())]


def record(name: str, arch: str) -> Iterator[Any]:
    """The launches (gptfast.kernels.triton.Launch) of a call, forward and backward, with the tiles for `arch`."""
    call, _, dtype = name.rpartition(" ")
    page, make = CALLS[call]
    op = ops.pages()[page]
    yield from record_call(op, make(Inputs(DTYPES[dtype], name)), arch)


def record_call(op: Op, arguments: dict[str, Any], arch: str) -> Iterator[Any]:
    """The same of any call; what it raises comes after the launches that it made."""
    import gptfast.kernels.triton as triton

    with triton.recording(arch) as launches:
        op.function(**arguments, backend="triton")
    yield from launches
    if not op.differentiable:
        return
    given = {name: arguments[name] for name in NO_GRADIENT if op.name == "attention" and name in arguments}
    asking = leaves(op, arguments) | given
    wanted = [x for name in op.differentiable if isinstance(x := asking.get(name), torch.Tensor) and x.requires_grad]
    try:
        with triton.recording(arch) as launches, torch.enable_grad():
            results = [r for r in outputs(op.function(**asking, backend="triton")) if r.requires_grad]
            torch.autograd.grad(results, wanted, [torch.ones_like(r) for r in results], allow_unused=True)
    finally:
        yield from launches
