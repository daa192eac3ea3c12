"""Sampling: one token id for each row of logits, after bias, mask, penalties, temperature and filters.

The same fp32 logits, parameters and seed give the same id on every backend: below, every floating-point operation is a
separately rounded fp32 one (nearest even, no fused multiply-add, IEEE division) in the order written, and every sum is
a sum of integers, which has no order.

logits              (B, V)  float32, bfloat16 or float16, widened to fp32; V < 2^22 (float64 on the reference, rounded)
temperature         0, or at least 1e-30
top_k               integer >= 0; 0 = off
top_p, typical_p    0 <= p <= 1; 1 = off
min_p               0 <= p <= 1; 0 = off
repetition_penalty  > 0; 1 = off
presence_penalty, frequency_penalty  finite; 0 = off
logit_bias          (V,) or (B, V) float32
mask                (V,) or (B, V) bool, True = allowed
history             (B, L) int64: the tokens so far, prompt then output; ids outside [0, V), as -1, are padding
prompt_lengths      (B,) int64: how many of a row's first positions are the prompt; None = 0, all of it is output
seed, step, stream  integers (the bits of seed and step as uint64, of stream as uint32)

Each parameter is a number, or (B,) numbers as a sequence or a tensor; None is its neutral value. Real ones are rounded
to fp32 first. Returns ids (B,) int64 and, where asked for, log-probabilities (B,) fp32.

Logits.  l = logits; l = l + logit_bias; l = -inf where the mask is False. Then, for each id in the history,
l = l > 0 ? l / repetition_penalty : l * repetition_penalty; and for each id that comes n > 0 times in its output part,
l = l - (presence_penalty + frequency_penalty * n). Then l = l / temperature, but for temperature 0.
A row that now has a NaN or +inf, or nothing but -inf, gives the id -1 and the log-probability NaN.
With temperature 0 the id is the lowest of those with the largest l, and no filter is looked at.

Weights.  y = max((l - max l) * 1.44269502, -40);  n = round(y), ties to even;  f = y - n;  p = C0;  p = p * f + Ci for
i = 1 to 6 (C is EXP2 in sampling_math.py);  w = trunc(p * 2^(n + 32)), a uint64 <= 2^32. The largest l has w = 2^32.
A token with w = 0 is not there: it can't be drawn and isn't counted.

Filters, each over those that the last one left; "before" means ranked before, and mass is a sum of w:
  top_k      ranks by larger l, then lower id, and keeps the first top_k
  top_p      ranks likewise and keeps a token while the mass before it is < max(1, floor(P * total / 2^32)), where
             P = trunc(2^32 * top_p) and total is the mass of all that are left (96 bits; see fraction())
  min_p      keeps w >= trunc(2^32 * min_p)
  typical_p  u = trunc(-y * 2^20) is a token's surprise in 2^-20 bits, up to a constant that cancels;
             S = sum((w * u) >> 12);  mean = trunc(fp64(S) / fp64(total) * 2^12), the entropy up to that constant;
             ranks by smaller |u - mean|, then lower id, and keeps as top_p does with P = trunc(2^32 * typical_p).
             Hugging Face's warper is the same in fp32 log-probabilities, whose own rounding is about 2^-20 too.
Draw.  The lowest id whose mass up to and with itself, in the order of ids, is > floor(r * total / 2^64), where
r = word0 | word1 << 32 of Philox4x32-10 with key seed, index step and stream (philox.py).

Log-probabilities.  return_logprobs=True or "raw": log_softmax of the logits as given, before bias, mask and the rest.
"processed": ln(w / total) of the chosen token among those left by the filters, the probability it was drawn with; 0
with temperature 0.

The filters are those of Hugging Face's generate in its order, and keep the same tokens but for ties at a cut: there
ours go by lowest id. Nucleus: Holtzman et al. (arXiv:1904.09751); typical: Meister et al. (arXiv:2202.00666); min-p:
Nguyen et al. (arXiv:2407.01082); repetition penalty: Keskar et al. (arXiv:1909.05858).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from gptfast.ops import dispatch, library
from gptfast.ops.dispatch import require, shape, unreadable
from gptfast.ops.sampling_cases import cases
from gptfast.ops.sampling_math import distances, fraction, log2_weights, uniform_below, weights
from gptfast.ops.spec import Cost, Op, nbytes

Real = float | Sequence[float] | Tensor | None
Integer = int | Sequence[int] | Tensor | None

# Each real parameter: its neutral value, the least and the greatest allowed, and those in words.
REALS = {
    "temperature": (1.0, 0.0, 3e38, "0 or at least 1e-30"),
    "top_p": (1.0, 0.0, 1.0, "between 0 and 1"),
    "min_p": (0.0, 0.0, 1.0, "between 0 and 1"),
    "typical_p": (1.0, 0.0, 1.0, "between 0 and 1"),
    "repetition_penalty": (1.0, 1e-30, 1e30, "above 0"),
    "presence_penalty": (0.0, -1e30, 1e30, "finite"),
    "frequency_penalty": (0.0, -1e30, 1e30, "finite"),
}
RANDOM = ("seed", "step", "stream")
NUMBERS = frozenset((float, int, type(None)))
CPU = torch.device("cpu")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def survivors(
    logits: Tensor,
    *,
    temperature: Real = 1.0,
    top_k: Integer = 0,
    top_p: Real = 1.0,
    min_p: Real = 0.0,
    typical_p: Real = 1.0,
    repetition_penalty: Real = 1.0,
    presence_penalty: Real = 0.0,
    frequency_penalty: Real = 0.0,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """The tokens that sample() may draw, (B, V) bool; arguments as there."""
    arguments = {k: v for k, v in locals().items() if k != "logits"}
    return _surviving_weights(logits, **arguments) > 0


def reference(
    logits: Tensor,
    *,
    seed: Integer = 0,
    step: Integer = 0,
    stream: Integer = 0,
    return_logprobs: bool | Literal["raw", "processed"] = False,
    **processing: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The meaning of sample, in plain PyTorch; `processing` is what survivors() takes."""
    w = _surviving_weights(logits, **processing)
    mass = w.cumsum(-1)
    total = mass[:, -1:]
    seed, step, stream = (_column(x, 0, logits, torch.int64) for x in (seed, step, stream))
    ids = (mass <= uniform_below(total, seed, step, stream)).sum(-1, keepdim=True)
    ids = torch.where(total > 0, ids, -1)
    if not return_logprobs:
        return ids[:, 0]
    if return_logprobs == "processed":
        logprobs = (w.double() / total.double()).log()
    else:
        logprobs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = torch.where(total > 0, logprobs.gather(-1, ids.clamp(min=0)), torch.nan)[:, 0]
    return ids[:, 0], chosen.to(torch.promote_types(logits.dtype, torch.float32))


