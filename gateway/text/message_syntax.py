"""Which syntax a model writes calls and reasoning in, found from its chat template."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

from gateway.text import call_syntax

THINK, THINK_END = "<think>", "</think>"


class CallFormat(enum.StrEnum):
    """Forms of calls; see `gateway.text.call_syntax`."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


class MessageSyntax(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's text may hold besides content.

    Attributes:
        calls: the form of its calls; None if it makes none or in a form that is unknown here.
        names_first: its Mistral calls are of the newer form, with the name before `[ARGS]`.
        thinks: it may begin with `<think>…</think>`.
    """

    calls: CallFormat | None = None
    names_first: bool = False
    thinks: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """What must stay in the text for a reader to see it, though it may be control tokens."""
        return (_MARKERS[self.calls] if self.calls is not None else ()) + ((THINK, THINK_END) if self.thinks else ())


_MARKERS = {
    CallFormat.HERMES: (call_syntax.TOOL_CALL, call_syntax.TOOL_CALL_END),
    CallFormat.LLAMA3: (call_syntax.PYTHON_TAG,),
    CallFormat.MISTRAL: (call_syntax.TOOL_CALLS, call_syntax.ARGS, call_syntax.CALL_ID),
}


class SyntaxChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator says of a model's syntax: `auto` finds it from the template, `none` switches it off."""

    tool_format: Literal["auto", "none", "hermes", "llama3", "mistral"] = "auto"
    reasoning_format: Literal["auto", "none", "think"] = "auto"

    def of(self, template: str) -> MessageSyntax:
        """The syntax of a model with this chat template."""
        calls = None if self.tool_format in {"auto", "none"} else CallFormat(self.tool_format)
        if self.tool_format == "auto":
            calls = _calls(template)
        thinks = self.reasoning_format == "think"
        if self.reasoning_format == "auto":
            thinks = THINK in template or THINK_END in template
        return MessageSyntax(calls=calls, names_first=call_syntax.ARGS in template, thinks=thinks)


AUTO = SyntaxChoice()


class SyntaxChoices:
    """The operator's choices for all models of a fleet.

    Args:
        tool_formats, reasoning_formats: one format for every model, or `model=format` with commas between.

    Raises:
        ValueError: a format is unknown; the message names it.
    """

    def __init__(self, *, tool_formats: str = "auto", reasoning_formats: str = "auto") -> None:
        self._tools = _by_model(tool_formats)
        self._reasoning = _by_model(reasoning_formats)
        for field, chosen in (("tool_format", self._tools), ("reasoning_format", self._reasoning)):
            for name in chosen.values():
                _choice({field: name})

    def of(self, model: str) -> SyntaxChoice:
        """The choice for a model."""
        return _choice(
            {
                "tool_format": self._tools.get(model, self._tools.get("", "auto")),
                "reasoning_format": self._reasoning.get(model, self._reasoning.get("", "auto")),
            }
        )


def _choice(fields: dict[str, str]) -> SyntaxChoice:
    try:
        return msgspec.convert(fields, SyntaxChoice)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def _by_model(text: str) -> dict[str, str]:
    """Formats by model, that of all other models under the empty name."""
    pairs = [part.strip().rpartition("=") for part in text.split(",") if part.strip()]
    return {model.strip(): name.strip() for model, _, name in pairs}


def _calls(template: str) -> CallFormat | None:
    if call_syntax.TOOL_CALLS in template:
        return CallFormat.MISTRAL
    if call_syntax.TOOL_CALL in template:
        # Qwen3-Coder and GLM put XML of their own between the same markers
        return None if "<function=" in template or "<arg_key>" in template else CallFormat.HERMES
    if call_syntax.PYTHON_TAG in template or "Environment: ipython" in template:
        return CallFormat.LLAMA3
    return None
