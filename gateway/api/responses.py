"""Response bodies. Fields whose absence means something else than null are `UNSET` by default."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class PromptTokensDetails(msgspec.Struct):
    """`cached_tokens` of the prompt came from a prefix cache."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """`reasoning_tokens` of the output came before the answer proper."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Token counts of one request; prompts count once each, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopTokenLogprob(msgspec.Struct):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    """A chosen token. `bytes` is what it contributed to the text: they join to it, reasoning and calls included."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopTokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry per output token."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AnsweredFunction(msgspec.Struct):
    """What a call calls. `arguments` is JSON text."""

    name: str
    arguments: str


class AnsweredCall(msgspec.Struct):
    """A call that the model makes."""

    id: str
    function: AnsweredFunction
    type: Literal["function"] = "function"


class AnswerMessage(msgspec.Struct):
    """The assistant's message. `reasoning` is the newer name of `reasoning_content`; clients read either."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class PromptLogprob(msgspec.Struct):
    """vLLM's form of a candidate at a place of the prompt; rank 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]
"""By token id, at each place of the prompt; null at the first."""


class ChatCompletion(msgspec.Struct):
    """Answer of `/v1/chat/completions`."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["chat.completion"] = "chat.completion"
    service_tier: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one place per token of the text; null for the first one of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def extend(self, more: CompletionLogprobs) -> None:
        """Put the lists of the text that follows behind these."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class CompletionChoice(msgspec.Struct):
    """One text."""

    index: int
    text: str
    finish_reason: str
    logprobs: CompletionLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct):
    """Answer of `/v1/completions`."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: Literal["text_completion"] = "text_completion"
    service_tier: str | UnsetType = UNSET


class Embedding(msgspec.Struct):
    """The vector of one input, of length 1: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingUsage(msgspec.Struct):
    """Token counts over all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    """Answer of `/v1/embeddings`, in the order of the inputs."""

    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: Literal["list"] = "list"


class ModelEntry(msgspec.Struct):
    """One name that can be put in `model`."""

    id: str
    created: int
    max_model_len: int
    root: str
    object: Literal["model"] = "model"
    owned_by: str = "baton"


class ModelList(msgspec.Struct):
    """Answer of `/v1/models`."""

    data: list[ModelEntry]
    object: Literal["list"] = "list"


class Tokenized(msgspec.Struct):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    """Answer of `/detokenize`."""

    prompt: str


class ErrorObject(msgspec.Struct):
    """What went wrong. All four keys are always there."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: ErrorObject
