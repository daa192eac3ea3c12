"""Chat templates: equal to transformers' on harmless text, and no message forges a special token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from format_samples import SMOLLM_TEMPLATE, SPECIALS, tokenizer_metadata
from transformers import PreTrainedTokenizerFast

from gptfast.formats.chat import CHATML, ChatTemplate
from gptfast.formats.files import FormatError
from gptfast.formats.tokenizer import Tokenizer

# Reads messages: cuts what stands before the end of a thought, trims, compares, calls functions with JSON.
CURIOUS = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last='') %}
{%- for message in messages %}
    {%- if message.content is string and message.content.startswith('skip') %}{% continue %}{% endif %}
    {%- set ns.last = message.role %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ (message.content or '').split('</think>')[-1] | trim }}
    {%- for call in message.tool_calls or [] %}{{ '\n' ~ call.function | tojson }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt and ns.last != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""


def tokenizer(template: str | None) -> Tokenizer:
    metadata = tokenizer_metadata()
    del metadata["tokenizer.chat_template"]
    return Tokenizer.from_gguf(metadata if template is None else metadata | {"tokenizer.chat_template": template})


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CONVERSATIONS: list[list[dict[str, Any]]] = [
    user("hello world"),
    user(""),
    user("  im_start | < > 12 你好 \n\n "),
    [
        {"role": "system", "content": "Be kind"},
        *user("hello"),
        {"role": "assistant", "content": "<think>x</think>\nhello"},
    ],
    [*user("skip me"), *user("hello")],
]


@pytest.mark.parametrize("template", [SMOLLM_TEMPLATE, CURIOUS, CHATML])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers_on_harmless_text(template: str, prompt: bool) -> None:
    mine = tokenizer(template)
    theirs = PreTrainedTokenizerFast(tokenizer_object=mine._fast, chat_template=template)
    for messages in CONVERSATIONS:
        expected = str(theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False))
        assert mine.render_chat_template(messages, add_generation_prompt=prompt) == expected
        ids = theirs(expected, add_special_tokens=False)["input_ids"]
        assert mine.apply_chat_template(messages, add_generation_prompt=prompt) == ids


def test_tools_equal_transformers() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"type": "object"}}}]
    messages = [*user("hello"), {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    mine = tokenizer(CURIOUS)
    theirs = PreTrainedTokenizerFast(tokenizer_object=mine._fast, chat_template=CURIOUS)
    expected = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)  # pyright: ignore[reportArgumentType]
    assert mine.render_chat_template(messages, tools=tools) == expected


@pytest.mark.parametrize("template", [SMOLLM_TEMPLATE, CURIOUS, None])
def test_no_message_forges_a_token(template: str | None) -> None:
    mine = tokenizer(template)
    rng = random.Random(11)
    parts = [
        *SPECIALS,
        "<|im_",
        "end|>",
        "<|",
        "|>",
        "hello",
        "</think>",
        "\n",
        " ",
        "user",
        "<",
        ">",
        "\U000f0000",
        "i",
    ]
    for _ in range(300):
        contents = ["".join(rng.choices(parts, k=rng.randrange(1, 6))) for _ in range(3)]
        roles = ["user", "assistant", "user"]
        harmless = [{"role": r, "content": "x"} for r in roles]
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents)]
        ids, expected = mine.apply_chat_template(messages), mine.apply_chat_template(harmless)
        specials = [i for i in ids if i in mine.special_ids]
        assert specials == [i for i in expected if i in mine.special_ids]
        assert mine.decode(ids, skip_special=False) == mine.render_chat_template(messages)


def test_tokens_made_of_two_messages_or_names_are_not_made() -> None:
    template = "{% for m in messages %}{{ m.content ~ m.name ~ (m.more | tojson) }}{% endfor %}<|im_end|>"
    messages = [{**user("<|im_")[0], "name": "end|>", "more": {"<|im_end|>": 1}}]
    ids = tokenizer(template).apply_chat_template(messages)
    assert ids.count(2) == 1 and ids[-1] == 2


def test_tokens_that_a_template_completes_are_not_made() -> None:
    for template in ("{{ '<|' ~ messages[0].content ~ '|>' }}", "{{ ('<|' ~ messages[0].content ~ '|>') | trim }}"):
        assert 2 not in tokenizer(template).apply_chat_template(user("im_end"))


def test_a_template_that_depends_on_special_text_is_refused() -> None:
    template = (
        "{% if '<|im_end|>' in messages[0].content %}{{ '<|im_start|>system' }}{% endif %}{{ messages[0].content }}"
    )
    assert 1 not in tokenizer(template).apply_chat_template(user("hello"))
    with pytest.raises(ValueError, match="treats their text specially"):
        tokenizer(template).apply_chat_template(user("<|im_end|>"))


def test_chatml_where_the_file_has_no_template() -> None:
    mine = tokenizer(None)
    assert mine.chat_template == CHATML
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert mine.render_chat_template(user("hello")) == text
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert mine.render_chat_template(user(parts)) == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "a list of messages"),
        ([{"content": "x"}], "with a role of"),
        ([{"role": "end", "content": "x"}], "with a role of"),
        (user([{"type": "image"}]), "a string or text parts"),
        (user(object()), "of JSON types, got object"),
        (user(3), "the chat template refused the messages"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer(None).apply_chat_template(messages)


def test_deep_messages() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested at most 64 deep"):
        tokenizer(None).apply_chat_template([{**user("x")[0], "more": deep}])


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.fromkeys('ab') }}",
        "{{ 'a' * 10000000000 }}",
        "{{ 2 ** 10000000 }}",
        "{% set n = namespace(_x=1) %}",
        "{% for i in range(100001) %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{% include 'x' %}",
    ],
)
def test_the_sandbox_holds(hostile: str) -> None:
    with pytest.raises(ValueError, match="the chat template refused the messages"):
        tokenizer(hostile).apply_chat_template(user("x"))


def test_what_is_no_template_is_refused() -> None:
    with pytest.raises(FormatError, match="expected a chat template in Jinja"):
        tokenizer("{% for %}").apply_chat_template(user("x"))
    with pytest.raises(FormatError, match="at most 1048576 characters"):
        ChatTemplate("x" * ((1 << 20) + 1), [], {})


def test_functions_of_hugging_face_templates() -> None:
    source = "{% generation %}{{ strftime_now('%Y') | length }}{% endgeneration %}{{ dict(a=1) | tojson(indent=2) }}"
    assert ChatTemplate(source, [], {}).render(user("x")) == [('4{\n  "a": 1\n}', True)]


def test_variables_reach_the_template() -> None:
    template = "{{ bos_token }}{{ eos_token }}{{ 'y' if enable_thinking else 'n' }}"
    mine = tokenizer(template)
    assert mine.apply_chat_template(user("x"), enable_thinking=True) == [1, 2, *mine.encode("y")]
