"""Requests that no worker has yet: in order of urgency, until there is room for them or nobody has come in time."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

from gateway.live import LiveRequest


class _Place(NamedTuple):
    """What was interrupted goes before what has not begun."""

    priority: int
    minus_epoch: int
    arrival: int


class _Held(NamedTuple):
    place: _Place
    live: LiveRequest
    since_s: float


class WaitingRoom:
    """By model. Waiting for room has no bound of its own; waiting for a first worker to come has one.

    Args:
        worker_wait_s: how long a request waits while nobody serves its model.
    """

    def __init__(self, worker_wait_s: float) -> None:
        self._worker_wait_s = worker_wait_s
        self._arrivals = itertools.count()
        self._held: defaultdict[str, list[_Held]] = defaultdict(list)
        self._places: dict[str, _Place] = {}
        self._deserted_s: dict[str, float] = {}

    def models(self) -> list[str]:
        """Models for which somebody waits."""
        return [model for model, held in self._held.items() if held]

    def enter(self, live: LiveRequest) -> None:
        """Hold a request that is not held."""
        place = _Place(live.passport.priority, -live.epoch, next(self._arrivals))
        self._places[live.request_id] = place
        insort(self._held[live.passport.model], _Held(place, live, time.monotonic()), key=lambda held: held.place)

    def first(self, model: str) -> LiveRequest | None:
        """Who is next."""
        held = self._held[model]
        return held[0].live if held else None

    def leave(self, live: LiveRequest) -> None:
        """It is on its way, or over. Idempotent."""
        place = self._places.pop(live.request_id, None)
        if place is not None:
            held = self._held[live.passport.model]
            del held[bisect_left(held, place, key=lambda one: one.place)]

    def mark(self, model: str, *, served: bool) -> None:
        """Whether anybody serves this model now. Patience begins when nobody does."""
        if served:
            self._deserted_s.pop(model, None)
        else:
            self._deserted_s.setdefault(model, time.monotonic())

    def overdue(self, model: str) -> list[LiveRequest]:
        """Those for whom nobody has come in time."""
        deserted_s = self._deserted_s.get(model)
        if deserted_s is None:
            return []
        before_s = time.monotonic() - self._worker_wait_s
        return [held.live for held in self._held[model] if max(held.since_s, deserted_s) <= before_s]
