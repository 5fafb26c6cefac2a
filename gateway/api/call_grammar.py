"""Grammars that hold a model to the form of its calls and their arguments to the functions' schemas.

Used where a call must be made, and under `auto` where some function is `strict`: text is free then, and a call that
begins is held to its schema. A model that thinks may think first.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fleet.grammar import inline_schema
from fleet.types import Grammar, GrammarKind
from gateway.api.constraints import checked, schema_grammar
from gateway.api.requests import FunctionTool
from gateway.api.tools import ToolUse
from gateway.text import call_syntax
from gateway.text.card import ModelCard
from gateway.text.message_syntax import THINK, THINK_END, CallFormat

_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


async def call_grammar(use: ToolUse, card: ModelCard, content: Grammar | None, *, thinking: bool) -> Grammar | None:
    """The grammar of a whole output: calls, and where none need be made, `content` or any text.

    Without need of one it is `content` itself; so it is for a form other than JSON, which has room for neither calls
    nor reasoning. Raises: InvalidRequest naming the schema that cannot be served.
    """
    must, may = use.mode == "required", use.mode != "none"
    strict = any(function.strict for function in use.functions.values())
    has_json = content is not None and content.kind is GrammarKind.JSON_SCHEMA
    if not (must or (strict and content is None) or (has_json and (may or card.syntax.thinks))):
        return content
    rules = _CallRules(card, await _schemas(use, enforced=must), parallel=use.parallel)
    lines = rules.lines() if may else []
    if must:
        body = rules.forced()
    elif content is None:
        body = rules.beside_text()
        lines += rules.text_lines()
    else:
        body = f"(answer | {rules.forced()})" if may else "answer"
        lines.append(f"answer: {inline_schema(msgspec.json.decode(content.source))}")
    reasoning = ""
    if card.syntax.thinks:
        reasoning = "reasoning " if thinking else "reasoning? "
        lines += rules.reasoning_lines(opened=thinking)
    param = "tools" if may else "response_format"
    return await checked(Grammar(GrammarKind.LARK, "\n".join([f"start: {reasoning}{body}", *lines])), param=param)


async def _schemas(use: ToolUse, *, enforced: bool) -> dict[str, dict[str, Any]]:
    """Schemas of all arguments: the functions' own where they are to be kept, else any object."""
    places = use.places()
    schemas = {}
    for name, function in use.functions.items():
        schemas[name] = _schema(function, enforced=enforced or bool(function.strict))
        await schema_grammar(schemas[name], param=f"tools[{places[name]}].function.parameters")
    return schemas


def _schema(function: FunctionTool, *, enforced: bool) -> dict[str, Any]:
    if not enforced:
        return _ANY_ARGUMENTS
    if function.parameters is None:
        return _NO_ARGUMENTS
    return {"type": "object", **function.parameters}


class _CallRules:
    """Lark rules of one model for calls of some functions: `calls` is all that follows the first marker."""

    def __init__(self, card: ModelCard, schemas: dict[str, dict[str, Any]], *, parallel: bool) -> None:
        self._card = card
        self._schemas = schemas
        self._parallel = parallel
        self._lists = card.syntax.calls is CallFormat.MISTRAL and not card.syntax.names_first
        self._opening = {CallFormat.MISTRAL: call_syntax.TOOL_CALLS, CallFormat.HERMES: call_syntax.TOOL_CALL}.get(
            card.syntax.calls or CallFormat.LLAMA3, ""
        )

    def forced(self) -> str:
        """Calls and nothing else."""
        return f"({self._marker(self._opening)} calls)" if self._opening else "calls"

    def beside_text(self) -> str:
        """Text, or calls after text or none. Text ends where the marker begins, since lexers do not look back."""
        if not self._opening:
            return "(TEXT | calls)"
        if self._is_token(self._opening):
            return f"(TEXT | TEXT? {self._marker(self._opening)} calls)"
        return "(TEXT | before calls)"

    def text_lines(self) -> list[str]:
        """Rules of text in which no call begins, and of what comes before one, marker included."""
        if not self._opening:
            tag = _escaped(call_syntax.PYTHON_TAG)
            return [rf"TEXT: /[^{{\s](.|\n)*/ & ~/(.|\n)*{tag}(.|\n)*/"]
        marker = _escaped(self._opening)
        lines = [rf"TEXT: /(.|\n)+/ & ~/(.|\n)*{marker}(.|\n)*/"]
        return lines if self._is_token(self._opening) else [*lines, rf"before[lazy]: /(.|\n)*{marker}/"]

    def reasoning_lines(self, *, opened: bool) -> list[str]:
        """Rule `reasoning`, from its opening on unless that stands in the prompt, with the white space after it."""
        if self._is_token(THINK_END):
            start = "" if opened else f"/\\s*/ {self._marker(THINK)}"
            return [rf"reasoning: {start} THOUGHT? {self._marker(THINK_END)} /\s*/", r"THOUGHT: /(.|\n)+/"]
        start = "" if opened else rf"\s*{_escaped(THINK)}"
        return [r"reasoning: thought /\s*/", rf"thought[lazy]: /{start}(.|\n)*{_escaped(THINK_END)}/"]

    def lines(self) -> list[str]:
        """Rules `calls` and `call`."""
        calls = " | ".join(self._call(name, schema) for name, schema in self._schemas.items())
        return [f"calls: {self._calls()}", f"call: {calls}"]

    def _calls(self) -> str:
        if self._card.syntax.calls is CallFormat.HERMES:
            joint = _text(f"\n{call_syntax.TOOL_CALL}")
        elif self._card.syntax.calls is CallFormat.LLAMA3:
            joint = _text("; ")
        else:
            joint = _text(", ") if self._lists else self._marker(call_syntax.TOOL_CALLS)
        calls = f"call ({joint} call)*" if self._parallel else "call"
        return f'"[" {calls} "]"' if self._lists else calls

    def _call(self, name: str, schema: dict[str, Any]) -> str:
        value = inline_schema(schema)
        if self._card.syntax.calls is CallFormat.MISTRAL and not self._lists:
            return f"{_text(name)} {self._marker(call_syntax.ARGS)} {value}"
        key = "parameters" if self._card.syntax.calls is CallFormat.LLAMA3 else "arguments"
        before, after = f'{{"name": {_text(name)}, "{key}": ', "}"
        if self._card.syntax.calls is CallFormat.HERMES:
            before, after = f"\n{before}", f"}}\n{call_syntax.TOOL_CALL_END}"
        return f"{_text(before)} {value} {_text(after)}"

    def _is_token(self, marker: str) -> bool:
        return self._card.tokenizer.id_of(marker) in self._card.marker_ids

    def _marker(self, text: str) -> str:
        """A marker: as a token where the tokenizer has it as a control token, else as text."""
        return f"<[{self._card.tokenizer.id_of(text)}]>" if self._is_token(text) else _text(text)


def _text(text: str) -> str:
    """A Lark literal; Lark reads JSON's escapes."""
    return msgspec.json.encode(text).decode()


def _escaped(text: str) -> str:
    """A literal within a regular expression between slashes."""
    return "".join(f"\\{char}" if not char.isalnum() and char not in "<>_ " else char for char in text)
