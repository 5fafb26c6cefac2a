"""A step's rows as the attention kernel takes them: in runs of consecutive tokens of one sequence."""

from __future__ import annotations

from collections.abc import Sequence as Many
from functools import cached_property

import numpy as np

from engine.attention_inputs import AttentionInputs, InputShape, TableRow, gather_plan

RUN_WORDS = 4
"""Of a run: its first token among T; how many; position of the first; address of its page table, from position 0."""
UNLIMITED = 1 << 40
"""The window of a row that sees everything."""


class PagedRows:
    """The rows of one step and window.

    Attributes:
        window: how many latest tokens a row sees, None for all.
    """

    def __init__(self, rows: Many[TableRow], window: int | None, shape: InputShape) -> None:
        self._rows = rows
        self._shape = shape
        self._runs: tuple[int, np.ndarray] | None = None
        self.window = window

    @cached_property
    def gathered(self) -> AttentionInputs:
        """For `engine.attention`, which reads other pages than the kernel does."""
        return gather_plan(self._rows, self.window, self._shape)

    def runs(self, num_tokens: int) -> np.ndarray:
        """Runs of at most so many tokens, `[n, RUN_WORDS]` int64, the most work first."""
        if self._runs is None or self._runs[0] != num_tokens:
            self._runs = num_tokens, self._cut(num_tokens)
        return self._runs[1]

    def _cut(self, num_tokens: int) -> np.ndarray:
        runs = []
        for row in self._rows:
            table = row.table.__array_interface__["data"][0]
            for begin in range(0, row.count, num_tokens):
                count = min(num_tokens, row.count - begin)
                runs.append((row.begin + begin, count, row.start + begin, table))
        window = self.window or UNLIMITED
        runs.sort(key=lambda run: run[1] * min(window, run[2] + run[1]), reverse=True)
        return np.array(runs, dtype=np.int64)