def _surviving_weights(
    logits: Tensor,
    *,
    temperature: Real = 1.0,
    top_k: Integer = 0,
    top_p: Real = 1.0,
    min_p: Real = 0.0,
    typical_p: Real = 1.0,
    **before: Any,
) -> Tensor:
    """w (B, V) int64 of the tokens that are left, 0 for the others; temperature 0 leaves one."""
    l = _processed(logits, **before)
    temperature = _column(temperature, 1.0, l)
    greedy = temperature == 0
    l = l / torch.where(greedy, 1.0, temperature) + 0.0  # -0 ranks as 0
    bad = ~(l < torch.inf).all(-1, keepdim=True) | (l == -torch.inf).all(-1, keepdim=True)
    l = torch.where(bad, 0.0, l)
    y = log2_weights(l)
    w = torch.where(bad, 0, weights(y))
    by_logit = l.sort(dim=-1, descending=True, stable=True).indices
    k = _column(top_k, 0, l, torch.int64)
    if (k > 0).any():
        w = torch.where(k > 0, _first(w, by_logit, k, count=True), w)
    w = _nucleus(w, by_logit, top_p)
    w = w * (w >= (_column(min_p, 0.0, l).double() * 2.0**32).to(torch.int64))
    if (_column(typical_p, 1.0, l) < 1).any():
        away = torch.where(w > 0, distances(w, y), 2**62)
        w = _nucleus(w, away.sort(dim=-1, stable=True).indices, typical_p)
    best = torch.zeros_like(w).scatter(-1, by_logit[:, :1], 2**32)
    return torch.where(greedy & ~bad, best, w)


