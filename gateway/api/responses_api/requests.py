"""Request bodies of the Responses API. As for chat, every field works, is bookkeeping, or is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.api.formats import OutputFormat
from gateway.api.requests import MAX_TOP_LOGPROBS, FunctionName, SamplingFields

LOGPROBS = "message.output_text.logprobs"

Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]
"""Reasoning needs no encryption here: its items carry it in the clear and can be sent back without being stored."""


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of bodies."""


class TextSettings(_Part):
    """`text`: what form the answer has."""

    format: OutputFormat | None = None
    verbosity: str | None = None


class FunctionTool(_Part, tag="function", tag_field="type"):
    """A function that the model may call."""

    name: FunctionName
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class NamedTool(_Part, tag="function", tag_field="type"):
    """`tool_choice`: this function must be called."""

    name: str


class AllowedTools(_Part, tag="allowed_tools", tag_field="type"):
    """`tool_choice`: only these tools take part."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1)]


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools


class StreamOptions(_Part):
    """`stream_options`. Padding against traffic analysis is not built."""

    include_obfuscation: bool | None = None


class Reasoning(_Part):
    """`reasoning`. Effort is what the model's template makes of it; summaries are not built."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class CreateResponseRequest(SamplingFields, kw_only=True):
    """`POST /v1/responses`."""

    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextSettings | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    conversation: Any = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Include] | None = None
    background: bool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tool_calls: int | None = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    prompt_cache_options: Any = None

    @property
    def stores(self) -> bool:
        """Whether the response can be retrieved and continued later."""
        return self.store is not False


class InputTokensRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/responses/input_tokens`: the same fields, as far as they make the prompt."""

    model: str | None = None
    input: str | list[Any] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    text: TextSettings | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    conversation: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    personality: Any = None
