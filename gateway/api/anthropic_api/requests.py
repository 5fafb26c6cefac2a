"""Request bodies of the Messages API. As for chat, every field works, is bookkeeping, or is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.api.requests import MAX_STOPS, MAX_TOOLS, StopString

MIN_THINKING_BUDGET = 1024

ToolName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,128}$")]
Nothing = Annotated[list[Any], Meta(max_length=0)]


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of bodies and their parts."""


class CacheControl(_Part, tag="ephemeral", tag_field="type"):
    """`cache_control`. Prefixes are cached anyway, page by page, until the room is needed."""

    ttl: Literal["5m", "1h"] | None = None


class TextBlock(_Part, tag="text", tag_field="type"):
    """Text. There are no citations here, so none can be sent back."""

    text: str
    citations: Nothing | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(_Part, tag="thinking", tag_field="type"):
    """The reasoning of an earlier answer, sent back. It is in the clear, so its signature says nothing."""

    thinking: str
    signature: str | None = None


class DirectCaller(_Part, tag="direct", tag_field="type"):
    """`caller`: the model itself made the call."""


class ToolUseBlock(_Part, tag="tool_use", tag_field="type"):
    """A call that an earlier answer made."""

    id: str
    name: str
    input: dict[str, Any]
    caller: DirectCaller | None = None
    cache_control: CacheControl | None = None


class ToolResultBlock(_Part, tag="tool_result", tag_field="type"):
    """What a call came to."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class UserTurn(_Part, tag="user", tag_field="role"):
    """What the user says, and results of calls."""

    content: str | Annotated[list[TextBlock | ToolResultBlock], Meta(min_length=1)]


class AssistantTurn(_Part, tag="assistant", tag_field="role"):
    """An earlier answer; as the last turn, the beginning of this one."""

    content: str | list[TextBlock | ThinkingBlock | ToolUseBlock]


Turn = UserTurn | AssistantTurn


class ClientTool(_Part):
    """A function that the model may call. Its input always streams as it is written."""

    name: ToolName
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    eager_input_streaming: bool | None = None
    cache_control: CacheControl | None = None


class AutoChoice(_Part, tag="auto", tag_field="type"):
    """`tool_choice`: calls are up to the model."""

    disable_parallel_tool_use: bool | None = None


class AnyChoice(_Part, tag="any", tag_field="type"):
    """`tool_choice`: some tool must be called."""

    disable_parallel_tool_use: bool | None = None


class NamedChoice(_Part, tag="tool", tag_field="type"):
    """`tool_choice`: this tool must be called."""

    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(_Part, tag="none", tag_field="type"):
    """`tool_choice`: nothing may be called."""


ToolChoice = AutoChoice | AnyChoice | NamedChoice | NoChoice


class ThinkingOn(_Part, tag="enabled", tag_field="type"):
    """`thinking`. The budget is a hint that no model here reads: `max_tokens` is what bounds an answer."""

    budget_tokens: Annotated[int, Meta(ge=MIN_THINKING_BUDGET)]
    display: Literal["summarized"] | None = None


class ThinkingOff(_Part, tag="disabled", tag_field="type"):
    """`thinking`: answer at once."""


class ThinkingAdaptive(_Part, tag="adaptive", tag_field="type"):
    """`thinking`: as the model's template has it."""

    display: Literal["summarized"] | None = None


Thinking = ThinkingOn | ThinkingOff | ThinkingAdaptive


class JsonSchemaOutput(_Part, tag="json_schema", tag_field="type"):
    """`output_config.format`: JSON that satisfies the schema."""

    schema: dict[str, Any]


class OutputConfig(_Part):
    """`output_config`."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonSchemaOutput | None = None


class Metadata(_Part):
    """`metadata`: whom the request is for, in the caller's own words."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None


class CountMessageTokensRequest(_Part, kw_only=True):
    """`POST /v1/messages/count_tokens`: what makes the prompt."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ClientTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None


class CreateMessageRequest(CountMessageTokensRequest, kw_only=True):
    """`POST /v1/messages`. `thread` is refused in the words at which the SDK's tool runner goes on without one."""

    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    stream: bool | None = None
    stop_sequences: Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    thread: dict[str, Any] | None = None
