"""compat.sdpa's hook, and the layers for Hugging Face's `kernels`."""

from __future__ import annotations

import inspect
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast.compat import kernels_layers, sdpa
from gptfast.ops.spec import tolerance

attention = torch.nn.attention


def inputs(grad: bool = False) -> list[Tensor]:
    return [torch.randn(2, 3, 9, 16, generator=torch.Generator().manual_seed(i)).requires_grad_(grad) for i in range(3)]


@pytest.mark.skipif(not hasattr(attention, "register_flash_attention_impl"), reason="this PyTorch has no such hook")
@pytest.mark.parametrize("form", ["plain", "causal", "mask", "bias"])
def test_the_hook(form: str) -> None:
    g = torch.Generator().manual_seed(9)
    mask, bias = torch.rand(9, 9, generator=g) > 0.2, torch.randn(1, 3, 9, 9, generator=g)
    terms = {"plain": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": mask}, "bias": {"attn_mask": bias}}[form]
    sdpa.register()
    assert "gptfast" in attention.list_flash_attention_impls() and attention.current_flash_attention_impl() is None

    def run(kind: torch.dtype) -> list[Tensor]:
        given = [t.detach().to(kind).requires_grad_() for t in inputs()]
        q, k, v = given
        t: dict[str, Any] = dict(terms)
        if t.get("attn_mask") is bias:
            t["attn_mask"] = bias.to(kind)
        out = F.scaled_dot_product_attention(q, k, v, **t)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    plain, wanted = run(torch.float32), run(torch.float64)
    attention.activate_flash_attention_impl("gptfast")
    try:
        assert attention.current_flash_attention_impl() == "gptfast"
        got = run(torch.float32)
    finally:
        attention.restore_flash_attention_impl()
    for mine, its, exact in zip(got, plain, wanted):
        assert (mine.double() - exact).abs().max() <= tolerance(its, exact)
        assert mine.stride() == its.stride()
    assert not all(torch.equal(a, b) for a, b in zip(got, plain)), "the hook was not in use"
    assert all(torch.equal(a, b) for a, b in zip(run(torch.float32), plain)), "PyTorch's own kernels are not back"


def test_a_routed_block() -> None:
    q, k, v = inputs()
    plain = F.scaled_dot_product_attention(q, k, v)
    with sdpa.routed("reference") as route:
        got = F.scaled_dot_product_attention(q, k, v)
        both = torch.nn.functional.scaled_dot_product_attention(query=q, key=k, value=v)
    assert route.calls == 2 and torch.equal(got, both)
    torch.testing.assert_close(got, plain)
    with pytest.raises(KeyError), sdpa.routed():
        raise KeyError
    assert torch.equal(F.scaled_dot_product_attention(q, k, v), plain)


def test_what_the_op_cannot_serve_goes_to_pytorch() -> None:
    q, k, v = inputs()
    narrow = v[..., :8]
    assert torch.equal(sdpa.scaled_dot_product_attention(q, k, narrow), F.scaled_dot_product_attention(q, k, narrow))
    for shape in ((9, 16), (3, 9, 16), (2, 1, 3, 9, 16)):
        t = torch.randn(shape)
        torch.testing.assert_close(sdpa.scaled_dot_product_attention(t, t, t), F.scaled_dot_product_attention(t, t, t))


def test_dropout_follows_the_seed() -> None:
    q, k, v = inputs()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(sdpa.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", kernels_layers.LAYERS)
def test_layers_are_stateless(name: str) -> None:
    """What `kernels` checks of a layer that it loads."""
    layer = kernels_layers.LAYERS[name]
    assert layer.__init__ is nn.Module.__init__
    extra = {m for m in vars(layer) if not m.startswith("__")} - {"forward", "has_backward", "can_torch_compile"}
    assert not extra and layer.has_backward and layer.can_torch_compile
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(layer.forward).parameters.values())


def test_layers_compute_what_transformers_do() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.activations import ACT2FN
    from transformers.models.llama import modeling_llama as llama

    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    norm, mlp = llama.LlamaRMSNorm(32, 1e-3), llama.LlamaMLP(config)
    pairs = [(norm, "RMSNorm"), (mlp, "SwiGLUMLP"), (nn.LayerNorm(32), "LayerNorm"), (nn.GELU(), "GeLU")]
    pairs += [
        (ACT2FN["gelu_new"], "NewGELU"),
        (ACT2FN["gelu_pytorch_tanh"], "GeluTanh"),
        (ACT2FN["gelu_fast"], "FastGELU"),
    ]
    with torch.no_grad():
        for module, name in pairs:
            fast = types.MethodType(kernels_layers.LAYERS[name].forward, module)
            torch.testing.assert_close(fast(x), module(x))
        torch.testing.assert_close(kernels_layers.SiluAndMul()(x), F.silu(x[..., :16]) * x[..., 16:])
        torch.testing.assert_close(kernels_layers.GeluAndMul()(x), F.gelu(x[..., :16]) * x[..., 16:])
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    angles = torch.randn(1, 5, 4).repeat(1, 1, 2)
    given = (q, k, angles.cos(), angles.sin())
    torch.testing.assert_close(kernels_layers.rotary_pos_emb(*given), llama.apply_rotary_pos_emb(*given))
    turned = (q.transpose(1, 2), k.transpose(1, 2), *given[2:], 2)
    torch.testing.assert_close(kernels_layers.rotary_pos_emb(*turned), llama.apply_rotary_pos_emb(*turned))
