"""Fields of OpenAI's API that Baton knows but does not serve: refused by name, never ignored in silence.

Absent, null and neutral values (`tools: []`, `modalities: ["text"]`) pass.
"""

from __future__ import annotations

from gateway.api.requests import ChatCompletionRequest, CompletionRequest, StreamOptions
from gateway.errors import InvalidRequest

_CHAT_FIELDS = ("audio", "prediction", "verbosity", "web_search_options")


def check_chat(request: ChatCompletionRequest) -> None:
    """Raises: InvalidRequest."""
    if request.functions:
        raise _refused("functions")
    if request.function_call not in (None, "none", "auto"):
        raise _refused("function_call")
    if request.modalities not in (None, ["text"]):
        raise _refused("modalities")
    for name in _CHAT_FIELDS:
        if getattr(request, name) is not None:
            raise _refused(name)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs", code="invalid_value")
    if request.max_tokens == 0:
        raise InvalidRequest("'max_tokens' must be at least 1.", param="max_tokens", code="invalid_value")
    check_stream_options(request.stream_options, stream=bool(request.stream))


def check_completion(request: CompletionRequest) -> None:
    """Raises: InvalidRequest."""
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
    check_stream_options(request.stream_options, stream=bool(request.stream))


def check_stream_options(options: StreamOptions | None, *, stream: bool) -> None:
    """Raises: InvalidRequest."""
    if options is None:
        return
    if not stream:
        raise InvalidRequest(
            "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
        )
    if options.include_obfuscation:
        raise _refused("stream_options.include_obfuscation")


def _refused(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name!r} is not supported by this server.", param=name, code="unsupported_parameter")
