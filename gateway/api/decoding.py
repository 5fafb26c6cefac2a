"""Request bytes to checked structs, with every failure a 400 that names the field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.exceptions import InternalServerException

from gateway.errors import ApiError, ClientLeft, InvalidRequest

Body = TypeVar("Body", bound=msgspec.Struct)
Converted = TypeVar("Converted")
PATH = re.compile(r"(?P<message>.*?)(?: - at (?:`key` in )?`\$(?P<path>[^`]*)`)?\Z", re.DOTALL)
UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
MISSING = re.compile(r"Object missing required field `(.*)`\Z")


async def read_body(request: Request[Any, Any, Any], decoder: msgspec.json.Decoder[Body]) -> Body:
    """Read and decode the body.

    Raises: InvalidRequest; ApiError 415 for a declared type other than JSON; Litestar's 413 for a large body;
    ClientLeft if the body ends amid.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise ApiError(
            f"Unsupported content type {media_type[:100]!r}; send application/json.",
            status=415,
            error_type="invalid_request_error",
            code="unsupported_media_type",
        )
    try:
        data = await request.body()
    except InternalServerException as error:  # what Litestar makes of a client that leaves
        raise ClientLeft from error
    return decode_body(data, decoder)


def decode_body(data: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode strictly. Raises: InvalidRequest."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _invalid_field(str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("The request body is not valid UTF-8.", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from error
    except (msgspec.DecodeError, ValueError, OverflowError) as error:
        message = f"We could not parse the JSON body of your request: {error}"
        raise InvalidRequest(message, code="invalid_json") from error


def convert_field(value: Any, to: type[Converted], *, at: str) -> Converted:
    """Check a part of a body that was decoded loosely; `at` is its path. Raises: InvalidRequest naming the field."""
    try:
        return msgspec.convert(value, to)
    except msgspec.ValidationError as error:
        text = str(error)
        text = text.replace(" - at `$", f" - at `${at}", 1) if " - at `$" in text else f"{text} - at `${at}`"
        raise _invalid_field(text) from error


def _invalid_field(text: str) -> InvalidRequest:
    """Translate msgspec's sentence, which ends in the path of the field."""
    match = PATH.match(text)
    assert match is not None, "the pattern matches any text"  # noqa: S101 (our own invariant)
    message, path = match["message"], (match["path"] or "").removeprefix(".").removesuffix("[...]")
    if unknown := UNKNOWN.match(message):
        param = _join(path, unknown[1])
        return InvalidRequest(f"Unrecognized request argument: {param}", param=param, code="unknown_parameter")
    if missing := MISSING.match(message):
        param = _join(path, missing[1])
        return InvalidRequest(f"Missing required parameter: {param}", param=param, code="missing_required_parameter")
    if path.endswith(".type") and ".content[" in path:
        message = f"{message}: only text content is supported"
    if not path:
        return InvalidRequest(f"The request body must be a JSON object: {message}", code="invalid_json")
    return InvalidRequest(f"Invalid value for {path!r}: {message}", param=path, code="invalid_value")


def _join(path: str, name: str) -> str:
    return (f"{path}.{name}" if path else name)[:200]
