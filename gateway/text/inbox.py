"""Text that arrives in pieces, read by generators that wait for more with a bare `yield`.

A routine is `Steps[T]`: it yields nothing but pauses and returns what it read. A place is an offset into the unread
text; reading moves no text away until `drop` is called, so a routine can give up and leave everything unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

import msgspec

T = TypeVar("T")
Steps = Generator[None, None, T]

SPACE = " \t\r\n"
_STRING_STOP = re.compile(r'["\\]')
_NOT_PART_OF_JSON = re.compile(r'[^\s\w{}\[\]:,.+"-]', re.ASCII)
_STRUCTURE = re.compile(r'["{}\[\],]|[^\s\w{}\[\]:,.+"-]', re.ASCII)


class Malformed(Exception):
    """The text is not what a routine expected."""


class CutOff(Malformed):
    """The output ended amid what a routine was reading."""


def _stay(place: int) -> int:
    return place


class Inbox:
    """Unread text of one output.

    Attributes:
        text: unread.
        ended: no more will come.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ended = False

    def drop(self, length: int) -> None:
        """Mark the first `length` characters as read; every place moves down by as many."""
        self.text = self.text[length:]

    def more(self) -> Steps[None]:
        """Wait for more text. Raises: CutOff if there is none to come."""
        if self.ended:
            raise CutOff
        yield

    def char(self, place: int) -> Steps[str]:
        """The character at a place. Raises: CutOff at the end."""
        while place >= len(self.text):
            yield from self.more()
        return self.text[place]

    def skip_space(self, place: int) -> Steps[int]:
        """The first place from `place` on that holds no white space, the end of everything included."""
        while True:
            while place < len(self.text) and self.text[place] in SPACE:
                place += 1
            if place < len(self.text) or self.ended:
                return place
            yield

    def literal(self, place: int, expected: str) -> Steps[bool]:
        """Whether `expected` stands at a place."""
        while True:
            found = self.text[place : place + len(expected)]
            if found == expected:
                return True
            if not expected.startswith(found) or self.ended:
                return False
            yield

    def string(self, place: int) -> Steps[tuple[str, int]]:
        """The JSON string that begins at a place, decoded, and the place after it. Raises: Malformed."""
        if (yield from self.char(place)) != '"':
            raise Malformed
        end = yield from self.string_end(place + 1)
        try:
            return msgspec.json.decode(self.text[place:end], type=str), end
        except (msgspec.DecodeError, UnicodeError) as error:
            raise Malformed from error

    def string_end(self, place: int, passing: Callable[[int], int] = _stay) -> Steps[int]:
        """The place after the closing quote of a string whose inside holds `place`.

        `passing` is called with the place reached before each wait; it may drop text and returns the place's new value.
        """
        while True:
            stop = _STRING_STOP.search(self.text, place)
            if stop is None:
                ahead = max(0, place - len(self.text))  # an escaped character that is still to come
                place = passing(len(self.text)) + ahead
                yield from self.more()
            elif stop[0] == '"':
                return stop.end()
            else:
                place = stop.end() + 1  # past what the backslash escapes, which may be still to come

    def value_end(self, place: int, passing: Callable[[int], int] = _stay) -> Steps[int]:
        """The place after the JSON value that begins at a place; see `string_end` for `passing`.

        Brackets and strings are followed, the rest is taken on trust. Raises: Malformed at a character that cannot be
        part of JSON there, without passing it; the place it stands at is then given to `passing`.
        """
        depth = 0
        if (yield from self.char(place)) not in '{["' and _NOT_PART_OF_JSON.match(self.text, place):
            raise Malformed
        while True:
            found = _STRUCTURE.search(self.text, place)
            if found is None:
                place = passing(len(self.text))
                yield from self.more()
                continue
            mark = found[0]
            if mark == '"':
                place = yield from self.string_end(found.end(), passing)
            elif mark in "{[":
                depth += 1
                place = found.end()
            elif mark in "}],":
                if depth == 0:
                    return found.start()  # a number or a word ends where the object around it goes on
                depth -= mark != ","
                place = found.end()
            else:
                passing(found.start())
                raise Malformed
            if depth == 0:
                return place
