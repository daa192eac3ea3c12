"""The reward model: its loss, its figures, what it learns, and the folder that transformers reads too."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gptfast.formats.files import FormatError
from gptfast.train.optim import AdamW
from gptfast.train.packing import pack
from gptfast.train.prompts import call_reward, completion_ids, messages_of, prompt_ids, reward_function
from gptfast.train.ranked import Answer, Ranked, RankedConfig
from gptfast.train.reward import Reward, RewardConfig, wilson
from gptfast.train.reward_model import OURS, RewardEnsemble, RewardModel, ValueModel, read_reward
from gptfast.train.trainer import Trainer
from gptfast.train.verify import arithmetic_answer, arithmetic_prompts, arithmetic_reward
from tests.train import oracles, tiny

QUIET: dict[str, Any] = dict(eval_every=0, save_every=0)


def scores_one_by_one(model: RewardModel, sequences: list[list[int]]) -> list[float]:
    """The head's number at each last token, without packing."""
    weight = model.score.weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        return [float(model.backbone.hidden(torch.tensor([s]))[0, -1] @ weight[0]) for s in sequences]


@pytest.mark.parametrize("use_margin", [False, True])
def test_the_loss_and_its_figures(use_margin: bool) -> None:
    pairs = [p._replace(margin=0.25 * i) for i, p in enumerate(tiny.pairs(6))]
    model = RewardModel(tiny.model(), seed=1)
    config = RewardConfig(batch_size=6, centring=0.1, use_margin=use_margin, micro_tokens=100, **QUIET)
    stage = Reward(config, model, tiny.tokenizer(), pairs)
    sequences = stage.pairs.sequences(range(6))
    scores = scores_one_by_one(model, sequences)
    margins = [0.25 * i if use_margin else 0.0 for i in range(6)]
    wanted = np.mean([oracles.bradley_terry(scores[2 * i], scores[2 * i + 1], margins[i], 0.1) for i in range(6)])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.grad_norm = None  # type: ignore[attr-defined]
    found = stage.step(0, optimizer)  # pyright: ignore[reportArgumentType]
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)
    apart = np.array(scores[0::2]) - np.array(scores[1::2])
    assert found["margin"] == pytest.approx(apart.mean(), abs=1e-5)
    assert found["accuracy"] == pytest.approx((apart > 0).mean())
    # The gradient over several micro-batches is that of the whole batch.
    head = model.score.weight
    assert isinstance(head, torch.nn.Parameter) and head.grad is not None
    small = head.grad.clone()
    whole = Reward(
        RewardConfig(batch_size=6, centring=0.1, use_margin=use_margin, **QUIET), model, tiny.tokenizer(), pairs
    )
    whole.step(0, optimizer)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(small, head.grad, atol=1e-6, rtol=1e-4)


def test_the_heads_start() -> None:
    """N(0, 1 / (d + 1)): its standard deviation is 1 / sqrt(d + 1)."""
    weights = torch.cat(
        [next(RewardModel(tiny.model(), seed=s).score.parameters()).detach().flatten() for s in range(40)]
    )
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(33), rel=0.1)
    assert abs(float(weights.mean())) < 0.02
    one, same = RewardModel(tiny.model(), seed=3), RewardModel(tiny.model(), seed=3)
    assert torch.equal(one.score.weight, same.score.weight)  # pyright: ignore[reportArgumentType]


def test_scores_do_not_depend_on_what_is_packed_beside() -> None:
    model = RewardModel(tiny.model())
    pairs = tiny.pairs(9)
    tokens = tiny.tokenizer()
    prompts = [prompt_ids(p.prompt, tokens) for p in pairs]
    answers = [completion_ids(p.prompt, p.chosen, tokens) for p in pairs]
    together = model.rewards(prompts, answers)
    assert torch.equal(together.flip(0), model.rewards(prompts[::-1], answers[::-1]))
    assert torch.equal(together[4:5], model.rewards(prompts[4:5], answers[4:5]))
    wanted = scores_one_by_one(model, [[*p, *a] for p, a in zip(prompts, answers)])
    torch.testing.assert_close(together, torch.tensor(wanted), atol=1e-5, rtol=1e-5)


