"""Chat templates: Jinja programs from model files, rendered in a sandbox so that no message can forge a special token.

A template is text from a stranger, and so are the messages. The template may write special tokens; a message that
contains the characters of one gets those characters, not the token. To know who wrote what, the conversation is
rendered twice: as it is, and with the messages' characters replaced by private-use ones. Where both renderings say the
same, the second shows which characters came from messages. A template that looks into messages (to cut out reasoning,
say) can make them differ; then only those parts of messages that could be part of a special token are replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from gptfast.formats.extras import need
from gptfast.formats.files import FormatError

MAX_TEMPLATE = 1 << 20  # characters
MAX_RENDERED = 64 << 20  # characters
MAX_OPERAND = 1 << 20  # elements of a repeated sequence, bits of a product
MAX_DEPTH = 64  # objects in objects in messages and tools
# Templates put a role between the marks of special tokens ("<|" + role + "|>"), so a role is one of these and no other.
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "model")
PRIVATE_BLOCK = 0x1000  # characters of Unicode's private planes that stand for hidden ones
PRIVATE_BLOCKS = range(0xF0000 // PRIVATE_BLOCK, 0x10F000 // PRIVATE_BLOCK)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **options: Any) -> str:
    """JSON without HTML escapes, as Hugging Face's templates expect."""
    sort_keys = bool(options.get("sort_keys", False))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _result_size(operator: str, left: Any, right: Any) -> int:
    """The length of a repeated string or list, or the bits of a product or power of whole numbers; 0 for others."""
    for sequence, count in ((left, right), (right, left)):
        if hasattr(sequence, "__len__") and isinstance(count, int):
            return len(sequence) * count
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
    return 0


def _environment() -> Any:
    """Hugging Face's template environment: immutable sandbox, trimmed blocks, loop controls, a few functions."""
    jinja2 = need("jinja2", "models")
    sandbox, extension = need("jinja2.sandbox", "models"), need("jinja2.ext", "models")
    if tuple(int(n) for n in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise ImportError(f"expected jinja2 3.1.6 or newer (older sandboxes leak), got {jinja2.__version__}")

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _result_size(operator, left, right) > MAX_OPERAND:
                raise jinja2.exceptions.SecurityError(f"an operand of {operator} is too large")
            return super().call_binop(context, operator, left, right)

    class Generation(extension.Extension):
        """`{% generation %}` marks what the assistant wrote, for training masks; rendering ignores the marks."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Namespace(jinja2.utils.Namespace):
        """Jinja's namespace without private names, through which templates could reach its insides."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no private names such as {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Any:
        made = Namespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, extension.loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=_strftime_now,
        namespace=namespace,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # a function: the class has methods that templates abuse
    )
    return environment


