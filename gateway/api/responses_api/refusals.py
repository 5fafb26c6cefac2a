"""Fields of the Responses API that are known and not served: refused by name. Absent and neutral values pass."""

from __future__ import annotations

from gateway.api.responses_api.requests import CreateResponseRequest, InputTokensRequest
from gateway.errors import InvalidRequest


def check_response(request: CreateResponseRequest) -> None:
    """Raises: InvalidRequest."""
    for name in ("prompt", "context_management", "moderation", "prompt_cache_options", "max_tool_calls"):
        if getattr(request, name) is not None:
            raise _refused(name)
    _check_common(request)
    if request.stream_options is not None:
        if not request.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options", code="invalid_value"
            )
        if request.stream_options.include_obfuscation:
            raise _refused("stream_options.include_obfuscation")
    if request.background and not request.stores:
        raise InvalidRequest(
            "A background response must be stored: 'store' may not be false.", param="store", code="invalid_value"
        )


def check_count(request: InputTokensRequest) -> None:
    """Raises: InvalidRequest."""
    if request.personality is not None:
        raise _refused("personality")
    _check_common(request)


def _check_common(request: CreateResponseRequest | InputTokensRequest) -> None:
    if request.conversation is not None:
        raise _refused("conversation")
    if request.text is not None and request.text.verbosity is not None:
        raise _refused("text.verbosity")
    if request.reasoning is not None and (request.reasoning.summary or request.reasoning.generate_summary):
        raise _refused("reasoning.summary")


def _refused(name: str) -> InvalidRequest:
    return InvalidRequest(f"{name!r} is not supported by this server.", param=name, code="unsupported_parameter")