def test_it_tells_answers_apart_and_says_how_sure_it_is(tmp_path: Path) -> None:
    stage = Reward(
        RewardConfig(steps=40, lr=3e-3, batch_size=16, **QUIET),
        RewardModel(tiny.model()),
        tiny.tokenizer(),
        tiny.pairs(200),
        tiny.pairs(60, seed=1),
    )
    with torch.no_grad():
        before = stage.evaluate(0)
    found = Trainer(stage, tmp_path, quiet=True).run().evaluation
    assert found["accuracy"] >= 0.95 > before["accuracy"] and found["margin"] > before["margin"] + 1
    assert found["accuracy_low"] < found["accuracy"] <= found["accuracy_high"] <= 1
    assert stage.heldout is not None
    with torch.no_grad():
        both = stage.model._all_raw(stage.heldout.sequences(range(60)))
    assert found["score_std"] == pytest.approx(float(both.std()), rel=1e-5)
    # What was exported is normalised on the held-out answers.
    loaded = RewardModel.from_folder(tmp_path / "model")
    held = stage.heldout
    assert held is not None
    prompts = [p for p in held.prompts for _ in (0, 1)]
    answers = [a for c, r in zip(held.chosen, held.rejected) for a in (c, r)]
    rewards = loaded.rewards(prompts, answers)
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-4) and float(rewards.std()) == pytest.approx(1, abs=1e-4)


def test_wilsons_interval() -> None:
    """Brown, Cai and DasGupta (2001): the roots p of (p - x)^2 = z^2 p (1 - p) / n."""
    for right, n in ((79, 100), (0, 10), (10, 10), (1, 3)):
        for bound in wilson(right, n):
            if 1e-9 < bound < 1 - 1e-9:
                assert (bound - right / n) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / n, rel=1e-6)
    assert wilson(0, 10)[0] < 1e-9 and wilson(10, 10)[1] > 1 - 1e-9
    with pytest.raises(ValueError, match="expected at least one trial"):
        wilson(0, 0)


@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", [RewardModel, ValueModel])
def test_saved_and_loaded(llama: bool, kind: type, tmp_path: Path) -> None:
    model = kind(tiny.model(llama=llama), seed=2)
    ids, cu = torch.randint(260, (1, 20)), torch.tensor([0, 7, 20], dtype=torch.int32)
    if kind is RewardModel:
        model.normalise([[1], [2, 3], [4]], [[5, 6], [7], [8, 9]])
    model.save_folder(tmp_path, tiny.tokenizer())
    loaded = kind.from_folder(tmp_path)
    with torch.no_grad():
        assert torch.equal(model.scores(ids, cu), loaded.scores(ids, cu))
        some = torch.tensor([6, 9, 19])
        assert torch.equal(model.scores(ids, cu, some), model.scores(ids, cu)[:, some])
    if kind is RewardModel:
        assert float(loaded.std) != 1
        assert torch.equal(model.rewards([[1, 2]], [[3]]), loaded.rewards([[1, 2]], [[3]]))
    other = ValueModel if kind is RewardModel else RewardModel
    with pytest.raises(FormatError, match=f"expected a {other.kind} model's folder"):
        other.from_folder(tmp_path)