def _map_strings(value: Any, f: Callable[[str], str], key: Callable[[str], str], depth: int = 0) -> Any:
    """A copy made of plain JSON types alone, with f applied to each string and `key` to each name of an object."""
    if depth > MAX_DEPTH:
        raise ValueError(f"expected messages and tools nested at most {MAX_DEPTH} deep")
    if isinstance(value, str):
        return f(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {key(str(k)): _map_strings(v, f, key, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(v, f, key, depth + 1) for v in value]
    raise ValueError(f"expected messages and tools of JSON types, got {type(value).__name__}")


def _joined_text(content: Any) -> Any:
    """Content given as a list of text parts, as OpenAI's clients may, as one string."""
    if not isinstance(content, (list, tuple)):
        return content
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"expected content as a string or text parts, got {part!r:.80}")
    return "".join(part["text"] for part in content)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    checked = []
    if isinstance(messages, (str, Mapping)) or not messages:
        raise ValueError(f"expected a list of messages, at least one, got {messages!r:.80}")
    for message in messages:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ValueError(f"expected each message with a role of {', '.join(ROLES)}, got {message!r:.80}")
        checked.append({k: _joined_text(v) if k == "content" else v for k, v in message.items()})
    return checked


class ChatTemplate:
    """A compiled template and the special tokens that it, and only it, may write.

    Args:
        source: the Jinja text.
        specials: the special tokens' texts.
        variables: what else the template sees: bos_token, eos_token ...
        always_split: never hand out text to be parsed but single special tokens. For tokenizers that look for special
            tokens after changing the text, where a message may hold one in disguise.

    Raises:
        FormatError: not a template.
    """

    def __init__(
        self, source: str, specials: Iterable[str], variables: Mapping[str, str], *, always_split: bool = False
    ) -> None:
        if len(source) > MAX_TEMPLATE:
            raise FormatError(f"expected a chat template of at most {MAX_TEMPLATE} characters, got {len(source)}")
        try:
            self._template = _environment().from_string(source)
        except ImportError:
            raise
        except Exception as error:
            raise FormatError(f"expected a chat template in Jinja, got {error}") from None
        self.source, self.variables, self._always_split = source, dict(variables), always_split
        self.specials = sorted((s for s in specials if s), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")
        self._alphabet = sorted({c for s in self.specials for c in s if not c.isspace()})
        if len(self._alphabet) > PRIVATE_BLOCK:
            raise FormatError(f"expected special tokens of at most {PRIVATE_BLOCK} different characters")
        # A message's names are the same few each time, and took half of a rendering's time.
        self._hidden_name = lru_cache(256)(lambda name, block: self._hide_suspects(name, self._hiding(block)))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[tuple[str, bool]]:
        """The conversation as pieces (text, may be parsed for special tokens).

        One piece that may be parsed, where no message holds a special token's text. Otherwise each piece that may be
        parsed is exactly one special token, and all others are to be encoded as plain text.

        Raises:
            ValueError: messages of the wrong form, or such that the template refuses.
        """
        checked = _check_messages(messages)

        def run(f: Callable[[str], str], key: Callable[[str], str]) -> str:
            conversation = [{**_map_strings(m, f, key), "role": m["role"]} for m in checked]
            return self._run(conversation, _map_strings(tools, f, key), add_generation_prompt, variables)

        text = run(str, str)
        used = {ord(c) // PRIVATE_BLOCK for c in set(text)}
        free = next((block for block in PRIVATE_BLOCKS if block not in used), None)
        if free is None:
            raise ValueError("expected messages that leave some private-use characters unused")
        hide = self._hiding(free)
        show = {ord(hidden): chr(c) for c, hidden in hide.items()}

        def hide_all(s: str) -> str:
            return s.translate(hide)

        def hide_suspects(s: str) -> str:
            return self._hide_suspects(s, hide)

        for f in (hide_all, hide_suspects):
            try:
                marked = run(f, lambda name: self._hidden_name(name, free))
            except ValueError:
                continue
            if marked.translate(show) == text:
                return self._pieces(text, marked)
        raise ValueError("expected messages without special tokens: this chat template treats their text specially")

    def _run(self, messages: Any, tools: Any, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        values = {**self.variables, "tools": tools, "add_generation_prompt": add_generation_prompt, **variables}
        try:
            pieces: list[str] = []
            total = 0
            for piece in self._template.generate(messages=messages, **values):
                pieces.append(piece)
                total += len(piece)
                if total > MAX_RENDERED:
                    raise ValueError(f"it wrote more than {MAX_RENDERED} characters")
            return "".join(pieces)
        except Exception as error:
            raise ValueError(f"the chat template refused the messages: {error}") from None

    def _hiding(self, block: int) -> dict[int, str]:
        """The special tokens' characters, and what stands for each in a block of private ones."""
        return {ord(c): chr(block * PRIVATE_BLOCK + i) for i, c in enumerate(self._alphabet)}

    def _hide_suspects(self, text: str, hide: Mapping[int, str]) -> str:
        """Hides what is a special token, and what would become one with text before or after it."""
        for special in self.specials:
            if text in special:
                return text.translate(hide)
        text = self._pattern.sub(lambda match: match[0].translate(hide), text)
        for special in self.specials:
            for n in range(len(special) - 1, 0, -1):
                if text.endswith(special[:n]):
                    text = text[:-n] + text[-n:].translate(hide)
                if text.startswith(special[-n:]):
                    text = text[:n].translate(hide) + text[n:]
        return text

    def _pieces(self, text: str, marked: str) -> list[tuple[str, bool]]:
        genuine = [match.span() for match in self._pattern.finditer(marked)]
        if not self._always_split and genuine == [match.span() for match in self._pattern.finditer(text)]:
            return [(text, True)]
        pieces, at = [], 0
        for start, end in genuine:
            pieces += [(text[at:start], False), (text[start:end], True)]
            at = end
        pieces.append((text[at:], False))
        return [(piece, special) for piece, special in pieces if piece]
