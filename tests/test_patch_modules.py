"""gptfast.patch on models that are not transformers': nanoGPT's shape, plain modules, and what must be left alone."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import gptfast
from gptfast.ops.spec import tolerance
from gptfast.patch import PatchReport


class OwnLayerNorm(nn.Module):
    """With an optional bias, and its eps nowhere but in the code."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, flash: bool) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.dropout, self.flash = heads, dropout, flash

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in self.c_attn(x).split(C, 2))
        if self.flash:
            p = self.dropout if self.training else 0.0
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            s = (q @ k.transpose(2, 3) / math.sqrt(k.shape[-1])).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            y = s.softmax(-1) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class MLP(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, width: int, bias: bool, dropout: float, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = OwnLayerNorm(width, bias), CausalSelfAttention(width, 4, dropout, flash)
        self.ln_2, self.mlp = OwnLayerNorm(width, bias), MLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def nano(bias: bool = True, dropout: float = 0.0, flash: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Block(48, bias, dropout, flash) for _ in range(2)], OwnLayerNorm(48, bias))


def batch() -> Tensor:
    return torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(1))


def check(model: nn.Module, *inputs: Tensor, **options: Any) -> PatchReport:
    """Output and gradients of the patched model within tolerance of the fp64 one's, and all back afterwards."""
    fast, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    before = [list(vars(m)) for m in fast.modules()]
    report = gptfast.patch(fast, **options)
    results = []
    for m, kind in ((fast, torch.float32), (model, torch.float32), (exact, torch.float64)):
        given = [t.to(kind).requires_grad_() for t in inputs]
        y = m(*given)
        y = y[0] if isinstance(y, tuple) else y
        weights = torch.linspace(-1, 1, y.numel(), dtype=kind).view_as(y)
        grads = torch.autograd.grad((y * weights).sum(), [*given, *(p for p in m.parameters() if p.requires_grad)])
        results.append([y.detach(), grads[0], torch.cat([g.flatten() for g in (*grads[1:], y.detach())])])
    for got, plain, wanted in zip(*results):
        error, allowed = (got.double() - wanted).abs().max().item(), tolerance(plain, wanted)
        assert error <= allowed, f"max |error| {error:.3g} > {allowed:.3g}"
    gptfast.unpatch(fast)
    assert [list(vars(m)) for m in fast.modules()] == before
    with torch.no_grad():
        pair = [y[0] if isinstance(y, tuple) else y for y in (fast(*inputs), model(*inputs))]
    assert torch.equal(*pair)
    return report


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(bias: bool) -> None:
    report = check(nano(bias), batch())
    assert [(e.kind, e.text) for e in report.patched if e.module.startswith("0.") and e.kind != "linear"] == [
        ("attention", "its scaled_dot_product_attention runs on ops.attention"),
        ("norm", "ops.layer_norm"),
        ("norm", "ops.layer_norm"),
        ("mlp", "ops.bias_gelu, the exact one between c_fc and c_proj"),
    ]
    assert not report.skipped


def test_a_branch_without_sdpa_is_left() -> None:
    report = check(nano(flash=False), batch())
    assert {e.kind for e in report.patched} == {"norm", "mlp", "linear"}
    assert {e.text for e in report.skipped} == {"it ran without calling the scaled_dot_product_attention that it names"}


def test_dropout_falls_where_it_did() -> None:
    """Outside attention the masks are PyTorch's own, so that the same seed drops the same."""
    model = nano(dropout=0.5).train()
    fast, x = copy.deepcopy(model), batch()
    gptfast.patch(fast, attention=False)
    results = []
    for m in (fast, model):
        torch.manual_seed(3)
        results.append(m(x))
    torch.testing.assert_close(*results)
    gptfast.patch(fast)
    torch.manual_seed(3)
    first = fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), first) and not torch.equal(fast(x), first)


