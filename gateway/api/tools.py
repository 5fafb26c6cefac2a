"""What a request says about tools, resolved: which functions the model sees, which it may call, and whether it must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from gateway.api.decoding import convert_field
from gateway.api.requests import FunctionTool, Tool
from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel
from gateway.text.message_reader import ReadOptions

Mode = Literal["none", "auto", "required"]
_MODES: tuple[Mode, ...] = ("none", "auto", "required")


class ToolUse(msgspec.Struct, frozen=True, kw_only=True):
    """The default is a request without tools.

    Attributes:
        declared: functions that the prompt declares, as chat templates expect them; empty under `none`.
        functions: those that may be called, by name.
        mode: whether a call may, must or must not be made.
        named: the client chose one function by its name.
        parallel: more than one call may be made.
    """

    declared: Sequence[dict[str, Any]] = ()
    functions: dict[str, FunctionTool] = {}
    mode: Mode = "none"
    named: bool = False
    parallel: bool = True

    def places(self) -> dict[str, int]:
        """Where in the client's list each function stands, for messages about it."""
        return {tool["function"]["name"]: place for place, tool in enumerate(self.declared)}


class _Name(msgspec.Struct):
    name: str


class _Reference(msgspec.Struct, tag="function", tag_field="type"):
    function: _Name


class _Allowed(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[_Reference]


class _AllowedTools(msgspec.Struct, tag="allowed_tools", tag_field="type"):
    allowed_tools: _Allowed


def tool_use(tools: list[Tool] | None, choice: str | dict[str, Any] | None, *, parallel: bool | None) -> ToolUse:
    """Resolve `tools`, `tool_choice` and `parallel_tool_calls`. Raises: InvalidRequest naming the field."""
    functions = _by_name(tools or [])
    if not functions:
        if choice not in (None, "none", "auto"):
            raise _invalid("'tool_choice' is only allowed when 'tools' are given.", "tool_choice")
        return ToolUse()
    mode, names, named = _chosen(choice, functions)
    if mode == "none":
        return ToolUse()
    return ToolUse(
        declared=[_as_template_sees(function) for function in functions.values()],
        functions={name: functions[name] for name in functions if name in names},
        mode=mode,
        named=named,
        parallel=parallel is not False and not named,
    )


def check_served(use: ToolUse, model: ServedModel) -> None:
    """Whether the model can be told of functions and its calls be read. Raises: InvalidRequest."""
    if use.mode == "none":
        return
    template = model.card.tool_template
    if template is None or "tools" not in template.variables:
        raise _invalid("This model does not call functions: its chat template has no place for 'tools'.", "tools")
    if model.card.syntax.calls is None:
        raise _invalid(
            "The form in which this model writes calls is not known; the operator can name it (BATON_TOOL_FORMAT).",
            "tools",
        )


def read_options(use: ToolUse, model: ServedModel, *, thinking: bool, shows_special_tokens: bool) -> ReadOptions:
    """How outputs of a request are to be read; `thinking`: its prompt ends with an open `<think>`."""
    card = model.card
    hidden = [card.tokenizer.token(token_id) or "" for token_id in card.marker_ids]
    return ReadOptions(
        calls=card.syntax.calls if use.mode != "none" else None,
        functions=frozenset(use.functions),
        max_calls=None if use.parallel else 1,
        thinks=card.syntax.thinks,
        thinking=thinking,
        hidden_markers=() if shows_special_tokens else hidden,
    )


def _by_name(tools: Sequence[Tool]) -> dict[str, FunctionTool]:
    functions: dict[str, FunctionTool] = {}
    for place, tool in enumerate(tools):
        name, path = tool.function.name, f"tools[{place}].function"
        if name in functions:
            raise _invalid(f"There are two functions named {name!r}.", f"{path}.name")
        if (tool.function.parameters or {}).get("type", "object") != "object":
            raise _invalid(f"The parameters of {name!r} must be a schema of type 'object'.", f"{path}.parameters")
        functions[name] = tool.function
    return functions


def _chosen(
    choice: str | dict[str, Any] | None, functions: dict[str, FunctionTool]
) -> tuple[Mode, frozenset[str], bool]:
    """Mode, names that may be called, and whether one was chosen by its name."""
    everything = frozenset(functions)
    if choice is None:
        return "auto", everything, False
    if isinstance(choice, str):
        mode = next((mode for mode in _MODES if mode == choice), None)
        if mode is None:
            raise _invalid(f"{choice[:100]!r} is neither none, auto, required nor an object.", "tool_choice")
        return mode, everything, False
    if choice.get("type") != "allowed_tools":
        name = convert_field(choice, _Reference, at="tool_choice").function.name
        _require(name, functions, "tool_choice.function.name")
        return "required", frozenset({name}), True
    allowed = convert_field(choice, _AllowedTools, at="tool_choice").allowed_tools
    for place, reference in enumerate(allowed.tools):
        _require(reference.function.name, functions, f"tool_choice.allowed_tools.tools[{place}].function.name")
    names = frozenset(reference.function.name for reference in allowed.tools)
    if not names:
        raise _invalid("No tool is allowed; use 'none' for that.", "tool_choice.allowed_tools.tools")
    return allowed.mode, names, False


def _require(name: str, functions: dict[str, FunctionTool], param: str) -> None:
    if name not in functions:
        raise _invalid(f"'tools' has no function named {name[:100]!r}.", param)


def _as_template_sees(function: FunctionTool) -> dict[str, Any]:
    """OpenAI's form without what is absent. `strict` is a word to the server, not to the model."""
    shown = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {key: value for key, value in shown.items() if value is not None}}


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
