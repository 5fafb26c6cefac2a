"""Small answers: JSON bodies and errors, and Litestar's exception handlers."""

from __future__ import annotations

from typing import Any

import msgspec
import structlog
from litestar import MediaType, Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ExceptionHandlersMap

from gateway.api.responses import ErrorBody, ErrorObject
from gateway.errors import ApiError, InvalidRequest, NoWorkers, Overloaded, PipelineError, RateLimited, Unavailable

AnyRequest = Request[Any, Any, Any]

_HTTP_ERRORS: dict[int, tuple[str, str]] = {
    400: ("The request is malformed.", "bad_request"),
    404: ("Unknown request URL.", "unknown_url"),
    405: ("Method not allowed for this URL.", "method_not_allowed"),
    413: ("The request body is too large.", "request_too_large"),
}


def json_reply(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response[bytes]:
    """An answer with a JSON body."""
    return Response(content=msgspec.json.encode(body), media_type=MediaType.JSON, status_code=status, headers=headers)


def error_body(error: ApiError) -> ErrorBody:
    """The error in OpenAI's shape."""
    return ErrorBody(ErrorObject(message=error.message, type=error.error_type, param=error.param, code=error.code))


def error_reply(error: ApiError) -> Response[bytes]:
    """The error as an HTTP answer."""
    return json_reply(error_body(error), status=error.status, headers=error.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any failure as something a client may see. What is none of a client's business becomes a plain 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        return RateLimited(str(error), retry_after_s=error.retry_after_s, code="server_overloaded")
    if isinstance(error, NoWorkers | PipelineError):
        return Unavailable(str(error), retry_after_s=error.retry_after_s)
    if isinstance(error, ValidationException) and error.extra:
        return _invalid_parameter(error.extra)
    if isinstance(error, HTTPException) and error.status_code < 500:
        message, code = _HTTP_ERRORS.get(error.status_code, ("The request cannot be served.", "bad_request"))
        return ApiError(
            message,
            status=error.status_code,
            error_type="invalid_request_error",
            code=code,
            headers={name: value for name, value in (error.headers or {}).items() if name.lower() == "allow"},
        )
    return ApiError(
        "The server had an error while processing your request.",
        status=500,
        error_type="server_error",
        code="internal_error",
    )


def _invalid_parameter(details: Any) -> InvalidRequest:
    """What Litestar found wrong with a query parameter."""
    first = details[0] if isinstance(details, list) and isinstance(details[0], dict) else {}
    name, message = first.get("key"), first.get("message", "it does not fit")
    return InvalidRequest(f"Invalid value for {name!r}: {message}", param=name, code="invalid_value")


def exception_handlers() -> ExceptionHandlersMap:
    """Handlers that give every failure, routing errors included, OpenAI's shape."""
    return {Exception: _handle, HTTPException: _handle}


def logged_api_error(request: AnyRequest, error: Exception) -> ApiError:
    """The failure of a request as its client may see it; what is a fault of ours goes to the log."""
    shown = as_api_error(error)
    if shown.status >= 500 and not isinstance(error, PipelineError | ApiError):
        structlog.get_logger("gateway.api").error(
            "request failed", path=request.url.path, exc_info=(type(error), error, error.__traceback__)
        )
    return shown


def _handle(request: AnyRequest, error: Exception) -> Response[bytes]:
    return error_reply(logged_api_error(request, error))
