"""Puts a whole message together from its events."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import UNSET

from gateway.api.responses import AnsweredCall, AnsweredFunction, AnswerMessage
from gateway.text.message_events import CallDelta, CallEnd, CallStart, ContentDelta, MessageEvent, ReasoningDelta


class MessageParts:
    """What the events of one message come to.

    Attributes:
        content, reasoning: texts in pieces.
        calls: calls begun so far, each with the pieces of its arguments.
    """

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[tuple[CallStart, list[str]]] = []

    def add(self, events: Iterable[MessageEvent]) -> None:
        """Take further events."""
        for event in events:
            match event:
                case ContentDelta(text):
                    self.content.append(text)
                case ReasoningDelta(text):
                    self.reasoning.append(text)
                case CallStart():
                    self.calls.append((event, []))
                case CallDelta(index, arguments):
                    self.calls[index][1].append(arguments)
                case CallEnd():
                    pass

    def message(self) -> AnswerMessage:
        """The message. Calls without content leave `content` null; without calls there is no `tool_calls`."""
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        calls = [
            AnsweredCall(start.call_id, AnsweredFunction(start.name, "".join(pieces))) for start, pieces in self.calls
        ]
        return AnswerMessage(
            content=content or (None if calls else ""),
            reasoning_content=reasoning or UNSET,
            reasoning=reasoning or UNSET,
            tool_calls=calls or UNSET,
        )
