"""What an assistant's message is made of, in the order in which a reader of its text finds it.

Deltas of one kind join to the whole: all `ContentDelta` to the content, all `ReasoningDelta` to the reasoning, all
`CallDelta` of one index to that call's arguments. However the text was cut into pieces, the joined result is the same.
"""

from __future__ import annotations

import msgspec


class ContentDelta(msgspec.Struct, frozen=True):
    """More of what the model says to the user. Never empty."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers. Never empty."""

    text: str


class CallStart(msgspec.Struct, frozen=True):
    """A call of a function begins. Indexes count 0, 1, … within a message; a call ends before the next begins."""

    index: int
    call_id: str
    name: str


class CallDelta(msgspec.Struct, frozen=True):
    """More of a call's arguments, which are JSON text. Never empty."""

    index: int
    arguments: str


class CallEnd(msgspec.Struct, frozen=True):
    """The call is complete. Missing where the output was cut amid the call."""

    index: int


MessageEvent = ContentDelta | ReasoningDelta | CallStart | CallDelta | CallEnd
CallEvent = CallStart | CallDelta | CallEnd
