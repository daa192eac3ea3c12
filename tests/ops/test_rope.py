"""What is special about rope: the tables against transformers, bit patterns, views, and the errors at the door."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gptfast.ops import rope, rope_frequencies, rope_tables

HEAD, ORIGINAL, LONGEST = 64, 64, 256
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-mscale": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn-given": {
        "factor": 8.0, "original_max_position_embeddings": ORIGINAL, "attention_factor": 1.25, "beta_fast": 16.0,
        "beta_slow": 2.0, "truncate": False,
    },
    "longrope": {
        "short_factor": [1 + i / 50 for i in range(HEAD // 2)], "long_factor": [2 + i / 9 for i in range(HEAD // 2)],
        "original_max_position_embeddings": ORIGINAL, "factor": 4.0,
    },
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    },
}  # fmt: skip


def config(name: str) -> LlamaConfig:
    parameters = {"rope_type": name.partition("-")[0], "rope_theta": 50000.0, **SCALINGS[name]}
    return LlamaConfig(
        hidden_size=3 * HEAD,
        num_attention_heads=3,
        head_dim=HEAD,
        max_position_embeddings=LONGEST,
        rope_parameters=parameters,
    )


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [20, 64, 65, 300])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    c = config(name)
    if name == "default":
        wanted, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(c)
    else:
        wanted, factor = ROPE_INIT_FUNCTIONS[name.partition("-")[0]](c, device=None, seq_len=length)
    mine, mine_factor = rope_frequencies(HEAD, 50000.0, c.rope_parameters, LONGEST, length)
    assert mine.dtype == torch.float32
    assert torch.equal(mine, wanted)
    assert mine_factor == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [64, 256])
def test_tables_are_those_of_transformers(name: str, length: int) -> None:
    """Each cosine is the same function of the same fp32 angle; vector and scalar code of it may part by one ulp."""
    positions = torch.arange(length)
    wanted_cos, wanted_sin = LlamaRotaryEmbedding(config(name))(torch.zeros(1), positions[None])
    cos, sin = rope_tables(length, HEAD, 50000.0, config(name).rope_parameters, LONGEST)
    limit = 2 * torch.finfo(torch.float32).eps
    assert (cos - wanted_cos[0, :, : HEAD // 2]).abs().max() <= limit
    assert (sin - wanted_sin[0, :, HEAD // 2 :]).abs().max() <= limit


def test_tables_of_chosen_positions_are_rows_of_the_whole() -> None:
    positions = torch.tensor([[3, 70, 0], [5, 5, 99]])
    cos, sin = rope_tables(positions, 16, scaling=config("llama3").rope_parameters)
    whole_cos, whole_sin = rope_tables(100, 16, scaling=config("llama3").rope_parameters)
    assert torch.equal(cos, whole_cos[positions])
    assert torch.equal(sin, whole_sin[positions])


@pytest.mark.parametrize(
    ("scaling", "sentence"),
    [
        ({"rope_type": "spiral"}, r"expected rope_type to be one of default, .*, got 'spiral'"),
        ({"type": "linear"}, r"linear scaling expected 'factor', got keys type"),
        ({"rope_type": "llama3", "factor": 2.0}, r"llama3 scaling expected 'original_max_position_embeddings'"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0,
             "original_max_position_embeddings": 4},
            r"longrope expected 8 factors, got 1",
        ),
    ],
)  # fmt: skip
def test_a_wrong_scaling_is_one_sentence(scaling: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        rope_tables(4, 16, scaling=scaling)


SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit type, in the order of its bits."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def scaled(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """x * factor, rounded by the kernel to x's dtype: rope of pairs (x, 0) where cos = factor and sin = 0."""
    q = torch.stack((x, torch.zeros_like(x)), -1)[None, :, None, :]
    cos = factor[:, None]
    return rope(q, q, cos, torch.zeros_like(cos), backend="cpu")[0][0, :, 0, 0]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; any NaN equals any NaN."""
    return bool(((a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_widening_and_rounding_give_every_value_back(dtype: torch.dtype, isa: str) -> None:
    x = every_value(dtype)
    assert same_bits(scaled(x, torch.ones(65536)), x)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("away", [-1, 0, 1])
def test_rounding_is_to_the_nearest_ties_to_even(dtype: torch.dtype, away: int, isa: str) -> None:
    """At every midpoint of two neighbours of the type (subnormal, normal, overflowing) and one fp32 ulp beside it."""
    x = every_value(dtype).float()
    x = x[x.isfinite() & (x >= 0)]  # ascending
    above = torch.cat((x[1:], x[-1:] + (x[-1:] - x[-2:-1])))  # of the largest: what the next would be
    middle = ((x.double() + above.double()) / 2).float()
    floats = (middle.view(torch.int32) + away).view(torch.float32)
    floats = torch.cat((floats, -floats))
    assert same_bits(scaled(torch.ones_like(floats, dtype=dtype), floats), floats.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
@pytest.mark.parametrize("interleaved", [False, True])
def test_views_give_the_bits_of_contiguous_tensors(dtype: torch.dtype, interleaved: bool, isa: str) -> None:
    torch.manual_seed(0)
    fused = torch.randn(3, 5, 4 + 2 + 2, 70, dtype=dtype)
    q, k = fused[:, :, :4, 3:], fused[:, ::1, 4:6, 3:]
    cos, sin = rope_tables(torch.randint(0, 99, (3, 5)), 38)
    views = rope(q, k, cos, sin, interleaved=interleaved, backend="cpu")
    copies = rope(q.contiguous(), k.contiguous(), cos, sin, interleaved=interleaved, backend="cpu")
    heads_first = rope(
        q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin, interleaved=interleaved, backend="cpu"
    )
    for a, b, c in zip(views, copies, heads_first):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert a.is_contiguous()


@pytest.mark.parametrize("interleaved", [False, True])
def test_nan_and_infinity_stay_in_their_pair(interleaved: bool, isa: str) -> None:
    q = torch.randn(1, 1, 1, 64)
    q[..., 3], q[..., 40] = float("nan"), float("inf")
    cos, sin = rope_tables(torch.tensor([7]), 64)
    got = rope(q, q, cos, sin, interleaved=interleaved, backend="cpu")[0]
    wanted = rope(q, q, cos, sin, interleaved=interleaved, backend="reference")[0]
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.isinf(), wanted.isinf())
    assert int(got.isfinite().sum()) == 60


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": torch.zeros(2, 3, 8)}, r"expected q \(B, S, H, D\) of floats, got \(2, 3, 8\) float32"),
        ({"k": torch.zeros(2, 3, 1, 6)}, r"expected k \(2, 3, Hk, 8\) of q's dtype, got \(2, 3, 1, 6\) float32"),
        ({"k": torch.zeros(2, 3, 1, 8, dtype=torch.float16)}, r"of q's dtype, got \(2, 3, 1, 8\) float16"),
        ({"cos": torch.zeros(4, 4)}, r"expected cos \(3, R/2\) or \(2, 3, R/2\) .* R <= 8, got \(4, 4\) float32"),
        ({"cos": torch.zeros(3, 5)}, r"with R <= 8, got \(3, 5\) float32"),
        ({"sin": torch.zeros(3, 2)}, r"expected sin like cos \(3, 4\) float32, got \(3, 2\) float32"),
    ],
)
def test_a_wrong_argument_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 2, 8),
        "k": torch.zeros(2, 3, 1, 8),
        "cos": torch.zeros(3, 4),
        "sin": torch.zeros(3, 4),
    }
    with pytest.raises(ValueError, match=sentence):
        rope(**{**arguments, **change})


@pytest.mark.parametrize("positions", [1, 64, 65, 511, 1024, 1025])
@pytest.mark.parametrize("dim", [2, 64, 66, 6000])
def test_short_tables_are_those_that_one_call_makes(positions: int, dim: int) -> None:
    frequencies, _ = rope_frequencies(dim, 10000.0, length=positions)
    angles = torch.arange(positions).unsqueeze(-1).float() * frequencies
    cos, sin = rope_tables(positions, dim)
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())