def _processed(
    logits: Tensor,
    *,
    repetition_penalty: Real = 1.0,
    presence_penalty: Real = 0.0,
    frequency_penalty: Real = 0.0,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """The logits after bias, mask and penalties, (B, V) fp32."""
    l = logits.to(torch.float32)
    if logit_bias is not None:
        l = l + logit_bias.to(torch.float32)
    if mask is not None:
        l = torch.where(mask, l, -torch.inf)
    if history is None:
        return l
    there = (history >= 0) & (history < l.shape[-1])
    at = torch.arange(history.shape[-1], device=l.device)
    output = there & (at >= _column(prompt_lengths, 0, l, torch.int64))
    ids = torch.where(there, history, 0)
    seen = torch.zeros_like(l).scatter_add(-1, ids, there.to(l.dtype)) > 0
    n = torch.zeros_like(l).scatter_add(-1, ids, output.to(l.dtype))
    r = _column(repetition_penalty, 1.0, l)
    l = torch.where(seen, torch.where(l > 0, l / r, l * r), l)
    price = _column(frequency_penalty, 0.0, l) * n
    price = _column(presence_penalty, 0.0, l) + price
    return torch.where(n > 0, l - price, l)


def _first(w: Tensor, order: Tensor, budget: Tensor, count: bool = False) -> Tensor:
    """w, 0 but where the mass (or the count) of the tokens before in `order` is less than budget (B, 1)."""
    ranked = w.gather(-1, order)
    measure = (ranked > 0).to(torch.int64) if count else ranked
    return torch.zeros_like(w).scatter(-1, order, ranked * (measure.cumsum(-1) - measure < budget))


def _nucleus(w: Tensor, order: Tensor, p: Real) -> Tensor:
    """w, 0 but where the mass before in `order` is less than p of all; rows with p = 1 as they are."""
    p = _column(p, 1.0, w)
    if not (p < 1).any():
        return w
    return torch.where(p < 1, _first(w, order, fraction(p, w.sum(-1, keepdim=True)).clamp(min=1)), w)


def _column(x: Any, neutral: float, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter as (B, 1) or (1, 1)."""
    x = torch.as_tensor(neutral if x is None else _wrapped(x), device=like.device)
    return x.to(dtype).reshape(-1, 1)


def _wrapped(x: Any) -> Any:
    """An int (or ints) with the same 64 bits in the range of int64; anything else as it is."""
    if isinstance(x, list | tuple):
        return [_wrapped(v) for v in x]
    return x - 2**64 if isinstance(x, int) and 2**63 <= x < 2**64 else x


def baseline(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    **_: Any,
) -> Tensor:
    """What one writes with PyTorch: top-k by threshold, top-p by a full sort, softmax, multinomial."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ranked, order = logits.sort(descending=True)
        p = ranked.softmax(-1)
        ranked = ranked.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ranked)
    return logits.softmax(-1).multinomial(1)[:, 0]


def cost(logits: Tensor, **arguments: Any) -> Cost:
    read = nbytes(logits, *(arguments.get(name) for name in ("logit_bias", "mask", "history")))
    greedy = isinstance(t := arguments.get("temperature"), float | int) and t == 0
    flops = 1 if greedy else 22  # a comparison; a division, a subtraction, 14 for the weight, the sums
    return Cost(flops=flops * logits.numel(), bytes=read + 8 * logits.shape[0])


def sample(
    logits: Tensor,
    *,
    temperature: Real = 1.0,
    top_k: Integer = 0,
    top_p: Real = 1.0,
    min_p: Real = 0.0,
    typical_p: Real = 1.0,
    repetition_penalty: Real = 1.0,
    presence_penalty: Real = 0.0,
    frequency_penalty: Real = 0.0,
    logit_bias: Tensor | None = None,
    mask: Tensor | None = None,
    history: Tensor | None = None,
    prompt_lengths: Tensor | Sequence[int] | None = None,
    seed: Integer = 0,
    step: Integer = 0,
    stream: Integer = 0,
    return_logprobs: bool | Literal["raw", "processed"] = False,
    backend: str | None = None,
) -> Any:
    """ids (B,) int64, or (ids, log-probabilities (B,) fp32) where asked for. Everything else: the top of this page.

    Raises ValueError for arguments that don't fit (values in tensors on another device than the CPU are not looked at);
    BackendError where `backend` can't serve the call.
    """
    library.untransformed("sample", {"logits": logits, "logit_bias": logit_bias, "mask": mask, "history": history})
    given = (temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty, top_k)
    plain = NUMBERS.issuperset(map(type, given))
    parameters, penalty = _checked_numbers(*given) if plain else _checked(given, *_rows(logits))
    arguments: dict[str, Any] = dict(
        **dict(logits=logits, **parameters, logit_bias=logit_bias, mask=mask, history=history),
        prompt_lengths=None if prompt_lengths is None else torch.as_tensor(prompt_lengths, device=logits.device),
        return_logprobs=return_logprobs,
    )
    check = partial(_check, penalty)
    if plain and type(seed) is type(step) is type(stream) is int:
        sampler = dispatch.prepared("sampling.sample", backend, reference, logits, arguments, check)
        seed, step, stream = (integer(name, x, 1, CPU) for name, x in zip(RANDOM, (seed, step, stream)))
        return sampler(**arguments, seed=seed, step=step, stream=stream)
    check(**arguments)
    seed, step, stream = (integer(name, x, *_rows(logits)) for name, x in zip(RANDOM, (seed, step, stream)))
    arguments |= {"seed": seed, "step": step, "stream": stream}
    return dispatch.run("sampling.sample", backend, reference, logits, **arguments)


def _rows(logits: Tensor) -> tuple[int, torch.device]:
    """How many rows there are, and their device."""
    require(logits.dim() == 2 and logits.is_floating_point() and 0 < logits.shape[1] < 2**22,
            lambda: f"sample: expected logits (B, V) of floats with 0 < V < 2^22, got {shape(logits)}")  # fmt: skip
    return logits.shape[0], logits.device


def _check(
    penalty: str | None,
    *,
    logits: Tensor,
    logit_bias: Tensor | None,
    mask: Tensor | None,
    history: Tensor | None,
    prompt_lengths: Tensor | None,
    return_logprobs: Any,
    **_: Any,
) -> None:
    """Raises where tensors don't fit together. penalty: one that is on, if any."""
    B, V = _rows(logits)[0], logits.shape[1]
    if history is None:
        require(penalty is None, lambda: f"sample: {penalty} needs history ({B}, L), got None")
        require(prompt_lengths is None, lambda: f"sample: prompt_lengths needs history ({B}, L), got None")
    if logit_bias is not None:
        _check_tensor("logit_bias", logit_bias, ((V,), (B, V)), torch.float32, logits)
    if mask is not None:
        _check_tensor("mask", mask, ((V,), (B, V)), torch.bool, logits)
    if history is not None:
        _check_tensor("history", history, ((B, None),), torch.int64, logits)
    if prompt_lengths is not None:
        _check_tensor("prompt_lengths", prompt_lengths, ((B,),), torch.int64, logits)
    require(return_logprobs in (False, True, "raw", "processed"),
            lambda: f"sample: expected return_logprobs a bool, raw or processed, got {return_logprobs!r}")  # fmt: skip


def _check_tensor(
    name: str, t: Tensor, shapes: tuple[tuple[int | None, ...], ...], dtype: torch.dtype, logits: Tensor
) -> None:
    """Raises where t isn't of one of these shapes (None = any length), of this dtype and on logits' device."""
    fits = any(len(s) == t.dim() and all(n in (None, m) for n, m in zip(s, t.shape)) for s in shapes)
    wanted = " or ".join(str(s).replace("None", "L") for s in shapes) + f" {dtype} on {logits.device}".replace(
        "torch.", ""
    )
    require(fits and t.dtype == dtype and t.device == logits.device,
            lambda: f"sample: expected {name} {wanted}, got {shape(t)} on {t.device}")  # fmt: skip


def _checked(
    given: Sequence[Any], B: int, device: torch.device = CPU
) -> tuple[dict[str, float | int | Tensor], str | None]:
    """The parameters by name, REALS and top_k, each a number or (B,) on the device; a penalty that is on, if any."""
    parameters: dict[str, Any] = {name: _real(name, x, B, device) for name, x in zip(REALS, given)}
    on = (name for name in PENALTIES if not _is_neutral(name, parameters[name]))
    return {**parameters, "top_k": integer("top_k", given[-1], B, device)}, next(on, None)


@lru_cache(typed=True)  # a loop's parameters stay the same from token to token
def _checked_numbers(*given: float | None) -> tuple[dict[str, float | int | Tensor], str | None]:
    return _checked(given, 1)


def _real(name: str, x: Real, B: int, device: torch.device) -> float | Tensor:
    """A real parameter, checked: a float, or (B,) fp32 on the device."""
    neutral, _, _, meaning = REALS[name]
    if x is None:
        return neutral
    if not isinstance(x, float | int):
        t = torch.as_tensor(x)
        require(t.shape in ((), (B,)) and not t.is_complex(),
                lambda: f"sample: expected {name} one number or ({B},), got {shape(t)}")  # fmt: skip
        if t.device.type != "cpu" or t.dim():
            wrong = t[~_fits(name, t)] if t.device.type == "cpu" else t[:0]
            require(not wrong.numel(), lambda: f"sample: expected {name} {meaning}, got {wrong[0].item()}")
            t = t.to(device, torch.float32)
            return t.contiguous() if t.dim() else t.repeat(B)
        x = t.item()
    require(_fits(name, x), lambda: f"sample: expected {name} {meaning}, got {x}")
    return float(x)


def _fits(name: str, x: Any) -> Any:
    """Whether a parameter, or each of a tensor of them, makes sense; NaN never does."""
    _, least, most, _ = REALS[name]
    return (x >= least) & (x <= most) & ((x == 0) | (x >= 1e-30) if name == "temperature" else True)


def integer(name: str, x: Integer, B: int, device: torch.device, op: str = "sample") -> int | Tensor:
    """An integer parameter, checked: an int in the range of int64, or (B,) int64 on the device."""
    if x is None:
        return 0
    if isinstance(x, int):
        require(-(2**63) <= x < 2**64 and (name != "top_k" or 0 <= x < 2**63),
                lambda: f"{op}: expected {name} {'>= 0' if name == 'top_k' else 'of 64 bits'}, got {x}")  # fmt: skip
        return _wrapped(x)
    t = torch.as_tensor(_wrapped(x), device=device)
    require(t.shape in ((), (B,)) and t.dtype in (torch.int64, torch.int32),
            lambda: f"{op}: expected {name} one integer or ({B},), got {shape(t)}")  # fmt: skip
    if name == "top_k" and t.device.type == "cpu":
        require(bool((t >= 0).all()), lambda: f"sample: expected top_k >= 0, got {t.min().item()}")
    return t.to(torch.int64).contiguous() if t.dim() else t.to(torch.int64).repeat(B)


def _is_neutral(name: str, x: float | Tensor) -> bool:
    neutral = REALS[name][0]
    if not isinstance(x, Tensor):
        return x == neutral
    return not unreadable(x) and bool((x == neutral).all())


def _take(arguments: Mapping[str, Any], b: int) -> dict[str, Any]:
    def row(name: str, x: Any) -> Any:
        per_row = isinstance(x, Tensor) and x.dim() == (2 if name in ("logit_bias", "mask") else max(x.dim(), 1))
        return x[b : b + 1] if per_row else x

    return {name: row(name, x) for name, x in arguments.items()}


OP = Op("sample", sample, reference, cost, cases, baseline, plain=reference, take=_take)
