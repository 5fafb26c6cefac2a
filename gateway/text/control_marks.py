"""Keeps look-alikes of control tokens in user-supplied text from becoming control tokens.

A chat template mixes control tokens with user text into one string, so after rendering nobody can tell `<|im_end|>`
the control token from `<|im_end|>` that a user wrote. Before rendering, each occurrence of a special token's text in
user strings is wrapped in two marks; the template carries them along, and the rendered string is then cut inside
each wrapped look-alike, so that the tokenizer never sees it whole. Ordinary text carries no marks and is tokenized
exactly as without this.

The marks are Unicode noncharacters, chosen per conversation among those that the user's strings do not contain.
Only tokens that the tokenizer itself declares special count; others (`<think>`, say) are text to the tokenizer's
author and stay recognised.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


class ControlMarks:
    """Marks and cuts for one tokenizer. Immutable.

    Args:
        special_texts: spellings of the tokenizer's special tokens.
    """

    def __init__(self, special_texts: Iterable[str]) -> None:
        longest_first = sorted(set(special_texts), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches

    def found_in(self, text: str) -> bool:
        """Whether the text contains the spelling of a special token."""
        return self._special.search(text) is not None

    def protect(self, value: Any) -> tuple[Any, Marks | None]:
        """Mark look-alikes in all strings of a JSON-like value, keys (of a call's arguments, say) included.

        Returns the value (the same object if nothing had to be marked) and the marks used, None if none.
        Raises: ValueError if the strings use so many noncharacters that no two are left.
        """
        strings = list(_strings(value))
        if not any(map(self.found_in, strings)):
            return value, None
        free = [mark for mark in NONCHARACTERS if not any(mark in text or _escape(mark) in text for text in strings)]
        if len(free) < 2:
            raise ValueError("the text contains too many different Unicode noncharacters")
        marks = Marks(free[0], free[1], self._special)
        return _map_strings(value, marks.wrap), marks


class Marks:
    """The two marks of one conversation, and how to cut a rendered string at them."""

    def __init__(self, start: str, end: str, special: re.Pattern[str]) -> None:
        self.start = start
        self.end = end
        self._special = special
        self._wrapped = re.compile(f"{start}({special.pattern}){end}")
        self._any = re.compile(f"[{start}{end}]")

    def wrap(self, text: str) -> str:
        """The text with each look-alike between the two marks."""
        return self._special.sub(lambda match: f"{self.start}{match[0]}{self.end}", text)

    def cut(self, rendered: str) -> list[str]:
        """The rendered text without marks, cut inside each wrapped look-alike and at stray marks."""
        # Templates that escape non-ASCII in JSON turn a mark into its escape
        for mark in (self.start, self.end):
            rendered = rendered.replace(_escape(mark), mark)
        seamed = self._wrapped.sub(lambda match: f"{match[1][0]}{self.end}{match[1][1:]}", rendered)
        return self._any.split(seamed)


def _escape(mark: str) -> str:
    return f"\\u{ord(mark):04x}"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value
