"""The bodies of answers: a response with its items."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gateway.api.responses import ChatTokenLogprob

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
LIVE: frozenset[str] = frozenset({"queued", "in_progress"})


class OutputTextPart(msgspec.Struct, tag="output_text", kw_only=True):
    """Text of a message. `annotations` is always empty: there are no tools of ours that would cite."""

    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(msgspec.Struct, tag="message", kw_only=True):
    """What the model says."""

    id: str
    content: list[OutputTextPart]
    status: str
    role: Literal["assistant"] = "assistant"


class OutputFunctionCall(msgspec.Struct, tag="function_call", kw_only=True):
    """A call that the model makes; `arguments` is JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class ReasoningTextPart(msgspec.Struct, tag="reasoning_text", kw_only=True):
    """Text of reasoning."""

    text: str


class OutputReasoning(msgspec.Struct, tag="reasoning", kw_only=True):
    """What the model thinks before it answers. Summaries are not made."""

    id: str
    content: list[ReasoningTextPart]
    status: str
    summary: list[Any] = []


OutputItem = OutputMessage | OutputFunctionCall | OutputReasoning


class InputDetails(msgspec.Struct):
    """`cached_tokens` came from a prefix cache; writing to it is free and not counted."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """`reasoning_tokens` of the output were reasoning."""

    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    """Token counts."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class IncompleteDetails(msgspec.Struct):
    """Why an answer is not whole."""

    reason: str


class ResponseError(msgspec.Struct):
    """Why there is no answer."""

    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response, at any time of its life. `tools`, `text` and `tool_choice` repeat what was asked."""

    id: str
    created_at: int
    model: str
    status: Status
    object: Literal["response"] = "response"
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: None = None
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: dict[str, Any]
    store: bool = True
    temperature: float
    top_p: float
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    text: dict[str, Any]
    tool_choice: Any = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    metadata: dict[str, str] = {}
    service_tier: str = "default"
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | msgspec.UnsetType = msgspec.UNSET


class DeletedResponse(msgspec.Struct):
    """Answer of `DELETE /v1/responses/{id}`."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class InputItemList(msgspec.Struct):
    """A page of input items."""

    data: list[dict[str, Any]]
    has_more: bool
    first_id: str
    last_id: str
    object: Literal["list"] = "list"


class InputTokens(msgspec.Struct):
    """Answer of `/v1/responses/input_tokens`."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"
