"""A response as its sequence of typed events.

What is told depends on the response and on what the narrator is given, on nothing else: a second gateway that is given
the same pieces tells the same events, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fleet.types import FinishReason
from gateway.api.logprobs import TokenSpeller, chat_logprobs
from gateway.api.responses import ChatTokenLogprob, Usage
from gateway.api.responses_api.objects import (
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputTextPart,
    ReasoningTextPart,
    ResponseError,
    ResponseObject,
    ResponseUsage,
    Status,
)
from gateway.api.sse import json_text, json_value, typed_event
from gateway.errors import ApiError
from gateway.text.assembler import TextToken

ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}
"""Codes that published clients know, by HTTP status; the rest is `server_error`."""


class Narrator:
    """Tells one response. Methods return events as bytes; the first has sequence number 0.

    Args:
        response: as created. Mutates: its status, output, usage and error.
        spell: writes tokens; None without log-probabilities.

    Attributes:
        next_number: sequence number of the next event, which is how many have been told.
    """

    def __init__(self, response: ResponseObject, spell: TokenSpeller | None, *, num_top_logprobs: int = 0) -> None:
        self.response = response
        self.next_number = 0
        self._spell = spell
        self._num_top = num_top_logprobs
        self._open: OutputItem | None = None
        self._delta_head = b""
        self._pieces: list[str] = []  # of the open item
        self._logprobs: list[ChatTokenLogprob] = []

    # the response's own life

    def created(self) -> bytes:
        """The first event; a response that waits in the background is also told to be queued."""
        events = self._lifecycle("response.created")
        return events + self._lifecycle("response.queued") if self.response.status == "queued" else events

    def started(self) -> bytes:
        """It is being computed."""
        self.response.status = "in_progress"
        return self._lifecycle("response.in_progress")

    def finished(self, reason: FinishReason, usage: Usage) -> bytes:
        """The last events: `response.completed`, or `response.incomplete` when the output was cut."""
        cut = reason is FinishReason.LENGTH
        events = b"" if self._open or self.response.output else self._open_message()  # an empty answer is an answer
        events += self._close("incomplete" if cut else "completed")
        response = self.response
        details = usage.completion_tokens_details
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            input_tokens_details=InputDetails(usage.prompt_tokens_details.cached_tokens),
            output_tokens_details=OutputDetails(details.reasoning_tokens if details else 0),
        )
        if cut:
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        return events + self._last("incomplete" if cut else "completed")

    def failed(self, error: ApiError) -> bytes:
        """The last events of a response that broke."""
        events = self._close("incomplete")
        self.response.error = ResponseError(ERROR_CODES.get(error.status, "server_error"), error.message)
        return events + self._last("failed")

    def _last(self, status: Status) -> bytes:
        self.response.status = status
        self.response.completed_at = int(time.time())
        return self._lifecycle(f"response.{status}")

    def _lifecycle(self, kind: str) -> bytes:
        return self._event(kind, response=self.response)

    # its output

    def text(self, text: str, tokens: Sequence[TextToken] = ()) -> bytes:
        """More of the answer, with the tokens that became sure with it."""
        entries = []
        if self._spell is not None:
            entries = chat_logprobs(tokens, self._spell, num_top=self._num_top)
        events = b"" if isinstance(self._open, OutputMessage) else self._open_message()
        self._pieces.append(text)
        self._logprobs += entries
        logprobs = json_value(entries) if entries else b"[]"
        return events + self._delta(text, b',"logprobs":' + logprobs)

    def end_tokens(self, tokens: Sequence[TextToken]) -> bytes:
        """Tokens without text of their own, such as the one that ends the answer."""
        if self._spell is None or not tokens or not isinstance(self._open, OutputMessage):
            return b""
        return self.text("", tokens)

    def reasoning(self, text: str) -> bytes:
        """More of the thinking before the answer."""
        events = b"" if isinstance(self._open, OutputReasoning) else self._open_reasoning()
        self._pieces.append(text)
        return events + self._delta(text)

    def call(self, name: str) -> bytes:
        """A call begins."""
        events = self._close("completed")
        place = len(self.response.output)
        item = OutputFunctionCall(
            id=self._item_id("fc"),
            call_id=f"call_{self._suffix()}_{place}",
            name=name,
            arguments="",
            status="in_progress",
        )
        self._delta_head = self._begin_delta("response.function_call_arguments.delta", item.id, None)
        return events + self._begin(item)

    def arguments(self, text: str) -> bytes:
        """More of the arguments of the call that began last."""
        self._pieces.append(text)
        return self._delta(text)

    def call_done(self) -> bytes:
        """The call that began last is complete."""
        return self._close("completed")

    def _open_message(self) -> bytes:
        events = self._close("completed")
        item = OutputMessage(id=self._item_id("msg"), content=[], status="in_progress")
        self._delta_head = self._begin_delta("response.output_text.delta", item.id, 0)
        events += self._begin(item)
        return events + self._part("response.content_part.added", OutputTextPart(text=""))

    def _open_reasoning(self) -> bytes:
        events = self._close("completed")
        item = OutputReasoning(id=self._item_id("rs"), content=[], status="in_progress")
        self._delta_head = self._begin_delta("response.reasoning_text.delta", item.id, 0)
        events += self._begin(item)
        return events + self._part("response.content_part.added", ReasoningTextPart(text=""))

    def _begin(self, item: OutputItem) -> bytes:
        self._open = item
        self._pieces = []
        self._logprobs = []
        return self._event("response.output_item.added", output_index=len(self.response.output), item=item)

    def _close(self, status: str) -> bytes:
        """End the open item, if there is one, and make it part of the output."""
        item, text = self._open, "".join(self._pieces)
        if item is None:
            return b""
        place = {"item_id": item.id, "output_index": len(self.response.output)}
        match item:
            case OutputMessage():
                part = OutputTextPart(text=text, logprobs=self._logprobs)
                item.content.append(part)
                events = self._event(
                    "response.output_text.done", **place, content_index=0, text=text, logprobs=self._logprobs
                )
                events += self._part("response.content_part.done", part)
            case OutputReasoning():
                thought = ReasoningTextPart(text=text)
                item.content.append(thought)
                events = self._event("response.reasoning_text.done", **place, content_index=0, text=text)
                events += self._part("response.content_part.done", thought)
            case OutputFunctionCall():
                item.arguments = text
                events = self._event("response.function_call_arguments.done", **place, name=item.name, arguments=text)
        item.status = status
        events += self._event("response.output_item.done", output_index=place["output_index"], item=item)
        self.response.output.append(item)
        self._open = None
        return events

    def _part(self, kind: str, part: OutputTextPart | ReasoningTextPart) -> bytes:
        assert self._open is not None, "parts belong to an open item"  # noqa: S101 (our own invariant)
        return self._event(
            kind, item_id=self._open.id, output_index=len(self.response.output), content_index=0, part=part
        )

    def _begin_delta(self, kind: str, item_id: str, content_index: int | None) -> bytes:
        """What is the same in all deltas of an item, encoded once."""
        content = b"" if content_index is None else b'"content_index":%d,' % content_index
        return b'event: %b\ndata: {"type":"%b","item_id":%b,"output_index":%d,%b"delta":' % (
            kind.encode(),
            kind.encode(),
            json_text(item_id),
            len(self.response.output),
            content,
        )

    def _delta(self, text: str, extra: bytes = b"") -> bytes:
        number = self.next_number
        self.next_number += 1
        return b'%b%b%b,"sequence_number":%d}\n\n' % (self._delta_head, json_text(text), extra, number)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number = self.next_number
        self.next_number += 1
        return typed_event(kind, {"type": kind, **fields, "sequence_number": number})

    def _suffix(self) -> str:
        return self.response.id.removeprefix("resp_")

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._suffix()}_{len(self.response.output)}"
