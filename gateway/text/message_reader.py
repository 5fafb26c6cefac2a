"""Splits an output's text into reasoning, content and calls while it arrives.

Text that could still become a marker is held back, and released when it cannot, so no part of a marker is ever taken
for content. The events, joined, do not depend on how the text was cut.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection

import msgspec

from gateway.text import call_syntax
from gateway.text.inbox import Inbox, Steps
from gateway.text.message_events import CallDelta, CallEnd, CallStart, ContentDelta, MessageEvent, ReasoningDelta
from gateway.text.message_syntax import THINK, THINK_END, CallFormat

_ROUTINES = {
    None: call_syntax.plain,
    CallFormat.HERMES: call_syntax.hermes,
    CallFormat.LLAMA3: call_syntax.llama3,
    CallFormat.MISTRAL: call_syntax.mistral,
}


class ReadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a request's outputs are to be read.

    Attributes:
        calls: the form of calls; None where none may be made: everything is content then.
        functions: names of the functions that may be called.
        max_calls: calls beyond so many are left out; None for no bound.
        thinks: the model may begin with `<think>…</think>`.
        thinking: the prompt ends with an open `<think>` already.
        hidden_markers: markers that are control tokens: not shown where they turn out to be content.
    """

    calls: CallFormat | None = None
    functions: Collection[str] = ()
    max_calls: int | None = None
    thinks: bool = False
    thinking: bool = False
    hidden_markers: Collection[str] = ()

    @property
    def sees_markers(self) -> bool:
        """Whether anything but content is looked for."""
        return self.calls is not None or self.thinks


class MessageReader:
    """State of one output.

    Attributes:
        num_calls: calls begun so far.
        has_thought: there is reasoning, over or not.
    """

    def __init__(self, options: ReadOptions) -> None:
        self._options = options
        self._box = Inbox()
        self._events: list[MessageEvent] = []
        self._passes = not options.sees_markers
        self._num_begun = 0
        self.has_thought = options.thinks and options.thinking
        self._steps = self._message()
        next(self._steps)

    @property
    def num_calls(self) -> int:
        """Calls begun so far, those beyond `max_calls` left out."""
        limit = self._options.max_calls
        return self._num_begun if limit is None else min(limit, self._num_begun)

    def feed(self, text: str) -> list[MessageEvent]:
        """Add output text; returns what became sure."""
        if self._passes:
            return [ContentDelta(text)] if text else []
        if text:
            self._box.text += text
            next(self._steps)
        return self._drain()

    def finish(self) -> list[MessageEvent]:
        """The output is over; nothing may be fed any more."""
        if self._passes:
            return []
        self._box.ended = True
        next(self._steps, None)
        return self._drain()

    def _message(self) -> Steps[None]:
        yield
        if self._options.thinks:
            yield from self._reasoning()
        yield from _ROUTINES[self._options.calls](self._box, self)

    def _reasoning(self) -> Steps[None]:
        """`<think>…</think>` at the start; white space at its ends belongs to neither reasoning nor content."""
        box = self._box
        start = yield from box.skip_space(0)
        if (yield from box.literal(start, THINK)):
            box.drop(start + len(THINK))
        elif not self._options.thinking:
            return
        self.has_thought = True
        box.drop((yield from box.skip_space(0)))
        gap = yield from call_syntax.text_until(box, THINK_END, self._think)
        if gap is None:
            return
        box.drop(gap + len(THINK_END))
        box.drop((yield from box.skip_space(0)))

    def _drain(self) -> list[MessageEvent]:
        events, self._events = self._events, []
        return events

    def _think(self, text: str) -> None:
        self._events.append(ReasoningDelta(text))

    # what the routines of `call_syntax` tell

    def content(self, text: str) -> None:
        """More content."""
        self._events.append(ContentDelta(text))

    def marker(self, text: str) -> None:
        """A marker that turned out to be content."""
        if text not in self._options.hidden_markers:
            self.content(text)

    def offers(self, name: str) -> bool:
        """Whether a function of this name may be called."""
        return name in self._options.functions

    def start(self, name: str) -> None:
        """A call begins."""
        self._num_begun += 1
        self._tell(CallStart(self._num_begun - 1, f"call_{uuid.uuid4().hex[:24]}", name))

    def arguments(self, text: str) -> None:
        """More of its arguments."""
        self._tell(CallDelta(self._num_begun - 1, text))

    def end(self) -> None:
        """It is complete."""
        self._tell(CallEnd(self._num_begun - 1))

    def called(self) -> bool:
        """Whether a call has begun already."""
        return self._num_begun > 0

    def _tell(self, event: CallStart | CallDelta | CallEnd) -> None:
        if self._options.max_calls is None or event.index < self._options.max_calls:
            self._events.append(event)
