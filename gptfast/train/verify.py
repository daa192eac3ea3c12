"""Rewards that can be checked: small sums, whose right answer is known."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from gptfast.train.packing import generator
from gptfast.train.prompts import Message

FORMS = {"en": "What is {a} {op} {b}?", "zh": "{a} {op} {b} 等于多少？"}
QUESTION = re.compile(r"(\d+) ([+\-*]) (\d+)")
NUMBER = re.compile(r"(?<!\d)-?\d+")


def arithmetic_prompts(
    count: int, seed: int = 0, *, largest: int = 9, operations: str = "+-", languages: Sequence[str] = ("en",)
) -> list[list[Message]]:
    """Questions such as "What is 3 + 4?", the languages in turns; a function of the arguments alone.

    largest     of the numbers, which begin at 0
    operations  any of + - *; a difference is never negative

    Raises ValueError for operations and languages that there aren't.
    """
    if not operations or set(operations) - set("+-*"):
        raise ValueError(f"arithmetic_prompts: expected operations among + - *, got {operations!r}")
    if not languages or set(languages) - set(FORMS):
        raise ValueError(f"arithmetic_prompts: expected languages among {', '.join(FORMS)}, got {list(languages)}")
    random = generator("arithmetic", seed)
    numbers = torch.randint(largest + 1, (count, 2), generator=random).tolist()
    which = torch.randint(len(operations), (count,), generator=random).tolist()
    found: list[list[Message]] = []
    for i, ((a, b), w) in enumerate(zip(numbers, which)):
        op = operations[w]
        a, b = (max(a, b), min(a, b)) if op == "-" else (a, b)
        form = FORMS[languages[i % len(languages)]]
        found.append([{"role": "user", "content": form.format(a=a, op=op, b=b)}])
    return found


def arithmetic_answer(prompt: Sequence[Message]) -> int:
    """The right answer. Raises ValueError where the last message asks for nothing that arithmetic_prompts would."""
    match = QUESTION.search(prompt[-1]["content"])
    if match is None:
        raise ValueError(f"expected a question with a sum such as 3 + 4, got {prompt[-1]['content']!r:.80}")
    a, b = int(match[1]), int(match[3])
    return a + b if match[2] == "+" else a - b if match[2] == "-" else a * b


def arithmetic_reward(prompts: list[list[Message]], responses: list[str]) -> list[float]:
    """1 where the last number in a response is the right answer, 0.1 where it is another number, else 0."""
    found = []
    for prompt, response in zip(prompts, responses):
        numbers = NUMBER.findall(response)
        right = numbers and len(numbers[-1]) < 30 and int(numbers[-1]) == arithmetic_answer(prompt)
        found.append(1.0 if right else 0.1 if numbers else 0.0)
    return found