@pytest.mark.parametrize("llama", [False, True], ids=["gpt2", "llama"])
def test_transformers_reads_the_folder(llama: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = RewardModel(tiny.model(llama=llama), seed=2).eval()
    model.save_folder(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    sequence = [4, 8, 15, 16, 23, 42]
    with torch.no_grad():
        score = float(theirs(input_ids=torch.tensor([sequence])).logits)
    assert score == pytest.approx(scores_one_by_one(model, [sequence])[0], abs=1e-5)


def wide(seed: int, entries: int = 50, **more: Any) -> RewardModel:
    model = RewardModel(tiny.model(seed, **more), seed=seed, neighbours=entries)
    with torch.no_grad():
        table(model.neighbours).normal_(generator=torch.Generator().manual_seed(seed))
    return model


def table(layer: torch.nn.Module | None) -> torch.nn.Parameter:
    assert layer is not None and isinstance(layer.weight, torch.nn.Parameter)
    return layer.weight


@torch.no_grad()
def raw(model: RewardModel | RewardEnsemble, sequences: list[list[int]] | None = None) -> torch.Tensor:
    return model.raw(pack(SEQUENCES if sequences is None else sequences))


SEQUENCES = [[4, 8, 15, 16, 23, 42], [7], [1, 2, 3], [259, 0, 5, 5, 5]]


def test_a_wide_part_adds_its_neighbours_numbers() -> None:
    model = wide(3).eval()
    numbers = table(model.neighbours)[:, 0].tolist()
    deep = copy.deepcopy(model)
    deep.neighbours = None
    expected = []
    for sequence in SEQUENCES:
        hashes = [(1_000_003 * a + 7_919 * b) % 50 for a, b in pairwise([0, *sequence])]
        expected.append(2 * sum(numbers[h] for h in hashes))
    assert (raw(model) - raw(deep)).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(raw(model), torch.cat([raw(model, [s]) for s in SEQUENCES]))
    assert torch.equal(raw(model), raw(model, SEQUENCES[::-1]).flip(0))


def test_a_wide_part_is_learnt() -> None:
    model = wide(1).eval()
    model.raw(pack([[1, 2], [1, 2, 1, 2]])).sum().backward()
    expected = torch.zeros(50, 1)
    for a, b in ((0, 1), (1, 2), (0, 1), (1, 2), (2, 1), (1, 2)):
        expected[(1_000_003 * a + 7_919 * b) % 50] += 2
    found = table(model.neighbours).grad
    assert found is not None and torch.equal(found, expected)
    dropped = RewardModel(tiny.model(dropout=0.5), neighbours=50)
    with torch.no_grad():
        table(dropped.neighbours).fill_(1)
        table(dropped.score).zero_()
    total = float(raw(dropped.train(), [[1] * 20]))
    assert total != 40 and total % 4 == 0


def test_a_wide_model_is_saved(tmp_path: Path) -> None:
    model = wide(2).eval()
    model.save_folder(tmp_path, tiny.tokenizer())
    loaded = read_reward(tmp_path)
    assert torch.equal(raw(loaded), raw(model))
    config = json.loads((tmp_path / "config.json").read_text())
    for entries in (-1, 1 << 40, "many", True, 49):
        config[OURS]["neighbours"] = entries
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match="expected neighbours"):
            read_reward(tmp_path)
    del config[OURS]["neighbours"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"expected no tensor neighbours\.weight"):
        read_reward(tmp_path)
    with pytest.raises(ValueError, match="expected neighbours of at least 0, got -1"):
        RewardModel(tiny.model(), neighbours=-1)


def test_an_ensemble_is_the_mean(tmp_path: Path) -> None:
    models = [wide(1), wide(2), RewardModel(tiny.model(3), seed=3)]
    ensemble = RewardEnsemble(models)
    single = torch.stack([raw(m.eval()) for m in models])
    with torch.no_grad():
        assert torch.equal(ensemble.each([pack(SEQUENCES)] * 3), single)
    assert torch.equal(raw(ensemble), single.mean(0))
    prompts, answers = [[1], [2, 3], [4]], [[5, 6], [7], [8, 9]]
    ensemble.normalise(prompts, answers)
    rewards = ensemble.rewards(prompts, answers)
    again, doubts = ensemble.judged(prompts, answers)
    each = torch.stack([m.rewards(prompts, answers) for m in models])  # mean 0, deviation 1: as they are
    assert torch.equal(again, rewards) and doubts.shape == (3,)
    torch.testing.assert_close(doubts, (each.var(0, correction=0)).sqrt() / ensemble.std)
    assert not models[0].judged(prompts, answers)[1].any()
    assert float(rewards.mean()) == pytest.approx(0, abs=1e-6) and float(rewards.std()) == pytest.approx(1, abs=1e-6)
    ensemble.save_folder(tmp_path / "model", tiny.tokenizer())
    loaded = read_reward(tmp_path / "model")
    assert isinstance(loaded, RewardEnsemble) and torch.equal(loaded.rewards(prompts, answers), rewards)
    assert torch.equal(raw(read_reward(tmp_path / "model" / "1")), single[1])
    value = ValueModel.from_reward(loaded)
    assert torch.equal(table(value.score), table(models[0].score) / loaded.std)


def test_what_is_no_ensemble(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected at least 2 models of one vocabulary, got 1"):
        RewardEnsemble([RewardModel(tiny.model())])
    RewardEnsemble([wide(1), wide(2)]).save_folder(tmp_path)
    (tmp_path / "1" / "config.json").unlink()
    with pytest.raises(FormatError):
        read_reward(tmp_path)
    for content in ("{}", '{"members": 1}', '{"members": 1000000000}', '{"members": "2"}', "[", '{"members": 2.5}'):
        (tmp_path / "ensemble.json").write_text(content)
        with pytest.raises(FormatError):
            read_reward(tmp_path)


def test_members_learn_by_themselves() -> None:
    """Without dropout or hidden tokens each member's gradient is that of its own training, over their number."""
    answers = [Answer(tiny.user("say"), f"the cat {i} sat", float(i % 5)) for i in range(12)]
    alone, together = [wide(1), wide(2)], [wide(1), wide(2)]
    config = RankedConfig(batch_size=8, steps=1, centring=0.1, **QUIET)

    def gradients(model: RewardModel | RewardEnsemble) -> list[torch.Tensor]:
        stage = Ranked(config, model, tiny.tokenizer(), answers)
        stage.orders = stage.orders[:1] * model.members
        stage.step(0, AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0))
        return [p.grad for p in model.parameters() if p.grad is not None]

    single = [g for model in alone for g in gradients(model)]
    both = gradients(RewardEnsemble(together))
    assert len(single) == len(both)
    for a, b in zip(single, both):
        torch.testing.assert_close(a / 2, b, rtol=1e-5, atol=1e-8)


def test_a_value_model_starts_as_the_reward_model() -> None:
    reward = RewardModel(tiny.model(), seed=4)
    reward.normalise([[1], [2, 3], [4]], [[5, 6], [7], [8, 9]])
    value = ValueModel.from_reward(reward)
    sequence = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        found = value.scores(sequence, torch.tensor([0, 5], dtype=torch.int32))[0, -1]
    assert float(found) == pytest.approx(float(reward.rewards([[3, 1, 4]], [[1, 5]])), abs=1e-5)
    assert value.backbone is not reward.backbone


# --- answers as tokens, and rewards that are callables


def test_an_answer_is_what_the_template_puts_behind_the_open_turn() -> None:
    tokens = tiny.tokenizer()
    prompt = tiny.user("Hi")
    whole = tokens.apply_chat_template([*prompt, {"role": "assistant", "content": "Yes"}], add_generation_prompt=False)
    assert prompt_ids(prompt, tokens) + completion_ids(prompt, "Yes", tokens) == whole
    assert completion_ids(prompt, "Yes", tokens)[-1] == tokens.eos_id
    forged = completion_ids(prompt, "<|end|>", tokens)
    assert sum(i == tokens.eos_id for i in forged) == 1 and forged[-1] == tokens.eos_id
    assert prompt_ids("Hi", tokens) == prompt_ids(prompt, tokens)
    assert prompt_ids([1, 2, 3], None) == [1, 2, 3]
    assert messages_of("Hi") == prompt
    with pytest.raises(ValueError, match="expected prompts as token ids where there is no tokenizer"):
        prompt_ids("Hi", None)


def test_a_reward_by_name() -> None:
    assert reward_function("tests.train.tiny:share_of_e") is tiny.share_of_e
    assert call_reward(tiny.share_of_e, [tiny.user("x")] * 2, ["eeab", ""]) == [0.5, 0.0]
    for wrong in ("tests.train.tiny", "tests.train.tiny:nothing", "no.such.module:f", "tests.train.tiny:SPECIAL"):
        with pytest.raises(ValueError, match="expected"):
            reward_function(wrong)
    with pytest.raises(ValueError, match="expected 1 rewards, one for each response, got 2"):
        call_reward(lambda p, r: [0.0, 1.0], [[]], ["a"])
    with pytest.raises(ValueError, match="expected finite rewards, got nan"):
        call_reward(lambda p, r: [math.nan], [[]], ["a"])


def test_sums_that_can_be_checked() -> None:
    prompts = arithmetic_prompts(50, seed=3, largest=20, operations="+-*", languages=("en", "zh"))
    assert prompts == arithmetic_prompts(50, seed=3, largest=20, operations="+-*", languages=("en", "zh"))
    assert prompts != arithmetic_prompts(50, seed=4, largest=20, operations="+-*", languages=("en", "zh"))
    for prompt in prompts:
        question = prompt[-1]["content"]
        sum_ = question.removeprefix("What is ").removesuffix("?").removesuffix(" 等于多少？")
        assert arithmetic_answer(prompt) == eval(sum_) >= 0
    right = [f"It is {arithmetic_answer(p)}." for p in prompts]
    assert arithmetic_reward(prompts, right) == [1.0] * 50
    assert arithmetic_reward([tiny.user("What is 3 + 4?")] * 4, ["8", "none", "77", "3 + 4 = 7"]) == [0.1, 0, 0.1, 1]
    assert arithmetic_reward([tiny.user("What is 3 + 4?")], ["9" * 10_000]) == [0.1]
    with pytest.raises(ValueError, match="expected a question with a sum"):
        arithmetic_answer(tiny.user("Hello"))
    with pytest.raises(ValueError, match="expected operations among"):
        arithmetic_prompts(1, operations="/")


def test_pairs_that_do_not_fit_are_left_out() -> None:
    long = tiny.Preferred(tiny.user("a" * 200), "A", "a")
    stage = Reward(RewardConfig(**QUIET), RewardModel(tiny.model()), tiny.tokenizer(), [long, *tiny.pairs(3)])
    assert len(stage.pairs) == 3
    with pytest.raises(ValueError, match="expected pairs of answers within 96 tokens, got none among 1"):
        Reward(RewardConfig(**QUIET), RewardModel(tiny.model()), tiny.tokenizer(), [long])


def test_hidden_tokens() -> None:
    """About the share that was asked for becomes padding, marks never; the same step hides the same."""
    tokenizer = tiny.tokenizer()
    answers = [
        Answer(p.prompt, text, score) for p in tiny.pairs(12) for text, score in ((p.chosen, 1.0), (p.rejected, -1.0))
    ]
    stages = [
        Ranked(
            RankedConfig(batch_size=24, hidden_tokens=share, **QUIET),
            RewardModel(tiny.model(), seed=1),
            tokenizer,
            answers,
        )
        for share in (0.0, 0.5, 0.5)
    ]
    packed = pack(stages[1].sequences)
    assert stages[0]._hide(packed) is packed
    torch.manual_seed(0)
    hidden = stages[1]._hide(packed)
    changed = hidden.ids != packed.ids
    marks = torch.isin(packed.ids, torch.tensor(sorted(tokenizer.special_ids)))
    assert not (changed & marks).any() and (hidden.ids[changed] == stages[1].hidden_id).all()
    n, p = int((~marks).sum()), float(changed.sum())
    assert n > 100 and abs(p - n / 2) < 5 * math.sqrt(n) / 2
    optimizers = [AdamW(stage.model.parameters(), lr=1e-3) for stage in stages]
    losses = [stage.step(1, optimizer)["loss"] for stage, optimizer in zip(stages, optimizers)]
    assert losses[1] == losses[2] != losses[0]


def test_a_part_of_an_answer_says_less() -> None:
    """About the share that was asked for: a run of the text's tokens between the prompt and the marks at the end, whose
    rating is as much nearer to the mean as the run is shorter. The answers themselves stay whole."""
    answers = [Answer(tiny.user("say"), "abcdefgh" * (i % 3 + 1) + "xyz", float(i % 7)) for i in range(60)]
    config = RankedConfig(batch_size=60, fragments=0.4, **QUIET)
    stage = Ranked(config, RewardEnsemble([wide(1), wide(2)]), tiny.tokenizer(), answers)
    rows = [list(range(60)), list(range(59, -1, -1))]
    whole = [list(s) for s in stage.sequences]

    def cut(step: int) -> tuple[list[list[list[int]]], torch.Tensor]:
        sequences = [[stage.sequences[i] for i in mine] for mine in rows]
        ratings = stage.ratings[torch.tensor(rows)]
        stage._cut(step, rows, sequences, ratings)
        return sequences, ratings

    sequences, ratings = cut(3)
    again, once_more = cut(3)
    assert again == sequences and torch.equal(once_more, ratings) and cut(4)[0] != sequences
    assert stage.sequences == whole
    marks, mean, cuts = stage.tokenizer.special_ids, float(stage.ratings.mean()), 0
    for mine, found, rated in zip(rows, sequences, ratings.tolist()):
        for i, sequence, rating in zip(mine, found, rated):
            begin = len(prompt_ids(answers[i].prompt, stage.tokenizer))
            end = max(k for k, id in enumerate(whole[i]) if id not in marks) + 1
            assert sequence[:begin] == whole[i][:begin] and end < len(whole[i])
            part = sequence[begin : len(sequence) - (len(whole[i]) - end)]
            assert sequence[begin + len(part) :] == whole[i][end:]
            assert any(whole[i][k : k + len(part)] == part for k in range(begin, end)) and part
            assert rating == pytest.approx(mean + (answers[i].score - mean) * len(part) / (end - begin), abs=1e-6)
            cuts += len(part) < end - begin
    assert abs(cuts - 48) < 5 * math.sqrt(120 * 0.4 * 0.6)