class Attend(nn.Module):
    """Cross-attention of whatever form."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **self.options)


SDPA: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": dict(is_causal=True),
    "scale": dict(scale=0.3),
    "grouped": dict(enable_gqa=True),
    "mask": dict(attn_mask=torch.rand(9, 13, generator=torch.Generator().manual_seed(0)) > 0.3),
    "bias": dict(attn_mask=torch.randn(2, 1, 9, 13, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("lengths", [(9, 13), (13, 9), (9, 9)], ids=str)
@pytest.mark.parametrize("name", SDPA)
def test_sdpa_of_any_form(name: str, lengths: tuple[int, int]) -> None:
    options = SDPA[name]
    if "attn_mask" in options and lengths != (9, 13):
        pytest.skip("a mask has one shape")
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, lengths[0], 16, generator=g)
    k, v = (torch.randn(2, 2 if name == "grouped" else 4, lengths[1], 16, generator=g) for _ in range(2))
    kind = torch.float64
    exact = [t.to(kind) for t in (q, k, v)]
    model = Attend(**options)
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in options.items()}
    plain, wanted = model(q, k, v), Attend(**wide)(*exact)
    gptfast.patch(model)
    error = (model(q, k, v).double() - wanted).abs().max().item()
    assert error <= tolerance(plain, wanted)


class GatedFeedForward(nn.Module):
    def __init__(self, act: Any, swapped: bool) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24, bias=False)
        self.act, self.swapped = act, swapped

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.w2(x), self.w1(x)) if self.swapped else (self.w1(x), self.w2(x))
        return self.w3(self.act(a) * b)


class Scaled(nn.Module):
    """Looks like a norm and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class OddNorm(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().mean(-1, keepdim=True) * self.weight


class OwnRMSNorm(Scaled):
    epsilon = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12) * self.weight


X = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(5))
PARTS: dict[str, tuple[nn.Module, list[str], list[str]]] = {
    "LayerNorm": (nn.LayerNorm(24, eps=1e-3), ["ops.layer_norm"], []),
    "LayerNorm without bias": (nn.LayerNorm(24, bias=False), ["ops.layer_norm"], []),
    "LayerNorm without weight": (nn.LayerNorm(24, elementwise_affine=False), [], ["it has no weight, and"]),
    "LayerNorm over two": (nn.LayerNorm([5, 24]), [], ["it normalises over 2 dimensions"]),
    "RMSNorm": (nn.RMSNorm(24), ["ops.rms_norm"], []),
    "RMSNorm with eps": (nn.RMSNorm(24, eps=1e-3), ["ops.rms_norm"], []),
    "an own RMSNorm": (OwnRMSNorm(), ["ops.rms_norm"], []),
    "no norm": (Scaled(), [], []),
    "an odd norm": (OddNorm(), [], ["no op computes what its forward computes"]),
    "GroupNorm": (nn.GroupNorm(5, 5), [], ["no op computes"]),
    "GELU": (nn.GELU("tanh"), ["ops.bias_gelu without a bias"], []),
    "SiLU": (nn.SiLU(), [], ["SiLU is neither form of GELU"]),
    "an MLP": (
        nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 24)),
        ["ops.bias_gelu, the exact one between 0 and 2"],
        [],
    ),
    "an MLP without biases": (
        nn.Sequential(nn.Linear(24, 33, bias=False), nn.GELU("tanh"), nn.Linear(33, 24)),
        ["ops.bias_gelu between 0 and 2"],
        [],
    ),
    "an MLP with dropout inside": (
        nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Dropout(0.0), nn.Linear(33, 24)),
        ["ops.bias_gelu, the exact one without a bias"],
        ["no op computes"],
    ),
    "a ReLU MLP": (nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 24)), [], ["no op computes", "ReLU is"]),
    "SwiGLU": (GatedFeedForward(F.silu, False), ["ops.swiglu of w1 and w2"], []),
    "SwiGLU the other way": (GatedFeedForward(nn.SiLU(), True), ["ops.swiglu of w2 and w1"], []),
    "GEGLU": (GatedFeedForward(F.gelu, True), ["ops.geglu, the exact one of w2 and w1"], []),
    "MultiheadAttention": (nn.MultiheadAttention(24, 2), [], ["nn.MultiheadAttention computes all"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts(name: str) -> None:
    model, patched, skipped = PARTS[name]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1) * 0.5)
    report = check(model, *([X, X, X] if isinstance(model, nn.MultiheadAttention) else [X]))
    assert [e.text for e in report.patched if e.kind != "linear"] == patched
    assert len(report.skipped) == len(skipped)
    assert all(e.text.startswith(text) for e, text in zip(report.skipped, skipped))


