"""Page tables of running sequences as arrays, brought up to date by what was appended since the last step."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from engine.sequence import Sequence

_SPARE = 1.5  # room to grow, so that a table is copied a few times in its life and not at every page


class PageArray:
    """One sequence's page table, `[n]` int64, with its lowest and highest page id (0 and -1 where it is empty)."""

    def __init__(self, table: list[int]) -> None:
        self._table = table
        self._pages = np.array(table, dtype=np.int64)
        self._length = len(table)
        self.lowest, self.highest = (min(table), max(table)) if table else (0, -1)

    def __len__(self) -> int:
        return self._length

    def first(self, num_pages: int) -> np.ndarray:
        """The first pages; a view, not to be mutated."""
        return self._pages[:num_pages]

    def follow(self, table: list[int]) -> bool:
        """Take over what was appended; False if this is another table, or one that lost pages."""
        if table is not self._table or len(table) < self._length:
            return False
        fresh = table[self._length :]
        if fresh:
            length = self._length + len(fresh)
            if length > len(self._pages):
                grown = np.empty(int(length * _SPARE), dtype=np.int64)
                grown[: self._length] = self._pages[: self._length]
                self._pages = grown
            self._pages[self._length : length] = fresh
            known = (self.lowest, self.highest) if self._length else ()
            self.lowest, self.highest = min((*known, *fresh)), max((*known, *fresh))
            self._length = length
        return True


class PageTables:
    """Page arrays by sequence, for as long as it lives. A step's cost is by what is new, not by the context.

    Relies on how schedulers write `Sequence.page_table`: a list only grows; another table is another list. Not
    thread-safe: all on the step thread.
    """

    def __init__(self) -> None:
        self._arrays: WeakKeyDictionary[Sequence, PageArray] = WeakKeyDictionary()

    def of(self, sequence: Sequence) -> PageArray:
        """The sequence's table as it is now."""
        array = self._arrays.get(sequence)
        if array is None or not array.follow(sequence.page_table):
            array = self._arrays[sequence] = PageArray(sequence.page_table)
        return array
