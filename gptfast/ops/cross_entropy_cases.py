"""The shapes on which the losses over a vocabulary are tested and timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gptfast.ops.spec import Case, Inputs


def targets(i: Inputs, shape: tuple[int, ...], V: int, ignored: str) -> Tensor:
    """ignored: "" none, "some" every third, "most" all but every fifth, "all"."""
    target, place = i.randint(0, V, shape), torch.arange(torch.Size(shape).numel()).reshape(shape)
    if ignored:
        target[{"some": place % 3 == 1, "most": place % 5 != 2, "all": place >= 0}[ignored].to(target.device)] = -100
    return target


def head(i: Inputs, shape: tuple[int, ...], V: int, C: int, bias: str) -> dict[str, Any]:
    """x, weight and bias, for logits that spread by 2. bias: "" none, "bias", or "inf", where tokens are ruled out."""
    b = i.randn(V, scale=0.5) if bias else None
    if b is not None and bias == "inf":
        b[1::7] = -torch.inf
    return {"x": i.randn(*shape, C), "weight": i.randn(V, C, scale=2 * C**-0.5), "bias": b}


def linear_cross_entropy_cases() -> list[Case]:
    def case(
        *shape: int,
        V: int,
        C: int,
        ignored: str = "",
        bias: str = "",
        weighted: bool = False,
        tags: str = "",
        **options: Any,
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            made = head(i, shape, V, C, bias)
            target = targets(i, shape, V, ignored)
            if bias == "inf":  # a token that is ruled out has a loss of inf: not here
                target[(target % 7 == 1) & (target >= 0)] = 0
            if weighted:
                made["class_weight"] = i.rand(V, dtype=torch.float32)
            return {**made, "target": target, **options}

        return Case(_name(shape, f"{V}x{C}", ignored, bias, weighted, options), make, frozenset(tags.split()))

    return [
        case(1, V=1, C=1),
        case(2, V=5, C=3, reduction="none"),
        case(2, 3, V=7, C=33, bias="bias", reduction="none"),
        case(5, V=192, C=64, reduction="sum"),
        case(7, V=193, C=40, label_smoothing=0.1, reduction="none"),
        case(9, V=1000, C=65, softcap=3.0, z_loss=1e-2, reduction="none"),
        case(13, V=391, C=100, ignored="some", weighted=True, bias="bias", label_smoothing=0.2, z_loss=1e-3),
        case(6, V=80, C=40, ignored="all"),
        case(6, V=50, C=16, ignored="all", reduction="sum"),
        case(6, V=50, C=16, ignored="most", reduction="none", softcap=30.0),
        case(11, V=300, C=24, bias="inf", reduction="none"),
        case(401, V=210, C=50, ignored="some", weighted=True, reduction="sum"),
        case(0, V=10, C=8, reduction="none"),
        case(3, V=2000, C=600, bias="bias", reduction="none"),
        case(384, V=50257, C=768, tags="bench big"),
        case(1024, V=4096, C=512, tags="bench"),
    ]


def cross_entropy_cases() -> list[Case]:
    def case(
        *shape: int, ignored: str = "", weighted: bool = False, scale: float = 2.0, tags: str = "", **options: Any
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            made = {"logits": i.randn(*shape, scale=scale), "target": targets(i, shape[:-1], shape[-1], ignored)}
            if weighted:
                made["class_weight"] = i.rand(shape[-1], dtype=torch.float32)
            return {**made, **options}

        name = _name(shape, "", ignored, "", weighted, options) + "-large" * (scale > 2)
        return Case(name, make, frozenset(tags.split()))

    return [
        case(1, 1),
        case(2, 5, reduction="none"),
        case(2, 3, 193, reduction="none"),
        case(7, 192, label_smoothing=0.1, reduction="none"),
        case(9, 1000, softcap=3.0, z_loss=1e-2, reduction="none"),
        case(9, 1000, scale=50.0, reduction="none"),
        case(13, 391, ignored="some", weighted=True, label_smoothing=0.2, z_loss=1e-3),
        case(6, 600, ignored="all"),
        case(6, 50, ignored="most", reduction="sum", softcap=30.0),
        case(0, 10),
        case(0, 10, reduction="none"),
        case(512, 50257, tags="bench big"),
        case(64, 8192, tags="bench"),
    ]


def _name(shape: tuple[int, ...], sizes: str, ignored: str, bias: str, weighted: bool, options: dict[str, Any]) -> str:
    parts = ["x".join(map(str, shape)), sizes, ignored, bias, "weighted" * weighted]
    short = {"label_smoothing": "smooth", "z_loss": "z", "softcap": "cap", "reduction": "", "temperature": "t"}
    parts += [f"{short.get(name, name)}{value}" for name, value in options.items()]
    return "-".join(part for part in parts if part)


def token_logprobs_cases() -> list[Case]:
    def case(*shape: int, V: int, C: int, ignored: str = "", bias: str = "", tags: str = "", **options: Any) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            target = targets(i, shape, V, ignored)
            if bias == "inf":  # a token that is ruled out has a log-probability of -inf: not here
                target[(target % 7 == 1) & (target >= 0)] = 0
            return {**head(i, shape, V, C, bias), "target": target, **options}

        return Case(_name(shape, f"{V}x{C}", ignored, bias, False, options), make, frozenset(tags.split()))

    return [
        case(1, V=1, C=1),
        case(2, V=5, C=3, return_entropy=True),
        case(2, 3, V=7, C=33, bias="bias"),
        case(9, V=1000, C=65, softcap=3.0, temperature=0.7, return_entropy=True),
        case(13, V=391, C=100, ignored="some", bias="bias", temperature=1.3, return_entropy=True),
        case(6, V=50, C=16, ignored="all", return_entropy=True),
        case(11, V=300, C=24, bias="inf", return_entropy=True),
        case(401, V=210, C=50, ignored="most"),
        case(0, V=10, C=8),
        case(384, V=50257, C=768, tags="bench big"),
        case(512, V=4096, C=512, return_entropy=True, tags="bench"),
    ]


def token_kl_cases() -> list[Case]:
    def case(
        *shape: int,
        V: int,
        depths: tuple[int, int],
        bias: str = "",
        masked: bool = False,
        tags: str = "",
        **options: Any,
    ) -> Case:
        def make(i: Inputs) -> dict[str, Any]:
            p, q = (head(i, shape, V, C, bias) for C in depths)
            made = {f"{name}_{side}": x for side, of in (("p", p), ("q", q)) for name, x in of.items()}
            if masked:
                made["mask"] = i.rand(*shape, dtype=torch.float32) < 0.6
            return {**made, **options}

        sizes = f"{V}x{depths[0]}x{depths[1]}" + "-masked" * masked
        return Case(_name(shape, sizes, "", bias, False, options), make, frozenset(tags.split()))

    return [
        case(1, V=1, depths=(1, 1)),
        case(7, 9, V=23, depths=(33, 30), bias="bias"),
        case(9, V=1000, depths=(65, 64), softcap_p=3.0, softcap_q=2.0, temperature=0.7),
        case(13, V=391, depths=(100, 50), bias="bias", masked=True, temperature=2.0),
        case(401, V=210, depths=(50, 50), masked=True),
        case(0, V=10, depths=(8, 8)),
        case(128, V=50257, depths=(768, 768), tags="bench big"),
        case(256, V=4096, depths=(512, 256), tags="bench"),
    ]
