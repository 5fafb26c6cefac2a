"""Answers of the Messages API."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.api.responses import Usage


class AnsweredText(msgspec.Struct, tag="text", tag_field="type"):
    """What the model says."""

    text: str
    citations: None = None


class AnsweredThinking(msgspec.Struct, tag="thinking", tag_field="type"):
    """What the model thought before; in the clear, so there is nothing to sign."""

    thinking: str
    signature: str = ""


class AnsweredToolUse(msgspec.Struct, tag="tool_use", tag_field="type"):
    """A call that the model makes."""

    id: str
    name: str
    input: dict[str, Any]


AnsweredBlock = AnsweredText | AnsweredThinking | AnsweredToolUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class OutputTokensDetails(msgspec.Struct):
    """`thinking_tokens` of the output came before the answer proper."""

    thinking_tokens: int


class MessageUsage(msgspec.Struct):
    """Token counts. `input_tokens` leaves out what came from the prefix cache; writing to it costs nothing."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    output_tokens_details: OutputTokensDetails | UnsetType = UNSET

    @classmethod
    def of(cls, usage: Usage) -> MessageUsage:
        """The counts of a run."""
        cached = usage.prompt_tokens_details.cached_tokens
        details = usage.completion_tokens_details
        return cls(
            usage.prompt_tokens - cached,
            usage.completion_tokens,
            cached,
            output_tokens_details=OutputTokensDetails(details.reasoning_tokens) if details is not UNSET else UNSET,
        )


class Message(msgspec.Struct):
    """Answer of `/v1/messages`."""

    id: str
    model: str
    content: list[AnsweredBlock]
    usage: MessageUsage
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"


class MessageTokensCount(msgspec.Struct):
    """Answer of `/v1/messages/count_tokens`."""

    input_tokens: int


class ErrorDetails(msgspec.Struct):
    """What an SDK can react to: which parts of the request are not to be had here."""

    error_code: str
    unsupported: list[str]


class MessageError(msgspec.Struct):
    """What went wrong."""

    type: str
    message: str
    details: ErrorDetails | UnsetType = UNSET


class MessageErrorBody(msgspec.Struct):
    """The body of every answer of these endpoints that is not a success."""

    error: MessageError
    request_id: str
    type: Literal["error"] = "error"
