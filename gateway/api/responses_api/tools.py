"""Tools and text formats: from the flat shapes of the Responses API to the nested ones of chat."""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.api.decoding import convert_field
from gateway.api.formats import FlatJsonSchemaFormat, JsonSchemaFormat, NamedSchema, ResponseFormat
from gateway.api.requests import FunctionTool as ChatFunctionTool
from gateway.api.requests import Tool
from gateway.api.responses_api.requests import AllowedTools, FunctionTool, NamedTool, TextSettings
from gateway.api.responses_api.requests import ToolChoice as Choice
from gateway.errors import InvalidRequest


def read_tools(tools: list[Any] | None) -> list[FunctionTool]:
    """The functions among `tools`, which is all of them. Raises: InvalidRequest naming what is no function."""
    read: list[FunctionTool] = []
    for place, tool in enumerate(tools or ()):
        path = f"tools[{place}]"
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(tool, dict) and kind != "function":
            raise InvalidRequest(
                f"Tools of type {str(kind)[:100]!r} are not supported by this server, only functions.",
                param=f"{path}.type",
                code="unsupported_value",
            )
        read.append(convert_field(tool, FunctionTool, at=path))
    return read


def chat_tools(tools: list[Any] | None, choice: Choice | None) -> list[Tool] | None:
    """`tools` of the chat. Tools that are not allowed are left out. Raises: InvalidRequest."""
    known = read_tools(tools)
    if isinstance(choice, AllowedTools):
        allowed = {tool.name for tool in choice.tools}
        if missing := sorted(allowed - {tool.name for tool in known}):
            raise InvalidRequest(
                f"'tool_choice' allows {missing[0][:100]!r}, which is not among 'tools'.",
                param="tool_choice",
                code="invalid_value",
            )
        known = [tool for tool in known if tool.name in allowed]
    return [_chat_tool(tool) for tool in known] or None


def chat_tool_choice(choice: Choice | None) -> str | dict[str, Any] | None:
    """`tool_choice` of the chat."""
    match choice:
        case NamedTool(name=name):
            return {"type": "function", "function": {"name": name}}
        case AllowedTools(mode=mode):
            return mode
        case _:
            return choice


def chat_format(text: TextSettings | None) -> ResponseFormat | None:
    """`response_format` of the chat."""
    chosen = text.format if text is not None else None
    if not isinstance(chosen, FlatJsonSchemaFormat):
        return chosen
    return JsonSchemaFormat(
        json_schema=NamedSchema(
            name=chosen.name, description=chosen.description, schema=chosen.schema, strict=chosen.strict
        )
    )


def shown_format(text: TextSettings | None) -> dict[str, Any]:
    """`text.format` as the response repeats it."""
    if text is None or text.format is None:
        return {"type": "text"}
    shown: dict[str, Any] = msgspec.to_builtins(text.format)
    return {name: value for name, value in shown.items() if value is not None}


def shown_tools(tools: list[Any] | None) -> list[dict[str, Any]]:
    """`tools` as the response repeats them: with all their keys."""
    return [msgspec.to_builtins(tool) for tool in read_tools(tools)]


def _chat_tool(tool: FunctionTool) -> Tool:
    return Tool(
        function=ChatFunctionTool(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
    )
