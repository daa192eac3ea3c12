"""Independent judges of what a model writes. They are never the reward: a gain that they see too was not gamed.

Sentiment: VADER's rule for English, a list of words for Chinese. NaiveBayes is the baseline that a reward model,
trained on the same ratings, must beat. Diversity: distinct-n.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.train.data.packages import PACKAGES, files
from gptfast.train.data.types import Preference, Rated

Judge = Callable[[str], float]  # above 0: the text is positive


class Share(NamedTuple):
    """A share of n with its 95% confidence interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    n: int


def share(right: float, n: int) -> Share:
    """The share `right / n`; a tie may count half. Raises ValueError without cases."""
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"expected a share of at least one case, got {right} of {n}")
    z = 1.959964
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = 0.0 if not right else middle - reach, 1.0 if right == n else middle + reach
    return Share(p, low, high, n)


def pairwise_accuracy(judge: Judge, pairs: Iterable[Preference]) -> Share:
    """How often the judge gives the text that people liked better the higher score; a tie is half right.

    The interval holds for pairs that share no text, as validation pairs of `preferences` do.
    """
    right, n = 0.0, 0
    for pair in pairs:
        a, b = judge(pair.chosen), judge(pair.rejected)
        right += 1.0 if a > b else 0.5 if a == b else 0.0
        n += 1
    return share(right, n)


