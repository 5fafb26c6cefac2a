"""Fields of OpenAI's API that Baton knows but does not serve: refused by name, never ignored in silence.

Absent, null and neutral values (`tools: []`, `modalities: ["text"]`) pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from gateway.api.requests import ChatCompletionRequest, CompletionRequest, StreamOptions, TokenizeRequest
from gateway.errors import InvalidRequest

# Field to the values that ask for nothing; null always does
_UNBUILT: dict[str, tuple[object, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "use_beam_search": (False,),
}
_UNBUILT_IN_CHAT: dict[str, tuple[object, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "moderation": (),
    "modalities": (["text"],),
    "prediction": (),
    "verbosity": (),
    "web_search_options": (),
}


def check_chat(request: ChatCompletionRequest) -> None:
    """Raises: InvalidRequest."""
    if request.functions:
        raise _refused("functions")
    if request.function_call not in (None, "none", "auto"):
        raise _refused("function_call")
    _refuse_unbuilt(request, _UNBUILT | _UNBUILT_IN_CHAT)
    _check_prompt_logprobs(request)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value")
    if request.max_tokens == 0:
        raise InvalidRequest("'max_tokens' must be at least 1.", param="max_tokens", code="invalid_value")
    check_final_message(request)
    check_truncation(request)
    check_stream_options(request.stream_options, stream=bool(request.stream))


def check_completion(request: CompletionRequest) -> None:
    """Raises: InvalidRequest."""
    _refuse_unbuilt(request, _UNBUILT)
    _check_prompt_logprobs(request)
    if request.suffix:
        raise _refused("suffix")
    num_samples = request.n or 1
    if request.best_of is not None and request.best_of < num_samples:
        raise InvalidRequest("'best_of' must be at least 'n'.", param="best_of", code="invalid_value")
    if request.best_of is not None and request.best_of > num_samples and request.stream:
        raise InvalidRequest("'best_of' above 'n' cannot be streamed.", param="best_of", code="invalid_value")
    if request.max_tokens == 0 and not request.echo:
        raise InvalidRequest(
            "'max_tokens' must be at least 1 without 'echo'.", param="max_tokens", code="invalid_value"
        )
    check_truncation(request)
    if request.truncate_prompt_tokens is not None and request.echo:
        raise InvalidRequest(
            "'truncate_prompt_tokens' and 'echo' exclude each other.",
            param="truncate_prompt_tokens",
            code="invalid_value",
        )
    check_stream_options(request.stream_options, stream=bool(request.stream))


def check_final_message(request: ChatCompletionRequest | TokenizeRequest) -> None:
    """Raises: InvalidRequest."""
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidRequest(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.",
            param="continue_final_message",
            code="invalid_value",
        )


def check_truncation(request: ChatCompletionRequest | CompletionRequest) -> None:
    """Raises: InvalidRequest."""
    if request.truncate_prompt_tokens == 0:
        raise InvalidRequest(
            "'truncate_prompt_tokens' is a number of tokens to keep from 1 on, or -1 for as many as fit.",
            param="truncate_prompt_tokens",
            code="invalid_value",
        )


def check_stream_options(options: StreamOptions | None, *, stream: bool) -> None:
    """Raises: InvalidRequest."""
    if options is None:
        return
    if not stream:
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
        )


def _refuse_unbuilt(request: msgspec.Struct, unbuilt: Mapping[str, tuple[object, ...]]) -> None:
    for name, neutral in unbuilt.items():
        value = getattr(request, name)
        if value is not None and value not in neutral:
            raise _refused(name)


def _check_prompt_logprobs(request: ChatCompletionRequest | CompletionRequest) -> None:
    """As in vLLM, no chunk has a place for them."""
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidRequest("'prompt_logprobs' cannot be streamed.", param="prompt_logprobs", code="invalid_value")


def _refused(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name!r} is not supported by this server.", param=name, code="unsupported_parameter")
