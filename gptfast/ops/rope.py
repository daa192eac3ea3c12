"""Rotary position embedding of queries and keys, and the tables of angles that it takes.

    o1 = x1 * cos - x2 * sin
    o2 = x2 * cos + x1 * sin

for each pair (x1, x2) of a head's first R elements: (i, i + R/2) for i < R/2, or (2i, 2i + 1) if interleaved. Elements
from R on are copied. Su et al.: RoFormer (arXiv:2104.09864), equation 34; half-split pairs are GPT-NeoX's and Llama's.

q         (B, S, H, D)   float32, bfloat16 or float16 (float64 on the reference); any strides
k         (B, S, Hk, D)  q's dtype
cos, sin  (S, R/2) or (B, S, R/2)  float32, R <= D

Returns new tensors (q, k). Kernels compute o1 = fma(x1, cos, -(x2 * sin)) and o2 = fma(x2, cos, x1 * sin) in fp32 (the
products with sin are rounded; baseline x86, which has no fma, rounds the others too), then round once to the storage
dtype. The rotation that attention_kvcache fuses is the same sequence, so both give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.dispatch import require, shape
from gptfast.ops.spec import Case, Cost, Inputs, Op, nbytes

SCALINGS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def _pairs(x: Tensor, R: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and second elements of the pairs, (..., R/2) each."""
    if interleaved:
        return x[..., 0:R:2], x[..., 1:R:2]
    return x[..., : R // 2], x[..., R // 2 : R]


def _join(o1: Tensor, o2: Tensor, rest: Tensor, interleaved: bool) -> Tensor:
    turned = torch.stack((o1, o2), -1).flatten(-2) if interleaved else torch.cat((o1, o2), -1)
    return torch.cat((turned, rest), -1)


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """The meaning of rope, in plain PyTorch."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    R = 2 * cos.shape[-1]
    c, s = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)

    def turn(x: Tensor) -> Tensor:
        x1, x2 = _pairs(x.to(wide), R, interleaved)
        return _join((x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype), x[..., R:], interleaved)

    return turn(q), turn(k)


def baseline(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """What one writes with PyTorch: x * cos + rotate_half(x) * sin in the storage dtype, as transformers does."""
    R = 2 * cos.shape[-1]
    c, s = (_join(t, t, t[..., :0], interleaved).to(q.dtype).unsqueeze(-2) for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        x1, x2 = _pairs(x, R, interleaved)
        turned = x[..., :R] * c + _join(-x2, x1, x[..., :0], interleaved) * s
        return torch.cat((turned, x[..., R:]), -1) if x.shape[-1] > R else turned

    return turn(q), turn(k)


def cost(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Cost:
    pairs = (q.shape[2] + k.shape[2]) * q.shape[0] * q.shape[1] * cos.shape[-1]
    return Cost(flops=6 * pairs, bytes=nbytes(q, q, k, k, cos, sin))


def cases() -> list[Case]:
    def case(
        B: int, S: int, H: int, Hk: int, D: int, *, R: int = 0, interleaved: bool = False, per_row: bool = False,
        strided: bool = False, tags: str = "",
    ) -> Case:  # fmt: skip
        def make(i: Inputs) -> dict[str, Any]:
            if strided:  # views of one fused projection, as a model makes them
                fused = i.randn(B, S, H + 2 * Hk, D)
                q, k = fused[:, :, :H], fused[:, :, H : H + Hk]
            else:
                q, k = i.randn(B, S, H, D), i.randn(B, S, Hk, D)
            angles = i.rand(*((B,) if per_row else ()), S, (R or D) // 2, dtype=torch.float32) * 100
            return {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin(), "interleaved": interleaved}

        kind = f"-R{R}" * (R > 0) + "-interleaved" * interleaved + "-perrow" * per_row + "-strided" * strided
        return Case(f"{B}x{S}-h{H}/{Hk}-d{D}{kind}", make, frozenset(tags.split()))

    return [
        case(2, 7, 3, 1, 64),
        case(1, 5, 2, 2, 6),
        case(3, 4, 4, 2, 80, R=20, per_row=True),
        case(2, 9, 2, 1, 33, R=10),
        case(2, 3, 2, 1, 70, interleaved=True),
        case(2, 5, 3, 3, 129, R=34, interleaved=True, per_row=True),
        case(2, 6, 4, 2, 128, strided=True),
        case(3, 5, 4, 2, 64, interleaved=True, strided=True),
        case(0, 4, 2, 1, 16),
        case(2, 0, 2, 1, 16),
        case(1, 2048, 9, 3, 64, strided=True, tags="bench"),
        case(1, 1, 9, 3, 64, tags="bench"),
        case(8, 1, 9, 3, 64, per_row=True, tags="bench"),
    ]


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """(q, k) rotated, as new contiguous tensors. Formula, shapes and dtypes: the top of this page.

    Raises ValueError for shapes and dtypes that don't fit; BackendError where `backend` can't serve the call.
    """
    arguments = {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": interleaved}
    backend, as_op = library.route("rope", backend, arguments, _check)
    if as_op:
        return _registered(**arguments, backend=backend)
    return dispatch.prepared("rope", backend, reference, q, arguments, _check)(**arguments)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """Raises where arguments don't fit together."""
    dispatch.require_numbers("rope", interleaved=interleaved)
    require(q.dim() == 4 and q.is_floating_point(), lambda: f"rope: expected q (B, S, H, D) of floats, got {shape(q)}")
    B, S, _, D = q.shape
    require(
        k.dim() == 4 and k.shape[:2] == (B, S) and k.shape[3] == D and k.dtype == q.dtype,
        lambda: f"rope: expected k ({B}, {S}, Hk, {D}) of q's dtype, got {shape(k)}",
    )
    half = cos.shape[-1] if cos.dim() else 0
    require(
        tuple(cos.shape) in ((S, half), (B, S, half)) and cos.is_floating_point() and 2 * half <= D,
        lambda: f"rope: expected cos ({S}, R/2) or ({B}, {S}, R/2) of floats with R <= {D}, got {shape(cos)}",
    )
    require(
        sin.shape == cos.shape and sin.dtype == cos.dtype,
        lambda: f"rope: expected sin like cos {shape(cos)}, got {shape(sin)}",
    )


def rope_tables(
    positions: Tensor | int,
    dim: int,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    max_position: int | None = None,
    *,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, fp32, times the scaling's attention factor: what rope and attention_kvcache take.

    positions     int64 (S,) or (B, S), or a number n for 0 .. n-1; the tables are positions.shape + (dim / 2,)
    dim           R, the even number of elements of a head that rotate
    theta         the base of the wavelengths
    scaling       a Hugging Face config's `rope_parameters` or `rope_scaling`; None = none. See rope_frequencies.
    max_position  the config's max_position_embeddings, which some scalings need
    length        of the whole sequence, which decides the frequencies of "dynamic" and "longrope"; None = the largest
                  position + 1

    Frequencies, angles (position * frequency), cosines and sines are each rounded to fp32, as in the models of
    transformers: angles from fp64 would be closer to the formula, but not to what the weights were trained with.
    """
    if isinstance(positions, int):
        length = positions if length is None else length
        positions = torch.arange(positions)
    require(
        positions.dtype in (torch.int64, torch.int32), f"rope_tables: expected whole positions, got {shape(positions)}"
    )
    if length is None:
        length = int(positions.max()) + 1 if positions.numel() else 0
    frequencies, attention_factor = rope_frequencies(dim, theta, scaling, max_position, length)
    angles = positions.unsqueeze(-1).float() * frequencies.to(positions.device)
    return _in_pieces(torch.cos, angles) * attention_factor, _in_pieces(torch.sin, angles) * attention_factor


def _in_pieces(function: Callable[..., Tensor], angles: Tensor) -> Tensor:
    """function(angles). A short table is computed piece by piece, each too short for PyTorch to share out among its
    threads: to start them and to wait for them takes 10 to 30 ms where another process has a core, in a model's first
    call."""
    if not angles.is_cpu or angles.dim() != 2 or not 2048 < angles.numel() <= 1 << 15:
        return function(angles)
    rows, out = max(1, 2048 // angles.shape[1]), torch.empty_like(angles)
    for piece, result in zip(angles.split(rows), out.split(rows)):
        function(piece, out=result)
    return out


def rope_frequencies(
    dim: int, theta: float, scaling: Mapping[str, Any] | None = None, max_position: int | None = None, length: int = 0
) -> tuple[Tensor, float]:
    """The angle per position of each pair, fp32 (dim / 2), and the factor for cos and sin.

    With f = theta^(-2i / dim), `scaling` being a dict with the keys that Hugging Face's configs have:
      default   f
      linear    f / factor (arXiv:2306.15595)
      dynamic   f of a theta that grows with the length beyond max_position (NTK-aware)
      yarn      a ramp from f to f / factor by wavelength; an attention factor (arXiv:2309.00071)
      longrope  f / short_factor[i], beyond the original length f / long_factor[i]; a factor (arXiv:2402.13753)
      llama3    f for short wavelengths, f / factor for long ones, a blend between (Llama 3.1)
    """
    require(dim > 0 and dim % 2 == 0, f"rope_tables: expected an even dim > 0, got {dim}")
    given = dict(scaling or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    require(kind in SCALINGS, f"rope_tables: expected rope_type to be one of {', '.join(SCALINGS)}, got {kind!r}")

    def need(key: str, other: Any = None) -> Any:
        value = given.get(key)
        value = other if value is None else value
        require(value is not None, f"rope_tables: {kind} scaling expected {key!r}, got keys {', '.join(sorted(given))}")
        return value

    exponents = torch.arange(0, dim, 2).float() / dim
    if kind == "dynamic":
        require(dim > 2, f"rope_tables: dynamic scaling expected dim > 2, got {dim}")
        factor, first = need("factor"), need("max_position_embeddings", max_position)
        grown = factor * max(length, first) / first - (factor - 1)
        return 1.0 / (theta * grown ** (dim / (dim - 2))) ** exponents, 1.0
    wavelengths = theta**exponents  # over 2 pi
    frequencies = 1.0 / wavelengths
    if kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / need("factor"), 1.0

    original = need("original_max_position_embeddings", max_position)
    if kind == "llama3":
        return _llama3(frequencies, original, need("factor"), need("low_freq_factor"), need("high_freq_factor")), 1.0
    factor = need("factor", max_position and max_position / original)
    if kind == "yarn":
        return _yarn(wavelengths, dim, theta, original, factor, given), _yarn_attention(factor, given)
    per_pair = torch.tensor(need("long_factor" if length > original else "short_factor"), dtype=torch.float32)
    require(per_pair.shape == (dim // 2,), f"rope_tables: longrope expected {dim // 2} factors, got {per_pair.numel()}")
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (per_pair * wavelengths), need("attention_factor", default)


def _llama3(frequencies: Tensor, original: int, factor: float, low: float, high: float) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    smooth = (original / wavelengths - low) / (high - low)
    blend = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow = torch.where(wavelengths > original / low, frequencies / factor, blend)
    return torch.where(wavelengths < original / high, frequencies, slow)


def _yarn(
    wavelengths: Tensor, dim: int, theta: float, original: int, factor: float, given: Mapping[str, Any]
) -> Tensor:
    def pair_that_turns(times: float) -> float:
        """The (fractional) pair whose angle makes so many turns over the original length."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(given.get("beta_fast") or 32), pair_that_turns(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep


def _yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    if given.get("attention_factor") is not None:
        return given["attention_factor"]

    def scale(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    m, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    return scale(m) / scale(all_dim) if m and all_dim else scale(1)


def _take(arguments: Any, b: int) -> dict[str, Any]:
    per_row = arguments["cos"].dim() == 3
    return {
        k: v[b : b + 1] if k in ("q", "k") or (per_row and k in ("cos", "sin")) else v for k, v in arguments.items()
    }


def _run(backend: str | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    return dispatch.prepared("rope", backend, reference, arguments["q"], arguments)(**arguments)


def _backward_reference(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """A rotation's gradient is the rotation back."""
    return reference(dq, dk, cos, -sin, interleaved=interleaved)


def _run_backward(backend: str | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    made = dispatch.prepared("rope.rope_backward", backend, _backward_reference, arguments["dq"], arguments)
    return made(**arguments)


def _save(ctx: Any, arguments: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(arguments["cos"], arguments["sin"])
    ctx.rest = arguments["interleaved"], arguments["backend"]


def _gradients(ctx: Any, needs: dict[str, bool], dq: Tensor, dk: Tensor) -> dict[str, Tensor]:
    dq, dk = _registered_backward(dq, dk, *ctx.saved_tensors, *ctx.rest)
    return {"q": dq, "k": dk}


_registered = library.define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, str? backend) -> (Tensor, Tensor)",
    _run,
    lambda q, k, **_: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_registered_backward = library.define(
    "rope_backward(Tensor dq, Tensor dk, Tensor cos, Tensor sin, bool interleaved, str? backend) -> (Tensor, Tensor)",
    _run_backward,
    lambda dq, dk, **_: (dq.new_empty(dq.shape), dk.new_empty(dk.shape)),
)
library.differentiate(_registered, _save, _gradients)
library.differentiate_through(_registered_backward, lambda backend, **arguments: _backward_reference(**arguments))

OP = Op(*("rope", rope, reference, cost, cases, baseline), take=_take, differentiable=("q", "k"), double_backward=True)
