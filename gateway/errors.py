"""The gateway's branch of the error tree.

BatonError
└── GatewayError
    ├── PipelineError              the fleet did not take the request
    │   ├── Overloaded             queues are full; come back later (429)
    │   └── NoWorkers              nobody is there to serve the model (503)
    ├── CardError                  a model's tokenizer or template files cannot be used
    │   └── TemplateError          the chat template refused or failed on this conversation (400)
    └── ApiError                   an answer in OpenAI's error shape, with its HTTP status
        ├── InvalidRequest         400, names the field
        │   └── ContextTooLong     400 context_length_exceeded, with both numbers
        ├── InvalidKey             401
        ├── UnknownModel           404
        ├── UnknownRequest         404
        ├── NotAllowed             403
        ├── RequestIdTaken         409
        ├── RateLimited            429
        ├── ClientLeft             499, which nobody reads
        ├── Unavailable            503
        └── GenerationFailed       500
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fleet.errors import BatonError


class GatewayError(BatonError):
    """Root of the gateway's errors."""


class PipelineError(GatewayError):
    """The fleet did not take a request. `retry_after_s` is how long a client should wait."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(PipelineError):
    """Queues are full. Raised at once, without waiting."""


class NoWorkers(PipelineError):
    """No worker can serve the model."""


class CardError(GatewayError):
    """A model's published files lack something or do not load. The message names the file."""


class TemplateError(CardError):
    """The chat template raised on this conversation; the message is the template's own."""


class ApiError(GatewayError):
    """An answer in OpenAI's error shape.

    Attributes:
        status: HTTP status.
        error_type, code, param: the keys `type`, `code` and `param` of the error object.
        headers: to go with the answer, such as `retry-after`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        error_type: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.error_type = error_type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


class InvalidRequest(ApiError):
    """400: the request cannot be served as it stands. `param` names the field where there is one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, status=400, error_type="invalid_request_error", code=code, param=param)


class ContextTooLong(InvalidRequest):
    """400: prompt, or prompt plus requested output, exceeds what the model can hold."""

    def __init__(self, *, limit: int, num_prompt_tokens: int, num_output_tokens: int | None, param: str) -> None:
        if num_output_tokens is None:
            asked = f"your prompt has {num_prompt_tokens} tokens"
        else:
            total = num_prompt_tokens + num_output_tokens
            asked = (
                f"you requested {total} tokens ({num_prompt_tokens} in the prompt, "
                f"{num_output_tokens} for the completion)"
            )
        super().__init__(
            f"This model's maximum context length is {limit} tokens; {asked}. Please shorten it.",
            param=param,
            code="context_length_exceeded",
        )


class InvalidKey(ApiError):
    """401: no API key, or not one of ours. The key is never echoed."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            status=401,
            error_type="authentication_error",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


class UnknownModel(ApiError):
    """404: no model of this name is served."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"The model {name!r} does not exist.",
            status=404,
            error_type="invalid_request_error",
            code="model_not_found",
            param="model",
        )


class UnknownRequest(ApiError):
    """404: no request of this id is known, or not any more."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"No request {request_id!r} is known; ended ones are remembered for 15 minutes.",
            status=404,
            error_type="invalid_request_error",
            code="request_not_found",
            param="id",
        )


class NotAllowed(ApiError):
    """403: this key may not do that."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(
            message, status=403, error_type="permission_error", code="insufficient_permissions", param=param
        )


class RequestIdTaken(ApiError):
    """409: a request of this id is under way."""

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"A request with the id {request_id!r} is under way already.",
            status=409,
            error_type="invalid_request_error",
            code="request_id_in_use",
            param="request_id",
            headers={"x-should-retry": "false"},
        )


class RateLimited(ApiError):
    """429: the server is full, or this key has used up its share."""

    def __init__(
        self, message: str, *, retry_after_s: float, code: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(
            message,
            status=429,
            error_type="rate_limit_error",
            code=code,
            headers={**retry_after(retry_after_s), **(headers or {})},
        )


class ClientLeft(ApiError):
    """499: the client closed its connection before it had its answer; the status is for logs and metrics."""

    def __init__(self) -> None:
        super().__init__(
            "The client closed the connection.", status=499, error_type="invalid_request_error", code="client_gone"
        )


class Unavailable(ApiError):
    """503: nobody can serve this now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(
            message,
            status=503,
            error_type="server_error",
            code="service_unavailable",
            headers=retry_after(retry_after_s),
        )


class GenerationFailed(ApiError):
    """500: a sequence ended with an error of ours."""

    def __init__(self, message: str) -> None:
        super().__init__(message, status=500, error_type="server_error", code="internal_error")


def retry_after(seconds: float) -> dict[str, str]:
    """The `retry-after` header: whole seconds, at least 1 (RFC 9110, section 10.2.3)."""
    return {"retry-after": str(max(1, math.ceil(seconds)))}
