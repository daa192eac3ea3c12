"""gptfast.patch on Hugging Face models: the same numbers, and everything as it was afterwards."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from huggingface_models import FAMILIES, exact, family, padding, text
from torch import Tensor

import gptfast
from gptfast.ops.spec import tolerance
from gptfast.patch import PatchReport
from gptfast.patch.changes import RECORD

pytest.importorskip("transformers")
LENGTHS = (41, 30)


def inputs(name: str, side: str | None) -> tuple[dict[str, Any], Any]:
    """A batch padded on this side, and which positions are text."""
    ids = text()
    if side is None:
        return {"input_ids": ids}, slice(None)
    mask = padding(ids, side, LENGTHS)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if not name.startswith("opt"):  # OPT counts them itself
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return given, mask.bool()


def check(got: Tensor, plain: Tensor, wanted: Tensor) -> None:
    error, allowed = (got.double() - wanted).abs().max().item(), tolerance(plain, wanted)
    assert error <= allowed, f"max |error| {error:.3g} > {allowed:.3g}"


def state(model: torch.nn.Module) -> list[Any]:
    """All that patching might leave behind: each module's class and dictionary, and its config's settings."""
    plain = (bool, int, float, str, type(None))
    configs = [vars(m.config).copy() for m in model.modules() if hasattr(m, "config")]
    return [
        *(
            (type(m), list(vars(m)), {k: v for k, v in vars(m).items() if isinstance(v, plain)})
            for m in model.modules()
        ),
        *configs,
    ]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits(name: str, side: str | None) -> None:
    model = family(name)
    given, kept = inputs(name, side)
    with torch.no_grad():
        plain, wanted = model(**given).logits[kept], exact(model)(**given).logits[kept]
        gptfast.patch(model)
        check(model(**given).logits[kept], plain, wanted)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_logits_in_bf16(name: str) -> None:
    model = family(name, torch.bfloat16)
    given, _ = inputs(name, None)
    with torch.no_grad():
        plain, wanted = model(**given).logits, exact(model)(**given).logits
        gptfast.patch(model)
        check(model(**given).logits, plain, wanted)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_with_a_cache(name: str, cache: str) -> None:
    """In pieces of 20, 1, 9, 1 and 10 tokens, which a window of 9 leaves behind."""
    from transformers import DynamicCache, StaticCache

    model, ids = family(name), text()
    if cache == "static" and not model._can_compile_fullgraph:
        pytest.skip("transformers' own code aligns its mask with the end of the cache there")
    with torch.no_grad():
        plain, wanted = model(ids).logits, exact(model)(ids).logits
        gptfast.patch(model)
        config = model.config
        past = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=48)
        got = [model(piece, past_key_values=past, use_cache=True).logits for piece in ids.split([20, 1, 9, 1, 10], 1)]
        check(torch.cat(got, 1), plain, wanted)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": dict(do_sample=False),
    "static": dict(do_sample=False, cache_implementation="static"),
    "sampling": dict(do_sample=True, top_k=20, temperature=0.8),
    "beam": dict(do_sample=False, num_beams=3, num_return_sequences=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_generate(name: str, way: str) -> None:
    """The same tokens from prompts of 12 and 7 tokens, padded on the left."""
    model, ids = family(name), text(length=12)
    if way == "static" and not model._can_compile_fullgraph:
        pytest.skip("transformers refuses it")

    def generate() -> Tensor:
        torch.manual_seed(0)
        options = dict(max_new_tokens=16, pad_token_id=1, **WAYS[way])
        return model.generate(ids, attention_mask=padding(ids, "left", (12, 7)), **options)

    wanted = generate()
    gptfast.patch(model)
    assert torch.equal(generate(), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatch_restores_everything(name: str) -> None:
    model, ids = family(name), text()
    with torch.no_grad():
        before, logits = state(model), model(ids).logits
        gptfast.patch(model)
        assert state(model) != before and not torch.equal(model(ids).logits, logits)
        gptfast.unpatch(model)
        assert state(model) == before and torch.equal(model(ids).logits, logits)
        gptfast.unpatch(model)
        assert state(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_training_has_the_same_losses(name: str) -> None:
    """Gradients within tolerance of the fp64 model's, and five losses no further apart than two logits may be: a loss
    changes by at most twice what a logit does."""
    trained = three(name)
    ids = text()
    with torch.no_grad():
        allowed = 2 * tolerance(trained[1](ids).logits, trained[2](ids).logits)
    grads = [gradients(model, ids) for model in trained]
    scales = [
        g.abs().max() for g in grads[2]
    ]  # so that one tolerance is for all: a single tensor's is a matter of luck
    check(*(torch.cat([g / s.to(g.dtype) for g, s in zip(found, scales)]) for found in grads))
    fast, plain, _ = (torch.tensor(losses(model, 5, torch.optim.SGD)) for model in trained)
    assert (fast - plain).abs().max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_long_training_has_the_same_losses(name: str) -> None:
    fast, plain = (torch.tensor(losses(model, 50, torch.optim.AdamW)) for model in three(name)[:2])
    assert (fast - plain).abs().max() <= 1e-3, "what is asked of a run of 200 steps"


def three(name: str) -> list[Any]:
    """A model patched, as it is, and in fp64, with the same parameters."""
    model = family(name)
    fast = copy.deepcopy(model)
    gptfast.patch(fast)
    return [fast, model, exact(model)]


def gradients(model: Any, ids: Tensor) -> list[Tensor]:
    """Of the loss by the parameters, those of a kind end to end."""
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    kinds: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        kinds.setdefault(name.rsplit(".", 2)[-2], []).append(p.grad.flatten())
    return [torch.cat(found) for found in kinds.values()]


def losses(model: Any, steps: int, kind: Any) -> list[float]:
    optimizer, out = kind(model.parameters(), lr=1e-3), []
    model.train()
    for step in range(steps):
        ids = torch.randint(2, 211, (2, 24), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return out


def test_dropout_follows_the_seed_and_the_mode() -> None:
    model, ids = family("gpt2", attn_pdrop=0.3, resid_pdrop=0.2), text()
    gptfast.patch(model)

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids).logits

    with torch.no_grad():
        assert torch.equal(logits(0), logits(1))
        model.train()
        assert torch.equal(logits(0), logits(0)) and not torch.equal(logits(0), logits(1))


def test_the_report() -> None:
    model = family("opt")
    report = gptfast.patch(model)
    assert {e.kind for e in report.patched} >= {"attention", "norm"}
    assert [e.module for e in report.skipped if e.kind == "mlp"] == [
        f"model.decoder.layers.{i}.activation_fn" for i in range(3)
    ]
    assert all((e.text and e.text[0].islower()) or e.text[0] in "nR" for e in report.skipped)
    assert "model.decoder.layers.*.self_attn x3" in str(report) and "ReLU" in str(report)
    assert report.to_dict()["patched"][0] == vars(report.patched[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_left_has_a_reason(name: str) -> None:
    """Each norm, attention and activation of a family is in the report, on one side or the other."""
    model = family(name)
    report = gptfast.patch(model)
    told = {e.module for e in (*report.patched, *report.skipped)}
    for path, module in model.named_modules():
        kind = type(module).__name__
        parents = {path.rsplit(".", n)[0] for n in (0, 1)}
        if kind.endswith(("Norm", "SelfAttention", "MLP", "Activation", "GELUTanh", "ReLU")):
            assert parents & told, f"{path} ({kind}) is nowhere"


def test_training_never_makes_the_logits() -> None:
    """With everything patched, the head's projection too; and who asks for logits gets them."""
    model = family("gpt2").train()
    gptfast.patch(model)
    ids = text()
    output = model(input_ids=ids, labels=ids)
    assert "linear_cross_entropy" in output.loss.grad_fn.name()
    assert output.logits.shape == (*ids.shape, model.config.vocab_size)


