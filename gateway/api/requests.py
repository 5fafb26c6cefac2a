"""Request bodies, as OpenAI publishes them plus vLLM's extensions.

Every field is here for one of four reasons: it works; it describes the caller and changes nothing that is said; it is
refused with a 400 that names it unless it is absent or has its neutral value (`gateway.api.refusals`); or it is part
of a message that clients send back to us. Anything else is an unknown field, and a 400 too. An explicit null is the
same as absence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fleet.types import Pooling
from gateway.api.answer_headers import REQUEST_ID
from gateway.api.formats import Choices, GrammarText, JsonInput, Pattern, ResponseFormat, StructuredOutputs

MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_TOP_LOGPROBS = 20
MAX_IDENTIFIER_CHARS = 1024

Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
NumTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
ShortText = Annotated[str, Meta(max_length=MAX_IDENTIFIER_CHARS)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
CacheSalt = Annotated[str, Meta(min_length=1, max_length=256)]
FunctionName = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
ServiceTier = Literal["auto", "default", "flex", "priority", "fast"]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of request bodies: an unknown field is an error that names it."""


class StreamOptions(_Body):
    """`stream_options`. `continuous_usage_stats` is vLLM's: usage so far in every chunk."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class PromptCacheOptions(_Body):
    """`prompt_cache_options`: only what holds for every request anyway; pages stay until the room is needed."""

    mode: Literal["implicit"] | None = None


class SamplingFields(_Body, kw_only=True):
    """What every API that generates takes: how to choose tokens, and bookkeeping."""

    model: str
    stream: bool | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOPS)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Int64 | None = None
    # extensions, as in vLLM
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None
    min_tokens: NumTokens | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=256)] | None = None
    skip_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None
    priority: Priority | None = None
    # identity and service
    user: ShortText | None = None
    safety_identifier: Annotated[str, Meta(max_length=64)] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: ServiceTier | None = None
    prompt_cache_key: ShortText | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    prompt_cache_options: PromptCacheOptions | None = None


class _Sampling(SamplingFields, kw_only=True):
    """What chat and text completions have in common."""

    stream_options: StreamOptions | None = None
    max_tokens: NumTokens | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    request_id: Annotated[str, Meta(min_length=1, max_length=128, pattern=REQUEST_ID)] | None = None
    truncate_prompt_tokens: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # refused by name; see `refusals`
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Any] | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    # the form of the answer: OpenAI's, then vLLM's two styles
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonInput | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None


class TextPart(_Body, tag="text", tag_field="type"):
    """A piece of text in a message."""

    text: str


class RefusalPart(_Body, tag="refusal", tag_field="type"):
    """A refusal of an earlier answer, sent back."""

    refusal: str


TextParts = Annotated[list[TextPart], Meta(min_length=1)]


class SystemMessage(_Body, tag="system", tag_field="role"):
    """Instructions."""

    content: str | TextParts
    name: str | None = None


class DeveloperMessage(_Body, tag="developer", tag_field="role"):
    """Instructions, as newer OpenAI models call them. Templates see the role `system`."""

    content: str | TextParts
    name: str | None = None


class UserMessage(_Body, tag="user", tag_field="role"):
    """What the user says."""

    content: str | TextParts
    name: str | None = None


class CalledFunction(_Body):
    """Name and arguments (JSON text) of a call. `parsed_arguments` is what the SDK's `parse` makes of them."""

    name: str
    arguments: str
    parsed_arguments: Any = None


class FunctionTool(_Body):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Body, tag="function", tag_field="type"):
    """An entry of `tools`. OpenAI's `custom` tools do not exist here."""

    function: FunctionTool


class ToolCall(_Body):
    """A call that an earlier answer made."""

    id: str
    function: CalledFunction
    type: str = "function"
    index: int | None = None


class AssistantMessage(_Body, tag="assistant", tag_field="role"):
    """An earlier answer, with the fields that answers carry. `parsed` is what the SDK's `parse` adds."""

    content: str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    parsed: Any = None
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None


class ToolMessage(_Body, tag="tool", tag_field="role"):
    """The result of a tool call."""

    content: str | TextParts
    tool_call_id: str
    name: str | None = None


ChatMessage = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | ToolMessage
Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class ChatCompletionRequest(_Sampling, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None
    chat_template: str | None = None
    documents: list[Any] | None = None
    echo: bool | None = None


class CompletionRequest(_Sampling, kw_only=True):
    """`POST /v1/completions`. `prompt` is text, texts, token ids, or lists of token ids."""

    prompt: str | list[Any]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: str | None = None


class EmbeddingRequest(_Body, kw_only=True):
    """`POST /v1/embeddings`. `input` is text, texts, token ids, or lists of token ids."""

    model: str
    input: str | list[Any]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    # extensions
    pooling: Pooling | None = None
    add_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None
    priority: Priority | None = None
    # bookkeeping
    user: str | None = None


class TokenizeRequest(_Body):
    """`POST /tokenize`: of a `prompt`, or of `messages` after the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(_Body):
    """`POST /detokenize`."""

    tokens: list[TokenId]
    model: str | None = None