def test_adapters_on_a_projection_go_on_working() -> None:
    """A hook or another forward on a fused projection is called, whenever it came."""

    def twice(module: nn.Module, given: Any, y: Tensor) -> Tensor:
        return y * 2

    model = nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 24))
    gptfast.patch(model)
    plain = model(X)
    handle = model[0].register_forward_hook(twice)
    assert not torch.allclose(model(X), plain)
    handle.remove()
    assert torch.equal(model(X), plain)
    model[0] = nn.Sequential(model[0], nn.Identity())
    torch.testing.assert_close(model(X), plain)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("patched_first", [False, True])
@pytest.mark.parametrize("how", ["parametrized", "pruned"])
def test_parametrized_and_pruned_projections(how: str, patched_first: bool, grad: bool) -> None:
    """A parametrization changes a layer's class, and both take weight and bias from among its parameters. The layer is
    square: a product with the weight's transpose would go unnoticed."""
    model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
    x = X.detach().clone().requires_grad_(grad)
    if patched_first:
        gptfast.patch(model)
    for name in ("weight", "bias"):
        if how == "parametrized":
            parametrize.register_parametrization(model[0], name, nn.Softsign())
        else:
            prune.l1_unstructured(model[0], name, 0.5)
    if not patched_first:
        gptfast.patch(model)
    with torch.set_grad_enabled(grad):
        first, last = cast(Any, model[0]), cast(Any, model[2])
        wanted = F.linear(F.gelu(F.linear(x, first.weight, first.bias)), last.weight, last.bias)
        torch.testing.assert_close(model(x), wanted)


def test_someone_elses_forward_is_left() -> None:
    norm = nn.LayerNorm(24)
    norm.forward = lambda input: input
    report = gptfast.patch(norm)
    assert not report.patched and "replaced already" in report.skipped[0].text
    assert torch.equal(norm(X), X)


def test_our_own_model_is_left() -> None:
    from gptfast.model import GPT, GPTConfig

    model = GPT(GPTConfig("gpt2", vocab_size=64, n_layer=1, n_head=2, n_embd=16, context=8))
    report = gptfast.patch(model)
    assert not report.patched and not report.skipped


def test_shared_modules_are_patched_once() -> None:
    norm = nn.LayerNorm(24)
    report = gptfast.patch(nn.Sequential(norm, norm))
    assert len(report.patched) == 1


def test_on_the_meta_device() -> None:
    model = nano().to("meta")
    report = gptfast.patch(model)
    assert {e.kind for e in report.patched} == {"attention", "norm", "mlp", "linear"} and not report.skipped
    assert model(batch().to("meta")).shape == batch().shape


def test_pickled_and_copied() -> None:
    model, x = nano(), batch()
    gptfast.patch(model)
    wanted = model(x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(x), wanted)
        gptfast.unpatch(twin)
        assert not torch.equal(twin(x), wanted) and torch.equal(model(x), wanted)


def test_the_name_of_the_module_is_callable_too() -> None:
    import gptfast.patch as package

    assert gptfast.patch(nn.Sequential(nn.LayerNorm(8))).patched
    assert package(nn.Sequential(nn.LayerNorm(8))).patched  # pyright: ignore[reportCallIssue]
