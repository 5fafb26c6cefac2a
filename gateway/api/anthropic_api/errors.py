"""Errors in Anthropic's shape, on the endpoints of the Messages API alone."""

from __future__ import annotations

from litestar import Response
from litestar.exceptions import HTTPException
from litestar.types import ExceptionHandlersMap
from msgspec import UNSET

from gateway.api.answer_headers import note_headers, request_id_of
from gateway.api.anthropic_api.objects import ErrorDetails, MessageError, MessageErrorBody
from gateway.api.replies import AnyRequest, json_reply, logged_api_error
from gateway.errors import ApiError

NO_THREADS = "thread_unsupported_request"

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_error(error: ApiError, request_id: str) -> MessageErrorBody:
    """The error in Anthropic's shape."""
    other = "invalid_request_error" if error.status < 500 else "api_error"
    details = ErrorDetails(error.code, ["thread"]) if error.code == NO_THREADS else UNSET
    return MessageErrorBody(MessageError(_TYPES.get(error.status, other), error.message, details), request_id)


def name_answer(request: AnyRequest) -> str:
    """Have the answer carry `request-id`, which Anthropic's SDKs read; returns the id."""
    request_id = request_id_of(request.scope)
    note_headers(request.scope, {"request-id": request_id})
    return request_id


def exception_handlers() -> ExceptionHandlersMap:
    """Handlers for the endpoints of the Messages API."""
    return {Exception: _handle, HTTPException: _handle}


def _handle(request: AnyRequest, error: Exception) -> Response[bytes]:
    shown = logged_api_error(request, error)
    body = message_error(shown, name_answer(request))
    return json_reply(body, status=shown.status, headers=shown.headers)
