"""The OpenAI stream: from server-sent events to the few facts that the measure needs."""

import email.utils
from array import array
from datetime import UTC, datetime
from typing import Any

import msgspec

from loadtest.errors import BadAnswer
from loadtest.record import Tally
from loadtest.sse import Event, SseParser

_MAX_ERROR_BYTES = 16 * 1024
_FAILED_FINISHES = {"abort", "error", "cancelled"}


class Usage(msgspec.Struct, gc=False):
    """Token counts as the server reports them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    def has_content(self) -> bool:
        """Whether the model wrote something here: a role alone or an empty string is nothing."""
        if self.text:
            return True
        delta = self.delta
        return delta is not None and bool(
            delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls
        )


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class StreamSink:
    """Takes one streamed answer (a :class:`~loadtest.connection.Sink`); read its fields afterwards.

    ``content_at_s`` holds the clock time of each chunk that carried content; events that came in one read
    share a time. ``failure`` is the first reason to count the answer as failed, None for a good one.
    Mutates: ``tally.num_chunks``, live; ``heard``, if given, gets the text piece by piece.
    """

    def __init__(self, tally: Tally, heard: list[str] | None = None) -> None:
        self._tally = tally
        self._heard = heard
        self._parser = SseParser()
        self._error_body = b""
        self._content_type = ""
        self.status: int | None = None
        self.retry_after_s: float | None = None
        self.content_at_s = array("d")
        self.num_events = 0
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.failure: str | None = None
        self.broken = False  # failed because the answer could not be read, not because it said so

    def on_head(self, status: int, headers: dict[str, str], at_s: float) -> None:  # noqa: ARG002
        """Note the status, and what a rejection says about coming back."""
        self.status = status
        self._content_type = headers.get("content-type", "")
        if "retry-after" in headers:
            self.retry_after_s = parse_retry_after(headers["retry-after"], datetime.now(UTC))

    def on_body(self, data: bytes, at_s: float) -> None:
        """Parse the events in ``data``; keep the body of an error answer for its message."""
        if self.status != 200:
            self._error_body += data[: _MAX_ERROR_BYTES - len(self._error_body)]
            return
        if self.broken:
            return
        try:
            events = self._parser.feed(data)
            for event in events:
                self._event(event, at_s)
        except (BadAnswer, msgspec.DecodeError, UnicodeError) as error:
            self.broken = True
            self.failure = self.failure or f"unreadable stream: {error}"

    def error_message(self) -> str:
        """Return what the body of an answer other than 200 says, cut short."""
        return message_of(self._error_body)

    def fault(self) -> str | None:
        """Return why a stream that ended without an HTTP error is still not whole, None if it is whole."""
        if self.num_events == 0:
            return f"no server-sent events in the answer (content type {self._content_type!r})"
        if not self.done and self.finish_reason is None:
            return "the stream ended without a finish reason or [DONE]"
        return None

    def _event(self, event: Event, at_s: float) -> None:
        self.num_events += 1
        if event.data == b"[DONE]":
            self.done = True
            return
        if event.kind == "error":
            self.failure = self.failure or f"error event: {message_of(event.data)}"
            return
        chunk = _decode(event.data)
        if chunk.error is not None:
            self.failure = self.failure or f"error event: {message_of(event.data)}"
            return
        if chunk.usage is not None:
            self.usage = chunk.usage
        has_content = False
        for choice in chunk.choices or ():
            has_content = has_content or choice.has_content()
            if self._heard is not None and choice.delta is not None and choice.delta.content:
                self._heard.append(choice.delta.content)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason
                if choice.finish_reason in _FAILED_FINISHES:
                    self.failure = self.failure or f"finish reason {choice.finish_reason!r}"
        if has_content:
            self.content_at_s.append(at_s)
            self._tally.num_chunks += 1


def message_of(body: bytes) -> str:
    """Return the message inside an OpenAI error body, or the start of the body itself."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError):
        return body[:200].decode("utf-8", "replace").strip()
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and key in answer:
            answer = answer[key]
    return str(answer)[:200]


def parse_retry_after(value: str, now: datetime) -> float | None:
    """Read a Retry-After header (RFC 9110, 10.2.3: seconds or a date); seconds from ``now``, None if bad."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (email.utils.parsedate_to_datetime(value) - now).total_seconds()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if seconds < float("inf") else None