def test_the_logits_stand_in_their_place_in_training() -> None:
    """`loss, logits = output[:2]` is what many loops write: with a cache, its keys would come second."""
    model = family("llama").train()
    ids = text()
    wanted = model(input_ids=ids, labels=ids)
    gptfast.patch(model)
    output = model(input_ids=ids, labels=ids)
    assert output[0] is output.loss and "_made" not in vars(output), "the loss alone makes no logits"
    assert [type(x) for x in output[:]] == [type(x) for x in wanted[:]] and len(output.to_tuple()) == 3
    assert "logits" in output and output[1] is output.get("logits") is output["logits"] is output.logits
    torch.testing.assert_close(output[1], wanted[1])
    with pytest.raises(KeyError):
        output["nothing"]


def test_options() -> None:
    model = family("llama")
    report = gptfast.patch(model, attention=False, norm=False, rope=False, loss=False, linear=False)
    assert {e.kind for e in report.patched} == {"mlp"}
    assert model.config._attn_implementation == "sdpa"
    report = gptfast.patch(model, norm=False, mlp=False, loss=False, linear=False)
    assert {e.kind for e in report.patched} == {"attention", "rope"}
    gptfast.unpatch(model)
    assert not any(RECORD in vars(m) for m in model.modules())


def test_patching_twice_is_harmless() -> None:
    model = family("gemma2")
    before = state(model)
    first = gptfast.patch(model)
    after = state(model)
    forwards = [vars(m).get("forward") for m in model.modules()]
    assert gptfast.patch(model) == first and state(model) == after
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    gptfast.unpatch(model)
    assert state(model) == before


