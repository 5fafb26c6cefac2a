"""Requests that no worker has yet: in order of urgency, until there is room for them or nobody has come in time."""

from __future__ import annotations

import time
from collections import defaultdict

from gateway.line import Line
from gateway.live import LiveRequest


class WaitingRoom:
    """A line per model. Waiting for room has no bound of its own; waiting for a first worker to come has one.

    Args:
        worker_wait_s: how long a request waits while nobody serves its model.
    """

    def __init__(self, worker_wait_s: float) -> None:
        self._worker_wait_s = worker_wait_s
        self._lines: defaultdict[str, Line] = defaultdict(Line)
        self._deserted_s: dict[str, float] = {}

    def models(self) -> list[str]:
        """Models for which somebody waits."""
        return [model for model, line in self._lines.items() if len(line)]

    def line(self, model: str) -> Line:
        """Those who wait for this model."""
        return self._lines[model]

    def leave(self, live: LiveRequest) -> None:
        """It is over, or sent off anew. Idempotent."""
        self._lines[live.passport.model].leave(live)

    def mark(self, model: str, *, served: bool) -> None:
        """Whether anybody serves this model now. Patience begins when nobody does."""
        self._lines[model].halt(not served)
        if served:
            self._deserted_s.pop(model, None)
        else:
            self._deserted_s.setdefault(model, time.monotonic())

    def overdue(self, model: str) -> list[LiveRequest]:
        """Those for whom nobody has come in time."""
        deserted_s = self._deserted_s.get(model)
        before_s = time.monotonic() - self._worker_wait_s
        if deserted_s is None or deserted_s > before_s:
            return []
        return self._lines[model].here_before(before_s)
