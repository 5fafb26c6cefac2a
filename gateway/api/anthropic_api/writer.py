"""Writes one message: block by block as events, and as the object that they come to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from fleet.types import FinishReason
from gateway.api.anthropic_api.objects import (
    AnsweredBlock,
    AnsweredText,
    AnsweredThinking,
    AnsweredToolUse,
    Message,
    MessageUsage,
    StopReason,
)
from gateway.api.sse import typed_event
from gateway.text.message_events import CallDelta, CallEnd, CallStart, ContentDelta, MessageEvent, ReasoningDelta


class MessageWriter:
    """Turns message events into events of the Messages API. Mutates: the message, which is whole after `finished`.

    Attributes:
        message: as far as it is known.
    """

    def __init__(self, message: Message) -> None:
        self.message = message
        self._index = -1
        self._open: AnsweredBlock | None = None
        self._pieces: list[str] = []
        self._num_calls = 0

    def started(self, usage: MessageUsage) -> bytes:
        """The first event."""
        self.message.usage = usage
        return typed_event("message_start", {"type": "message_start", "message": self.message})

    def told(self, events: Iterable[MessageEvent]) -> bytes:
        """What further events of the message are here."""
        return b"".join([self._tell(event) for event in events])

    def finished(
        self, finish: FinishReason, usage: MessageUsage, *, stop_sequence: str | None, out_of_room: bool
    ) -> bytes:
        """The last events. `out_of_room`: the model's length left less room than was asked for."""
        events = self._close()
        message = self.message
        message.usage = usage
        message.stop_sequence = stop_sequence
        message.stop_reason = self._reason(finish, stop_sequence, out_of_room=out_of_room)
        delta = {"stop_reason": message.stop_reason, "stop_sequence": stop_sequence}
        events += typed_event("message_delta", {"type": "message_delta", "delta": delta, "usage": usage})
        return events + typed_event("message_stop", {"type": "message_stop"})

    def _tell(self, event: MessageEvent) -> bytes:
        match event:
            case ContentDelta(text):
                start = b"" if isinstance(self._open, AnsweredText) else self._begin(AnsweredText(""))
                return start + self._delta(text, {"type": "text_delta", "text": text})
            case ReasoningDelta(text):
                start = b"" if isinstance(self._open, AnsweredThinking) else self._begin(AnsweredThinking(""))
                return start + self._delta(text, {"type": "thinking_delta", "thinking": text})
            case CallStart(call_id=call_id, name=name):
                return self._begin(AnsweredToolUse("toolu_" + call_id.removeprefix("call_"), name, {}))
            case CallDelta(arguments=arguments):
                return self._delta(arguments, {"type": "input_json_delta", "partial_json": arguments})
            case CallEnd():
                self._num_calls += 1
                return self._close()

    def _begin(self, block: AnsweredBlock) -> bytes:
        events = self._close()
        self._index += 1
        self._open = block
        return events + self._event("content_block_start", content_block=block)

    def _delta(self, text: str, delta: dict[str, str]) -> bytes:
        self._pieces.append(text)
        return self._event("content_block_delta", delta=delta)

    def _close(self) -> bytes:
        """End the open block, if one is open, and keep it."""
        block, text = self._open, "".join(self._pieces)
        if block is None:
            return b""
        self._open = None
        self._pieces.clear()
        match block:
            case AnsweredText():
                block.text = text
            case AnsweredThinking():
                block.thinking = text
            case AnsweredToolUse():
                block.input = _arguments(text)
        self.message.content.append(block)
        return self._event("content_block_stop")

    def _event(self, kind: str, **fields: Any) -> bytes:
        return typed_event(kind, {"type": kind, "index": self._index, **fields})

    def _reason(self, finish: FinishReason, stop_sequence: str | None, *, out_of_room: bool) -> StopReason:
        if stop_sequence is not None:
            return "stop_sequence"
        if finish is FinishReason.LENGTH:
            return "model_context_window_exceeded" if out_of_room else "max_tokens"
        return "tool_use" if self._num_calls else "end_turn"


def _arguments(text: str) -> dict[str, Any]:
    """Arguments as an object; empty where the output broke off amid them, which the stop reason tells."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return {}
