"""A discrete-event simulation of a fleet under a load of requests, around a real request table.

Time is whole milliseconds, chance is seeded. Prompts are computed one after the other, most urgent first, as a prefill
worker does; a sequence then keeps its seat for a random time. What clients would see is the outcome.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

from fleet.messages import PrefillRequest, RequestFinished
from fleet.types import FinishReason, Role
from gateway.errors import Overloaded
from gateway.live import LiveRequest
from support.request_fleet import Fleet, tokens

TIERS = {-100: 0.1, 0: 0.8, 100: 0.1}
"""Priority and share of the requests."""


@dataclass
class Outcome:
    """One request. Times in ms; None for what did not happen."""

    priority: int
    came_ms: int
    live: LiveRequest | None = None
    dispatched_ms: int | None = None
    first_ms: int | None = None
    refused_ms: int | None = None
    told_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """To the first token. Requires: it came."""
        assert self.first_ms is not None
        return (self.first_ms - self.came_ms) / 1000


@dataclass
class Load:
    """Arrivals per second from `from_s` to `to_s`."""

    per_s: float
    from_s: float
    to_s: float


@dataclass
class Simulation:
    """`seats` sequences at once of `mean_ms` each, prompts of `prompt_ms` each one after the other.

    Args:
        spread: of residence times: 0 for equal ones, 1 for exponential ones.
    """

    monkeypatch: pytest.MonkeyPatch
    max_wait_s: float
    seed: int = 0
    seats: int = 8
    mean_ms: int = 889
    prompt_ms: int = 20
    spread: float = 1.0
    outcomes: list[Outcome] = field(default_factory=list)
    num_ended: Counter[int] = field(default_factory=Counter)  # by second

    def __post_init__(self) -> None:
        self._now_ms = 1_000_000
        self._began_ms = self._now_ms
        self.monkeypatch.setattr(time, "monotonic", lambda: self._now_ms / 1000)
        self._random = random.Random(self.seed)
        self._events: list[tuple[int, int, str, str]] = []
        self._ticket = itertools.count()
        self._by_id: dict[str, Outcome] = {}
        self._prompts: list[tuple[int, int, str]] = []
        self._computing = False
        self.fleet = Fleet(max_queued=512, max_wait_s=self.max_wait_s)
        self._prefill = self.fleet.join("p", Role.PREFILL)
        self.fleet.join("d", Role.DECODE, seats=self.seats)
        self.fleet.directory.workers(role=Role.DECODE)[0].free_tokens = 10**9

    def run(self, *loads: Load) -> list[Outcome]:
        """Play all loads to the end of the last request. Returns the outcomes in order of arrival."""
        for load in loads:
            at_s = load.from_s
            while (at_s := at_s + self._random.expovariate(load.per_s)) < load.to_s:
                priority = self._random.choices(list(TIERS), weights=list(TIERS.values()))[0]
                outcome = Outcome(priority, self._began_ms + int(at_s * 1000))
                self.outcomes.append(outcome)
                name = f"r{len(self.outcomes)}"
                self._by_id[name] = outcome
                self._at(outcome.came_ms, "arrive", name)
        while self._events:
            self._now_ms, _, what, name = heapq.heappop(self._events)
            {"arrive": self._arrive, "computed": self._computed, "end": self._end}[what](name)
            self._follow()
        return sorted(self.outcomes, key=lambda outcome: outcome.came_ms)

    def _at(self, time_ms: int, what: str, name: str) -> None:
        heapq.heappush(self._events, (time_ms, next(self._ticket), what, name))

    def _arrive(self, name: str) -> None:
        outcome = self._by_id[name]
        try:
            outcome.live = self.fleet.admit(name, priority=outcome.priority)
        except Overloaded as refusal:
            outcome.refused_ms, outcome.told_s = self._now_ms, refusal.retry_after_s

    def _computed(self, name: str) -> None:
        self._computing = False
        outcome = self._by_id[name]
        if outcome.live is None or outcome.live.ended:
            return
        outcome.first_ms = self._now_ms
        self.fleet.say(self._prefill, tokens(0, 7, request_id=name))
        stay_ms = (1 - self.spread) * self.mean_ms + self.spread * self._random.expovariate(1 / self.mean_ms)
        self._at(self._now_ms + int(stay_ms), "end", name)

    def _end(self, name: str) -> None:
        self.num_ended[(self._now_ms - self._began_ms) // 1000] += 1
        ending = RequestFinished(request_id=name, epoch=0, reason=FinishReason.STOP, num_output_tokens=1)
        self.fleet.say(self._prefill, ending)

    def _follow(self) -> None:
        """What the table has sent and whom it has pushed out since."""
        for _, message in self.fleet.bus.sent:
            if isinstance(message, PrefillRequest):
                name = message.passport.request_id
                self._by_id[name].dispatched_ms = self._now_ms
                heapq.heappush(self._prompts, (message.passport.priority, next(self._ticket), name))
        self.fleet.bus.sent.clear()
        for outcome in self.outcomes:
            live = outcome.live
            if live is not None and live.displaced and outcome.refused_ms is None:
                outcome.refused_ms, outcome.told_s = self._now_ms, live.retry_after_s or 0.0
        if self._prompts and not self._computing:
            self._computing = True
            self._at(self._now_ms + self.prompt_ms, "computed", heapq.heappop(self._prompts)[2])
