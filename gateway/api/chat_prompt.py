"""Messages to token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from gateway.api.requests import (
    AssistantMessage,
    ChatMessage,
    DeveloperMessage,
    RefusalPart,
    SystemMessage,
    TextPart,
    ToolCall,
    ToolMessage,
)
from gateway.errors import InvalidRequest, TemplateError
from gateway.pipeline import ServedModel
from gateway.text.message_syntax import THINK, CallFormat
from gateway.text.template import Message

_SHORT_ID = 9
_RESERVED_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})


class ChatPrompt(msgspec.Struct, frozen=True):
    """A rendered conversation.

    Attributes:
        ids: token ids.
        thinking: the prompt ends with an open `<think>`, so that the output begins within the reasoning.
    """

    ids: list[int]
    thinking: bool = False


async def chat_prompt(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    add_special_tokens: bool,
    variables: Mapping[str, Any],
    tools: Sequence[dict[str, Any]] = (),
) -> ChatPrompt:
    """Render the model's chat template and tokenize.

    `variables` are the client's `chat_template_kwargs`, `tools` declarations of functions in OpenAI's form. With
    `continue_final_message` the prompt ends with the last message's text instead of a new message's beginning.
    Raises: InvalidRequest naming the field at fault.
    """
    template = model.card.tool_template if tools else model.card.template
    if template is None:
        raise InvalidRequest("This model has no chat template; use /v1/completions.", param="messages")
    for name in variables:
        if name in _RESERVED_VARIABLES:
            raise InvalidRequest(
                f"'chat_template_kwargs' may not set {name!r}.", param="chat_template_kwargs", code="invalid_value"
            )
        if name not in template.variables:
            raise InvalidRequest(
                f"'chat_template_kwargs' sets {name[:100]!r}, which this model's chat template does not read.",
                param=f"chat_template_kwargs.{name[:100]}",
                code="unsupported_parameter",
            )
    short_ids = model.card.syntax.calls is CallFormat.MISTRAL
    shaped = [_as_template_sees(message, place, short_ids=short_ids) for place, message in enumerate(messages)]
    try:
        pieces = template.render(
            shaped,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=list(tools) or None,
            variables=variables,
        )
    except TemplateError as error:
        raise InvalidRequest(str(error)[:500], param="messages", code="invalid_value") from error
    ids = await model.card.tokenizer.encode_seamed_async(pieces, add_special_tokens=add_special_tokens)
    if not ids:
        raise InvalidRequest("The messages make an empty prompt.", param="messages", code="invalid_value")
    thinking = add_generation_prompt and "".join(pieces[-1:]).rstrip().endswith(THINK)
    return ChatPrompt(ids, thinking)


def _as_template_sees(message: ChatMessage, place: int, *, short_ids: bool) -> Message:
    """A message as published templates expect it: `system` for `developer`, arguments of calls as objects."""
    if isinstance(message, AssistantMessage):
        return _assistant(message, f"messages[{place}]", short_ids=short_ids)
    shaped: Message = {"role": _role(message), "content": _content(message.content), "name": message.name}
    if isinstance(message, ToolMessage):
        shaped["tool_call_id"] = _short_id(message.tool_call_id) if short_ids else message.tool_call_id
    return shaped


def _role(message: ChatMessage) -> str:
    if isinstance(message, SystemMessage | DeveloperMessage):
        return "system"
    return "tool" if isinstance(message, ToolMessage) else "user"


def _assistant(message: AssistantMessage, path: str, *, short_ids: bool) -> Message:
    for name in ("audio", "function_call"):
        if getattr(message, name):
            raise InvalidRequest(
                f"{name!r} is not supported by this server.", param=f"{path}.{name}", code="unsupported_parameter"
            )
    content = message.content if message.content is not None else message.refusal
    if content is None and not message.tool_calls:
        raise InvalidRequest(
            "An assistant message needs 'content' or 'tool_calls'.",
            param=f"{path}.content",
            code="missing_required_parameter",
        )
    shaped: Message = {"role": "assistant", "content": _content(content), "name": message.name}
    shaped["reasoning_content"] = message.reasoning_content or message.reasoning
    calls = [_call(call) for call in message.tool_calls or []]
    for call in calls if short_ids else ():
        call["id"] = _short_id(call["id"])
    shaped["tool_calls"] = calls or None
    return shaped


def _short_id(call_id: str) -> str:
    """Mistral's templates take ids of nine letters and digits alone; others become some, alike for alike."""
    if len(call_id) == _SHORT_ID and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:_SHORT_ID]


def _content(content: str | Sequence[TextPart | RefusalPart] | None) -> str | list[dict[str, str]] | None:
    if content is None or isinstance(content, str):
        return content
    texts = [part.text if isinstance(part, TextPart) else part.refusal for part in content]
    return [{"type": "text", "text": text} for text in texts]


def _call(call: ToolCall) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    try:
        arguments = msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        arguments = call.function.arguments  # a model's slip; templates write strings as they are
    return {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
