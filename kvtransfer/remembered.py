"""A dictionary that forgets: by age, and the oldest first when it grows too large."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """Values for `memory_s` after their last `put`, at most `max_entries`. Times are seconds of one steady clock."""

    def __init__(self, *, memory_s: float, max_entries: int) -> None:
        self._memory_s = memory_s
        self._max_entries = max_entries
        self._entries: OrderedDict[K, tuple[V, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: K, value: V, now_s: float) -> None:
        """Remember from now on, in place of a former value. Forgets what is too old or too much."""
        self._entries.pop(key, None)
        self._entries[key] = (value, now_s + self._memory_s)
        while len(self._entries) > self._max_entries or next(iter(self._entries.values()))[1] <= now_s:
            self._entries.popitem(last=False)

    def get(self, key: K, now_s: float) -> V | None:
        """The value, or None once forgotten."""
        entry = self._entries.get(key)
        return entry[0] if entry is not None and entry[1] > now_s else None
