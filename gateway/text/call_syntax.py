r"""The forms in which models write calls of functions.

- `hermes` (Hermes 2 Pro and later, Qwen 2.5, Qwen3): `<tool_call>{"name": …, "arguments": {…}}</tool_call>`
- `llama3` (Llama 3.1 to 3.3): `{"name": …, "parameters": {…}}`, at the start or after `<|python_tag|>`, several with
  `;` between
- `mistral` (Mistral, Ministral): `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, newer `[TOOL_CALLS]name[ARGS]{…}`

A call counts from where its function's name is known to be one on offer and its arguments begin. What does not get
that far is ordinary content, marker and all; what breaks later ends the call where it broke. Sources: the templates
that the models are published with, and https://github.com/NousResearch/Hermes-Function-Calling,
https://github.com/meta-llama/llama-models (`prompt_format.md`), https://github.com/mistralai/mistral-common.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

import msgspec

from gateway.text.inbox import SPACE, CutOff, Inbox, Malformed, Steps

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ARGUMENTS = frozenset({"arguments", "parameters"})
_NAME = re.compile(r"[A-Za-z0-9_.-]*")


class Sink(Protocol):
    """Takes what the routines find."""

    def content(self, text: str) -> None:
        """More content."""

    def marker(self, text: str) -> None:
        """A marker that turned out to be content; one that is a control token of the tokenizer is not shown."""

    def offers(self, name: str) -> bool:
        """Whether a function of this name may be called."""

    def start(self, name: str) -> None:
        """A call begins."""

    def arguments(self, text: str) -> None:
        """More of its arguments."""

    def end(self) -> None:
        """It is complete."""

    def called(self) -> bool:
        """Whether a call has begun already."""


def plain(box: Inbox, sink: Sink) -> Steps[None]:
    """Everything is content."""
    while True:
        if box.text:
            sink.content(box.text)
            box.drop(len(box.text))
        if box.ended:
            return
        yield


def hermes(box: Inbox, sink: Sink) -> Steps[None]:
    """Read a whole output."""
    while (gap := (yield from _content_until(box, sink, TOOL_CALL))) is not None:
        try:
            place = yield from _call_object(box, sink, gap + len(TOOL_CALL))
        except Malformed:
            _as_content(box, sink, gap, TOOL_CALL)
            continue
        box.drop((yield from box.skip_space(place)))
        if (yield from box.literal(0, TOOL_CALL_END)):
            box.drop(len(TOOL_CALL_END))


def llama3(box: Inbox, sink: Sink) -> Steps[None]:
    """Read a whole output. Without the tag a call must be the first thing in it."""
    start = yield from box.skip_space(0)
    if not (yield from box.literal(start, "{")) and (yield from _content_until(box, sink, PYTHON_TAG)) is None:
        return
    while True:
        start = yield from box.skip_space(0)
        tagged = len(PYTHON_TAG) if (yield from box.literal(start, PYTHON_TAG)) else 0
        try:
            place = yield from _call_object(box, sink, start + tagged)
        except Malformed:
            if tagged:
                _as_content(box, sink, start, PYTHON_TAG)
            if (yield from _content_until(box, sink, PYTHON_TAG)) is None:
                return
            continue
        place = yield from box.skip_space(place)
        if (yield from box.literal(place, ";")):
            place += 1
        box.drop((yield from box.skip_space(place)))
        if not (yield from box.literal(0, "{")) and (yield from _content_until(box, sink, PYTHON_TAG)) is None:
            return


def mistral(box: Inbox, sink: Sink) -> Steps[None]:
    """Read a whole output, in the older form or the newer."""
    while (gap := (yield from _content_until(box, sink, TOOL_CALLS))) is not None:
        try:
            start = yield from box.skip_space(gap + len(TOOL_CALLS))
            kind = yield from box.char(start)
            if kind == "[":
                yield from _call_list(box, sink, start + 1)
            elif kind == "{":
                box.drop((yield from _call_object(box, sink, start)))
            else:
                yield from _named_call(box, sink, start)
        except Malformed:
            _as_content(box, sink, gap, TOOL_CALLS)


def _as_content(box: Inbox, sink: Sink, gap: int, marker: str) -> None:
    """Let the marker after `gap` characters of white space be content, as they are; what follows is read anew."""
    if gap:
        sink.content(box.text[:gap])
    sink.marker(marker)
    box.drop(gap + len(marker))


def _content_until(box: Inbox, sink: Sink, marker: str) -> Steps[int | None]:
    """Hand on content as `text_until` does; white space after a call is dropped."""
    if sink.called():
        box.drop((yield from box.skip_space(0)))
    return (yield from text_until(box, marker, sink.content))


def text_until(box: Inbox, marker: str, take: Callable[[str], None]) -> Steps[int | None]:
    """Hand on text up to a marker. The marker and the white space before it stay unread; returns that space's length.

    None: the output ended without the marker, and all of it is handed on.
    """
    while True:
        place = box.text.find(marker)
        if place >= 0:
            text = box.text[:place].rstrip(SPACE)
        elif box.ended:
            text = box.text
        else:
            text = box.text[: _partial(box.text, marker)].rstrip(SPACE)
        if text:
            take(text)
        box.drop(len(text))
        if place >= 0:
            return place - len(text)
        if box.ended:
            return None
        yield


def _partial(text: str, marker: str) -> int:
    """Where the text could be about to become the marker, else its length."""
    for place in range(max(0, len(text) - len(marker) + 1), len(text)):
        if marker.startswith(text[place:]):
            return place
    return len(text)


def _call_list(box: Inbox, sink: Sink, place: int) -> Steps[None]:
    """Calls in a JSON array, from behind its bracket. Raises: Malformed, with nothing read, if no call begins."""
    box.drop((yield from _call_object(box, sink, place)))
    while True:
        box.drop((yield from box.skip_space(0)))
        if not (yield from box.literal(0, ",")):
            break
        try:
            box.drop((yield from _call_object(box, sink, 1)))
        except Malformed:
            return
    if (yield from box.literal(0, "]")):
        box.drop(1)


def _named_call(box: Inbox, sink: Sink, place: int) -> Steps[None]:
    """`name[ARGS]{…}`, as some versions write it with a call id between or without `[ARGS]`. Raises: Malformed."""
    name = yield from _name_at(box, place)
    place += len(name)
    if (yield from box.literal(place, CALL_ID)):
        place += len(CALL_ID)
        place += len((yield from _name_at(box, place)))
    if (yield from box.literal(place, ARGS)):
        place += len(ARGS)
    place = yield from box.skip_space(place)
    if not sink.offers(name) or (yield from box.char(place)) != "{":
        raise Malformed
    box.drop(place)
    yield from _call_with(box, sink, name)


def _name_at(box: Inbox, place: int) -> Steps[str]:
    while True:
        match = _NAME.match(box.text, place)
        if match is not None and match.end() < len(box.text):
            return match[0]
        yield from box.more()


def _call_object(box: Inbox, sink: Sink, place: int) -> Steps[int]:
    """A call as an object with name and arguments, in any order; returns the place after it.

    Raises: Malformed before a call has begun, with nothing read.
    """
    place = yield from box.skip_space(place)
    if (yield from box.char(place)) != "{":
        raise Malformed
    name = arguments = ""
    while not (name and arguments):
        place = yield from box.skip_space(place + 1)
        if (yield from box.char(place)) == "}":
            break
        key, place = yield from _key(box, place)
        if key == "name":
            name, place = yield from box.string(place)
            if not sink.offers(name):
                raise Malformed
        elif key in _ARGUMENTS and name:
            box.drop(place)
            yield from _call_with(box, sink, name)
            return (yield from _rest_of_object(box))
        else:
            end = yield from box.value_end(place)
            if key in _ARGUMENTS:
                arguments = _unquoted(box.text[place:end])
            place = end
        place = yield from box.skip_space(place)
        if (yield from box.char(place)) not in ",}":
            raise Malformed
        if box.text[place] == "}":
            break
    if not name:
        raise Malformed
    box.drop(place)
    sink.start(name)
    sink.arguments(arguments or "{}")
    sink.end()
    return (yield from _rest_of_object(box))


def _call_with(box: Inbox, sink: Sink, name: str) -> Steps[None]:
    """A call whose arguments stand at the front of the text; they are read away. Never raises."""

    def passing(place: int) -> int:
        if place:
            sink.arguments(box.text[:place])
            box.drop(place)
        return 0

    sink.start(name)
    try:
        if (yield from box.char(0)) == '"':  # some models quote the whole object
            end = yield from box.value_end(0)
            sink.arguments(_unquoted(box.text[:end]))
            box.drop(end)
        else:
            passing((yield from box.value_end(0, passing)))
    except CutOff:
        return
    except Malformed:
        pass
    sink.end()


def _rest_of_object(box: Inbox) -> Steps[int]:
    """The place after an object of which the text at the front is the rest; 0 where it does not go on as one."""
    place = 0
    try:
        while True:
            place = yield from box.skip_space(place)
            mark = yield from box.char(place)
            if mark == "}":
                return place + 1
            if mark != ",":
                return 0
            place = yield from box.skip_space(place + 1)
            _, place = yield from _key(box, place)
            place = yield from box.value_end(place)
    except Malformed:
        return 0


def _key(box: Inbox, place: int) -> Steps[tuple[str, int]]:
    """The key at a place, and the place of its value."""
    key, place = yield from box.string(place)
    place = yield from box.skip_space(place)
    if (yield from box.char(place)) != ":":
        raise Malformed
    return key, (yield from box.skip_space(place + 1))


def _unquoted(value: str) -> str:
    """The arguments in a JSON value: themselves, or what a JSON string holds."""
    if not value.startswith('"'):
        return value
    try:
        return msgspec.json.decode(value, type=str)
    except (msgspec.DecodeError, UnicodeError):
        return value
