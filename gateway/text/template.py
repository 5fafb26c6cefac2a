"""Chat templates: a conversation becomes text, in the jinja dialect that `transformers` defines.

The dialect: an immutable sandbox, `trim_blocks` and `lstrip_blocks`, loop controls, `tojson` without HTML escapes,
`raise_exception`, `strftime_now`, and a `generation` block that renders its body.
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gateway.errors import CardError, TemplateError
from gateway.text.control_marks import ControlMarks

PROBE = "Qx7probe"
TAIL = "Qx7tail"
Message = dict[str, Any]


class ChatTemplate:
    """One compiled template. Immutable; `render` may be called from any thread.

    Args:
        source: the template.
        special_tokens: `bos_token` and the like, visible to the template as variables.
        marks: how to keep look-alikes of control tokens apart.

    Attributes:
        source: as given.
        variables: names of what the template reads and does not define, `tools` and `enable_thinking` for instance.

    Raises:
        CardError: the template does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], marks: ControlMarks) -> None:
        try:
            environment = _environment()
            self._template = environment.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(environment.parse(source)))
        except jinja2.TemplateError as error:
            raise CardError(f"the chat template does not compile: {error}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._marks = marks
        accepts_string = self._accepts(PROBE)
        self._accepts_parts = self._accepts([{"type": "text", "text": PROBE}])
        self._wants_parts = self._accepts_parts and not accepts_string

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Render to pieces of text; a tokenizer must not read a token across two pieces.

        Joined, the pieces are what `transformers` renders. There is one piece unless the conversation contains
        text that looks like a special token. Keys of messages whose value is None are left out. `tools` are
        declarations of functions in OpenAI's form, `variables` the client's `chat_template_kwargs`. With
        `continue_final_message` the text ends where the content of the last message ends, so that a model goes on
        with it.

        Raises: TemplateError with the template's own message.
        """
        shaped = [self._shape(message) for message in messages]
        if continue_final_message:
            shaped[-1] = _with_tail(shaped[-1])
        try:
            (shaped, extra), marks = self._marks.protect([shaped, {**(variables or {}), "tools": tools}])
        except ValueError as error:
            raise TemplateError(str(error)) from error
        rendered = self._render(shaped, add_generation_prompt=add_generation_prompt, extra=extra)
        pieces = [rendered] if marks is None else marks.cut(rendered)
        return _until_tail(pieces) if continue_final_message else pieces

    def _render(self, messages: list[Message], *, add_generation_prompt: bool, extra: Mapping[str, Any]) -> str:
        variables: dict[str, Any] = {**self._special_tokens, "tools": None, "documents": None, **extra}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise TemplateError(error.message or type(error).__name__) from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise TemplateError(f"the chat template cannot render these messages: {error}") from error
        except RecursionError as error:
            raise TemplateError("the messages are nested too deeply") from error

    def _accepts(self, content: str | list[dict[str, str]]) -> bool:
        """Whether content of this form shows up as text, not as the list's own notation or letter by letter."""
        try:
            rendered = self._render([{"role": "user", "content": content}], add_generation_prompt=True, extra={})
        except TemplateError:
            return False
        return PROBE in rendered and "'type'" not in rendered and '"type"' not in rendered

    def _shape(self, message: Message) -> Message:
        """Drop None and give `content` the form that the template reads.

        Parts are joined with line breaks for a template that reads strings alone.
        """
        shaped = {key: value for key, value in message.items() if value is not None}
        content = shaped.get("content")
        if isinstance(content, list):
            texts = [part["text"] for part in content]
            if not self._accepts_parts:
                shaped["content"] = "\n".join(texts)
            elif len(texts) > 1 and self._marks.found_in("".join(texts)):
                shaped["content"] = [{"type": "text", "text": "".join(texts)}]  # no token from two halves
        elif isinstance(content, str) and self._wants_parts:
            shaped["content"] = [{"type": "text", "text": content}]
        return shaped


def _with_tail(message: Message) -> Message:
    """The message, with a mark where its content ends. Raises: TemplateError."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + TAIL}
    if isinstance(content, list):
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + TAIL}]}
    raise TemplateError("the last message has no text to go on with")


def _until_tail(pieces: list[str]) -> list[str]:
    """What comes before the mark of `_with_tail`. Raises: TemplateError."""
    for place in range(len(pieces) - 1, -1, -1):
        before, found, _ = pieces[place].rpartition(TAIL)
        if found:
            return [*pieces[:place], before]
    raise TemplateError("the chat template leaves the last message out, which cannot be gone on with then")


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks what a model wrote, for training; serving renders its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja declares it as an instance-typed attribute)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Replace the block by a scope around its body."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _SafeNamespace(Namespace):
    """A namespace that takes no names with a leading underscore, which the sandbox would not let be read."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template cannot store {name!r}")
        super().__setitem__(name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _SafeNamespace
    environment.globals["dict"] = _make_dict
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)  # noqa: DTZ005 (templates expect local time)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def pick_template(config: Mapping[str, Any], jinja_file: bytes | None, *, name: str = "default") -> str | None:
    """The template to use: `chat_template.jinja` first, else the one in `tokenizer_config.json`.

    Older files have several of them by name there, `default` and `tool_use`, say; of those `name` is returned.
    """
    if jinja_file is not None:
        return jinja_file.decode()
    template = config.get("chat_template")
    if isinstance(template, str):
        return template
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        chosen = named.get(name)
        return chosen if isinstance(chosen, str) else None
    return None