def test_backend() -> None:
    model, ids = family("gpt2"), text()
    gptfast.patch(model, backend="reference")
    with torch.no_grad():
        reference = model(ids).logits
        gptfast.patch(model)
        default = model(ids).logits
        gptfast.patch(model, backend="reference")
        assert torch.equal(model(ids).logits, reference) and not torch.equal(reference, default)
    with pytest.raises(ValueError, match="expected backend to be one of"):
        gptfast.patch(model, backend="abacus")
    with pytest.raises(TypeError, match=r"expected an nn\.Module, got int"):
        gptfast.patch(3)  # pyright: ignore[reportArgumentType]


def test_for_the_length_of_a_block() -> None:
    model = family("llama")
    before = state(model)
    with gptfast.patched(model) as report:
        assert isinstance(report, PatchReport) and state(model) != before
    assert state(model) == before
    with pytest.raises(KeyError), gptfast.patched(model, norm=False):
        raise KeyError
    assert state(model) == before
    gptfast.patch(model, norm=False)
    partly = state(model)
    with gptfast.patched(model, backend="reference"):
        assert state(model) != partly
    assert state(model) == partly
    gptfast.unpatch(model)
    assert state(model) == before


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama", "gemma2"])
def test_copies_and_pickles(name: str) -> None:
    model, ids = family(name), text()
    keys = list(model.state_dict())
    gptfast.patch(model)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        wanted = model(ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(ids).logits, wanted)
            next(m for m in twin.modules() if type(m).__name__.endswith("Norm")).weight.zero_()
            assert not torch.equal(twin(ids).logits, wanted), "the copy still calls the original's modules"
            assert torch.equal(model(ids).logits, wanted)
            gptfast.unpatch(twin)
            assert "forward" not in vars(next(m for m in twin.modules() if type(m).__name__.endswith("Norm")))
    assert model.config._attn_implementation == "gptfast"


def test_attention_weights_are_there_for_who_asks() -> None:
    model, ids = family("llama"), text()
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    gptfast.patch(model)
    with torch.no_grad():
        wanted, got = (m(ids, output_attentions=True).attentions for m in (plain, model))
    assert len(got) == 3 and got[0].shape == (2, 4, 41, 41)
    torch.testing.assert_close(got, wanted)


def test_packed_sequences() -> None:
    """Three texts end to end, told apart by positions, or by cu_seq_lens as data collators give them."""
    model, ids = family("llama"), text(rows=1)
    lengths = [7, 20, 14]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    packed: dict[str, Any] = dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=20, max_length_k=20)
    with torch.no_grad():
        alone = [exact(model)(part).logits for part in ids.split(lengths, 1)]
        plain = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
        gptfast.patch(model)
        for extra in ({}, packed):
            got = model(ids, position_ids=positions, use_cache=False, **extra).logits
            check(got, plain, torch.cat(alone, 1))


def test_importing_changes_nothing() -> None:
    code = (
        "import sys, torch, gptfast; before = dict(vars(torch.nn.functional)); assert callable(gptfast.patch);"
        "import gptfast.patch, gptfast.compat.huggingface, gptfast.compat.sdpa;"
        "assert 'transformers' not in sys.modules and dict(vars(torch.nn.functional)) == before;"
        "r = gptfast.patch(torch.nn.Sequential(torch.nn.LayerNorm(8))); assert len(r.patched) == 1;"
        "assert 'transformers' not in sys.modules;"
        "import transformers; assert 'gptfast' not in transformers.AttentionInterface._global_mapping"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
