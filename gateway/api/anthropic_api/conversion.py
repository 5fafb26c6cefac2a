"""From the Messages API to chat: turns become messages, tools and thinking what chat has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import msgspec

from fleet.keys import ApiKey
from gateway.api.anthropic_api.errors import NO_THREADS
from gateway.api.anthropic_api.requests import (
    AnyChoice,
    AssistantTurn,
    ClientTool,
    CountMessageTokensRequest,
    CreateMessageRequest,
    JsonSchemaOutput,
    NamedChoice,
    NoChoice,
    TextBlock,
    ThinkingBlock,
    ThinkingOff,
    ThinkingOn,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from gateway.api.context import ApiContext
from gateway.api.formats import JsonSchemaFormat, NamedSchema
from gateway.api.jobs import Job
from gateway.api.prepare import chat_job, render_chat
from gateway.api.reasoning import reads_effort
from gateway.api.requests import (
    AssistantMessage,
    CalledFunction,
    ChatCompletionRequest,
    ChatMessage,
    FunctionTool,
    SystemMessage,
    TextPart,
    Tool,
    ToolCall,
    ToolMessage,
    UserMessage,
)
from gateway.errors import InvalidRequest
from gateway.pipeline import ServedModel

Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock

_NAMES = {"'response_format'": "'output_config.format'", "'reasoning_effort'": "'output_config.effort'"}
"""Fields of the chat that we make, and what they are called here."""


async def message_job(api: ApiContext, request: CreateMessageRequest, key: ApiKey | None) -> Job:
    """The job of a message. `max_tokens` gives way to the room that the prompt leaves. Raises: ApiError."""
    if request.thread is not None:
        raise InvalidRequest(
            "'thread' is not supported by this server: send the whole conversation.", param="thread", code=NO_THREADS
        )
    chat = chat_of(request, api.find_model(request.model, key))
    chat.stream = request.stream
    chat.stop = request.stop_sequences
    chat.temperature, chat.top_k, chat.top_p = request.temperature, request.top_k, request.top_p
    chat.user = request.metadata.user_id if request.metadata is not None else None
    chat.service_tier = "default" if request.service_tier == "standard_only" else request.service_tier
    try:
        job = await chat_job(api, chat, key)
    except InvalidRequest as error:
        raise _renamed(error) from error
    (params,) = job.params
    params = msgspec.structs.replace(params, max_tokens=min(params.max_tokens, request.max_tokens))
    message_id = "msg_" + job.completion_id.rpartition("-")[2]
    return msgspec.structs.replace(job, completion_id=message_id, params=[params])


async def count_tokens(model: ServedModel, request: CountMessageTokensRequest) -> int:
    """Prompt tokens that a message to the same request would have. Raises: InvalidRequest."""
    try:
        _, prompt = await render_chat(model, chat_of(request, model))
    except InvalidRequest as error:
        raise _renamed(error) from error
    return len(prompt.ids)


def chat_of(request: CountMessageTokensRequest, model: ServedModel) -> ChatCompletionRequest:
    """The chat request with the same prompt, tools and form. Raises: InvalidRequest."""
    output = request.output_config
    continues = isinstance(request.messages[-1], AssistantTurn)
    if continues and any(isinstance(block, ToolUseBlock) for block in _blocks(request.messages[-1])):
        raise InvalidRequest("'messages' ends with a tool_use block; its tool_result must follow.", param="messages")
    return ChatCompletionRequest(
        model=request.model,
        messages=[*_system(request.system), *_messages(request.messages)],
        tools=[_tool(tool) for tool in request.tools or ()] or None,
        tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=not getattr(request.tool_choice, "disable_parallel_tool_use", None),
        response_format=_form(output.format) if output is not None and output.format is not None else None,
        reasoning_effort=_effort(request, model),
        continue_final_message=continues,
        add_generation_prompt=not continues,
    )


def _system(system: str | list[TextBlock] | None) -> list[ChatMessage]:
    if not system:
        return []
    return [SystemMessage(content=system if isinstance(system, str) else _parts(system))]


def _messages(turns: Sequence[Turn]) -> list[ChatMessage]:
    """Turns of one role in a row are one turn."""
    messages: list[ChatMessage] = []
    for kind, group in groupby(turns, type):
        blocks = [block for turn in group for block in _blocks(turn)]
        messages += [_assistant(blocks)] if kind is AssistantTurn else _user(blocks)
    return messages


def _blocks(turn: Turn) -> Sequence[Block]:
    return [TextBlock(text=turn.content)] if isinstance(turn.content, str) else turn.content


def _user(blocks: Iterable[Block]) -> list[ChatMessage]:
    """Results are messages of their own; texts in a row are one."""
    messages: list[ChatMessage] = []
    for is_result, group in groupby(blocks, lambda block: isinstance(block, ToolResultBlock)):
        if is_result:
            messages += [_result(block) for block in group if isinstance(block, ToolResultBlock)]
        else:
            texts = _parts(block for block in group if isinstance(block, TextBlock))
            messages.append(UserMessage(content=texts[0].text if len(texts) == 1 else texts))
    return messages


def _result(block: ToolResultBlock) -> ToolMessage:
    """Chat has no mark for a result that is an error, so the text says it."""
    content = block.content or ""
    text = content if isinstance(content, str) else "\n".join(part.text for part in content)
    return ToolMessage(content=f"Error: {text}" if block.is_error else text, tool_call_id=block.tool_use_id)


def _assistant(blocks: Sequence[Block]) -> AssistantMessage:
    calls = [
        ToolCall(id=block.id, function=CalledFunction(name=block.name, arguments=_json(block.input)))
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    text = "".join(block.text for block in blocks if isinstance(block, TextBlock))
    thinking = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    return AssistantMessage(
        content=text or (None if calls else ""), tool_calls=calls or None, reasoning_content=thinking or None
    )


def _parts(blocks: Iterable[TextBlock]) -> list[TextPart]:
    return [TextPart(text=block.text) for block in blocks]


def _json(value: dict[str, Any]) -> str:
    return msgspec.json.encode(value).decode()


def _tool(tool: ClientTool) -> Tool:
    return Tool(
        function=FunctionTool(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
    )


def _choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    match choice:
        case None:
            return None
        case NamedChoice(name=name):
            return {"type": "function", "function": {"name": name}}
        case AnyChoice():
            return "required"
        case NoChoice():
            return "none"
    return "auto"


def _form(form: JsonSchemaOutput) -> JsonSchemaFormat:
    return JsonSchemaFormat(json_schema=NamedSchema(name="answer", schema=form.schema, strict=True))


def _effort(request: CountMessageTokensRequest, model: ServedModel) -> str | None:
    """`reasoning_effort` of the chat; None leaves it to the template. Raises: InvalidRequest."""
    thinks, has_switch = bool(model.card.syntax.thinks), reads_effort(model)
    if isinstance(request.thinking, ThinkingOff):
        if thinks and not has_switch:
            raise InvalidRequest("'thinking' cannot be disabled: this model always reasons.", param="thinking")
        return "none" if has_switch else None
    if isinstance(request.thinking, ThinkingOn) and not (thinks or has_switch):
        raise InvalidRequest("'thinking' cannot be enabled: this model does not reason.", param="thinking")
    effort = request.output_config.effort if request.output_config is not None else None
    if effort is None and isinstance(request.thinking, ThinkingOn) and has_switch:
        return "medium"
    return effort


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """The error in the names of this API."""
    for theirs, ours in _NAMES.items():
        error.message = error.message.replace(theirs, ours)
    return error