class Ranking(NamedTuple):
    """The share of n pairs in the right order, or the difference of two such shares, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


RESAMPLES = 2000


def ranking(
    scores: Sequence[float], ratings: Sequence[float], against: Sequence[float] | None = None, least: float = 1.0
) -> Ranking:
    """How often of two texts whose ratings are at least `least` apart the better one has the higher score, over all
    such pairs; a tie is half right. With `against`, how much more often than by those scores.

    Pairs share texts, so the interval comes from drawing the texts anew, with replacement (the percentile bootstrap:
    Efron and Tibshirani 1993, chapter 13). Two judges are compared on the same draws. Raises ValueError where the
    lengths differ or no pair is that far apart.
    """
    given = [scores, ratings, *([against] if against is not None else [])]
    if len({len(column) for column in given}) > 1:
        raise ValueError(f"ranking: expected as many scores as ratings, got {[len(column) for column in given]}")
    rated = torch.tensor(ratings, dtype=torch.float64)
    apart = (rated[:, None] - rated[None] >= least).double()
    if not apart.any():
        raise ValueError(f"ranking: expected ratings at least {least} apart, got none among {len(rated)}")
    right = _in_order(scores) * apart
    if against is not None:
        right -= _in_order(against) * apart
    drawn = torch.randint(len(rated), (RESAMPLES, len(rated)), generator=torch.Generator().manual_seed(0))
    times = torch.zeros(RESAMPLES, len(rated), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    pairs = ((times @ apart) * times).sum(1)
    shares = (((times @ right) * times).sum(1) / pairs)[pairs > 0]
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ranking(float(right.sum() / apart.sum()), low, high, int(apart.sum()))


def _in_order(scores: Sequence[float]) -> Tensor:
    """1 where the row's score is above the column's, 1/2 where they are equal."""
    found = torch.tensor(scores, dtype=torch.float64)
    return (found[:, None] > found[None]).double() + (found[:, None] == found[None]).double() / 2


def positive_share(judge: Judge, texts: Sequence[str], least: float = 0.05) -> Share:
    """The share of texts whose score is at least `least` (VADER's own bound)."""
    return share(sum(judge(text) >= least for text in texts), len(texts))


def words(text: str) -> list[str]:
    """Lower-case words; each Chinese character by itself; punctuation marks too, which carry sentiment."""
    return re.findall(r"[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+(?:['’][^\W_]+)*|[^\w\s]", text.lower())


def distinct(texts: Iterable[str], n: int) -> float:
    """Different n-grams of words over all n-grams (Li et al. 2016); 0 where there are none."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        found = words(text)
        grams.update(zip(*(found[i:] for i in range(n))))
    return len(grams) / total if (total := grams.total()) else 0.0


class NaiveBayes:
    """Multinomial naive Bayes on the words and pairs of words of rated texts: good (above 0) against bad (below).

    A call gives the log-odds of good for a text; 0 is undecided, for both are taken to be as frequent. Counts get
    `smoothing` more.
    """

    def __init__(self, texts: Iterable[Rated], smoothing: float = 1.0) -> None:
        """Raises ValueError unless both good and bad texts are there."""
        counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
        for text in texts:
            if text.score:
                counts[text.score > 0].update(_features(text.text))
        if not counts[True] or not counts[False]:
            raise ValueError("expected texts with ratings above and below 0, got only one of them")
        vocabulary = counts[True].keys() | counts[False].keys()
        total = {side: sum(found.values()) + smoothing * len(vocabulary) for side, found in counts.items()}
        base = math.log(total[False] / total[True])
        self._weights = {
            word: math.log((counts[True][word] + smoothing) / (counts[False][word] + smoothing)) + base
            for word in vocabulary
        }

    def __call__(self, text: str) -> float:
        return sum(self._weights.get(feature, 0.0) for feature in _features(text))


def _features(text: str) -> set[str]:
    """Words and pairs of neighbours, each once: how often a word stands in a short text says little."""
    found = words(text)
    return {*found, *(f"{a} {b}" for a, b in pairwise(found))}


NEGATIONS, STRONGER, WEAKER = (
    frozenset(listed.split())
    for listed in (
        "no not never none nobody nothing nor neither nowhere without hardly rarely seldom cannot despite",
        "absolutely amazingly completely deeply enormously especially exceptionally extremely greatly highly hugely "
        "incredibly intensely more most particularly quite really remarkably so thoroughly totally truly unbelievably "
        "utterly very",
        "almost barely kinda less little marginally occasionally partly scarcely slightly somewhat",
    )
)


class Vader:
    """VADER, a rule of thumb about the words of a lexicon that people rated (Hutto & Gilbert, ICWSM 2014).

    Each word of the lexicon has a mean rating v. It grows by .733 in capitals among small letters; by .293 after a word
    that strengthens, and shrinks after one that weakens (less with each word between: x .95, x .9); it becomes -.74 v
    after a negation among the three words before. What stands before "but" counts half, what follows 1.5 times. Each of
    up to four exclamation marks adds .292. The sum s becomes s / sqrt(s^2 + 15), in (-1, 1).

    This is the paper's rule, written anew; its lists of idioms and emoji are left out.
    """

    def __init__(self, lexicon: str) -> None:
        """`lexicon`: a line for each word: the word, its mean rating, and more, apart by tabs."""
        self._valence = {}
        for line in lexicon.splitlines():
            word, _, rest = line.partition("\t")
            if rest:
                self._valence[word] = float(rest.split("\t", 1)[0])

    def __call__(self, text: str) -> float:
        tokens = [self._stripped(token) for token in text.split()]
        lower = [token.lower() for token in tokens]
        mixed = any(t.isupper() for t in tokens) and not all(t.isupper() for t in tokens)
        scores = [self._word(i, tokens, lower, mixed) for i in range(len(tokens))]
        if "but" in lower:
            at = lower.index("but")
            scores = [s * (0.5 if i < at else 1.5 if i > at else 1.0) for i, s in enumerate(scores)]
        total = sum(scores)
        emphasis = 0.292 * min(text.count("!"), 4)
        total += math.copysign(emphasis, total) if total else 0.0
        return total / math.sqrt(total * total + 15)

    def _stripped(self, token: str) -> str:
        """Without punctuation around it, unless it is an emoticon that the lexicon knows."""
        bare = token.strip("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”‘’…")
        return token if token in self._valence or len(bare) < 2 else bare

    def _word(self, i: int, tokens: list[str], lower: list[str], mixed: bool) -> float:
        valence = self._valence.get(lower[i], self._valence.get(tokens[i], 0.0))
        if not valence or lower[i] in STRONGER:
            return 0.0
        if mixed and tokens[i].isupper():
            valence += math.copysign(0.733, valence)
        for back, weight in ((1, 1.0), (2, 0.95), (3, 0.9)):
            before = lower[i - back] if i >= back else ""
            if before in self._valence:
                continue
            change = 0.293 * weight * ((before in STRONGER) - (before in WEAKER))
            valence += math.copysign(1.0, valence) * change
        if any(word in NEGATIONS or word.endswith(("n't", "n’t")) for word in lower[max(0, i - 3) : i]):
            valence *= -0.74
        return valence


class ChineseWords:
    """A list of Chinese words with a sentiment, found by the longest match from left to right.

    A word counts with its weight; one of 不没無无未别非 among the two characters before turns it over. The mean
    over the words found, in the list's own units (-1.9 to 1.9 in jionlp's); 0 where none is found.
    """

    NOT = frozenset("不没無无未别非")

    def __init__(self, lexicon: str) -> None:
        """`lexicon`: a line for each word: the word, a tab, its weight."""
        self._weight = {}
        for line in lexicon.splitlines():
            word, _, weight = line.strip().partition("\t")
            if word and weight:
                self._weight[word] = float(weight.split("\t")[0])
        self._longest = max(map(len, self._weight), default=0)

    def __call__(self, text: str) -> float:
        total, found, i = 0.0, 0, 0
        while i < len(text):
            lengths = range(min(self._longest, len(text) - i), 0, -1)
            n = next((n for n in lengths if text[i : i + n] in self._weight), 0)
            if n:
                negated = bool(self.NOT & set(text[max(0, i - 2) : i]))
                total += self._weight[text[i : i + n]] * (-1 if negated else 1)
                found += 1
            i += n or 1
        return total / found if found else 0.0


def vader() -> Vader:
    """VADER with its own lexicon. Raises FileNotFoundError where the package was not fetched."""
    kept = files(PACKAGES["vaderSentiment"])
    return Vader(next(data for path, data in kept.items() if path.endswith("vader_lexicon.txt")).decode())


def chinese_words() -> ChineseWords:
    """jionlp's sentiment words. Raises FileNotFoundError where it was not fetched (`gptfast data fetch jionlp`)."""
    (packed,) = files(PACKAGES["jionlp"]).values()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:  # its bytes are pinned
        return ChineseWords(archive.read("sentiment_words.txt").decode())
