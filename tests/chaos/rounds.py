"""One round: streams run, a fault strikes, all streams end as they would have, and nothing has leaked."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from itertools import cycle

import httpx

from chaos.arena import Arena
from chaos.asks import Ask, asks, probes
from chaos.faults import Fault, Struck, storm
from chaos.stock import Leaks
from chaos.streams import Answer, Judge, ask

NUM_PROBES = 8
PROBE_TOKENS = 16
RECOVERY_S = 2.0
NUM_BEFORE = 2
NUM_TRIES = 3
"""A message that a fault waits for may not pass: a worker that leaves may have nothing to move just then."""


@dataclass
class Outcome:
    """What one round came to.

    Attributes:
        title: of the fault.
        victim: whom it struck.
        hit: streams that ran when the fault struck, on the broken gateway only those of the other one.
        finished: of all streams that had to end well, how many did.
        pauses_s: of each stream that was hit, the longest gap after the strike.
        excused: streams of a gateway that was killed.
        throughput: tokens per second within two seconds after the fault, over those right before it.
        parts_s: where the time of the round went.
    """

    title: str
    victim: str
    streams: int = 0
    hit: int = 0
    finished: int = 0
    excused: int = 0
    lost: int = 0
    repeated: int = 0
    pauses_s: list[float] = field(default_factory=list)
    replays: float = 0.0
    migrations: float = 0.0
    throughput: float = 0.0
    leaks: Leaks = field(default_factory=Leaks)
    wrong: list[str] = field(default_factory=list)
    parts_s: dict[str, float] = field(default_factory=dict)

    @property
    def took_s(self) -> float:
        """All of it."""
        return sum(self.parts_s.values())


@dataclass
class _Running:
    asked: Ask
    gateway: str
    task: asyncio.Task[Answer]


class Rounds:
    """Plays rounds against an arena, with the same requests each time."""

    def __init__(self, arena: Arena, *, num_streams: int, max_tokens: int, num_storm: int, seed: int) -> None:
        self._arena = arena
        self._asks = asks(num_streams, seed=seed, max_tokens=max_tokens)
        self._num_storm = num_storm
        self._judge: Judge

    async def learn(self) -> None:
        """Hear what each request is answered while nothing happens, and how fast."""
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            url = next(iter(self._arena.urls.values()))
            first = [await ask(client, url, asked) for asked in self._asks if asked.stops]
            stopping = iter(first)
            self._asks = [asked.stopping_in(next(stopping).texts[0]) if asked.stops else asked for asked in self._asks]
            answers = await asyncio.gather(*(ask(client, url, asked) for asked in self._asks))
            for asked, answer in zip(self._asks, answers, strict=True):
                if answer.error:
                    raise RuntimeError(f"undisturbed request {asked.number}: {answer.error}")
            self._judge = Judge({asked.number: answer for asked, answer in zip(self._asks, answers, strict=True)})
            await self._probe(client)
        await asyncio.to_thread(self._arena.learn_idle)

    async def _probe(self, client: httpx.AsyncClient) -> float:
        """Tokens per second of a few short requests at once."""
        began_s = time.monotonic()
        urls = cycle(self._arena.urls.values())
        await asyncio.gather(*(ask(client, next(urls), one) for one in probes(NUM_PROBES, max_tokens=PROBE_TOKENS)))
        return NUM_PROBES * PROBE_TOKENS / (time.monotonic() - began_s)

    async def play(self, fault: Fault) -> Outcome:
        """One round of a fault, and another one where it had no occasion to strike."""
        wrong = list[str]()
        for _ in range(NUM_TRIES):
            outcome = await self._play(fault)
            outcome.wrong[:0] = wrong
            if outcome.victim or not fault.awaits:
                return outcome
            wrong = [*outcome.wrong, *outcome.leaks.others]
        outcome.wrong.append("what it waits for never came to pass")
        return outcome

    async def _play(self, fault: Fault) -> Outcome:
        arena, clock = self._arena, _Clock()
        outcome = Outcome(fault.title, arena.pick(fault.role) if fault.role else "", streams=len(self._asks))
        outcome.parts_s = clock.parts_s
        replays, migrations = arena.total("baton_replays_total"), arena.total("baton_migrations_total")
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            normal = max([await self._probe(client) for _ in range(NUM_BEFORE)])
            clock.lap("before")
            running, struck = await self._disturb(client, fault, outcome.victim)
            answers = [await one.task for one in running]
            outcome.victim = struck.victim
            self._judge_all(outcome, fault, running, answers, struck.at_s)
            clock.lap("streams")
            await asyncio.to_thread(fault.mend, arena, outcome.victim)
            if not fault.breaks_gateway:
                outcome.replays = arena.total("baton_replays_total") - replays
                outcome.migrations = arena.total("baton_migrations_total") - migrations
            outcome.wrong += await asyncio.to_thread(arena.await_whole)
            clock.lap("mending")
            outcome.throughput = await self._recovered(client, normal)
            clock.lap("recovery")
        outcome.leaks = await asyncio.to_thread(arena.take_stock)
        clock.lap("stock")
        return outcome

    async def _disturb(self, client: httpx.AsyncClient, fault: Fault, victim: str) -> tuple[list[_Running], Struck]:
        """Start streams, strike among them; returns whom it struck and when, nobody if there was no occasion."""
        arena = self._arena
        gateways = cycle(sorted(arena.urls.items()))
        chunks = asyncio.Semaphore(0)

        def start(asked: Ask) -> _Running:
            gateway, url = next(gateways)
            return _Running(asked, gateway, asyncio.create_task(ask(client, url, asked, seen=chunks.release)))

        num_early = len(self._asks) - math.floor(len(self._asks) * fault.late)
        running = [start(asked) for asked in self._asks[:num_early]]
        latest = max(4, round(fault.moment * sum(asked.body.get("max_tokens", 0) for asked in self._asks[:num_early])))
        for _ in range(arena.luck.randint(1, latest)):
            if all(one.task.done() for one in running):
                break
            taking = asyncio.ensure_future(chunks.acquire())
            await asyncio.wait([taking, *(one.task for one in running)], return_when=asyncio.FIRST_COMPLETED)
            taking.cancel()
        began_s = time.monotonic()
        striking = asyncio.create_task(asyncio.to_thread(fault.strike, arena, victim))
        if fault.storms:
            await storm(client, arena, self._asks, self._num_storm)
        if fault.late:
            await asyncio.sleep(0.0 if fault.awaits else 0.3)
            running += [start(asked) for asked in self._asks[num_early:]]
        struck = await striking
        if not fault.awaits:
            struck = Struck(victim, began_s)
        return running, struck or Struck("", math.inf)

    def _judge_all(
        self, outcome: Outcome, fault: Fault, running: list[_Running], answers: list[Answer], struck_s: float
    ) -> None:
        for one, answer in zip(running, answers, strict=True):
            if fault.breaks_gateway and one.gateway == outcome.victim and answer.error:
                outcome.excused += 1
                continue
            if not one.asked.streamed or (answer.times_s and answer.times_s[-1] >= struck_s):
                outcome.hit += 1
                if one.asked.streamed:
                    outcome.pauses_s.append(answer.longest_gap_s(struck_s))
            lost, repeated = (0, 0) if answer.error else self._judge.differences(one.asked, answer)
            outcome.lost += lost
            outcome.repeated += repeated
            if answer.error or lost or repeated:
                outcome.wrong.append(f"request {one.asked.number}: {answer.error or f'-{lost} +{repeated} tokens'}")
            else:
                outcome.finished += 1

    async def _recovered(self, client: httpx.AsyncClient, normal_tokens_per_s: float) -> float:
        """The best throughput within `RECOVERY_S`, over the normal one."""
        best, deadline_s = 0.0, time.monotonic() + RECOVERY_S
        while best < 0.9 and time.monotonic() < deadline_s:
            best = max(best, await self._probe(client) / normal_tokens_per_s)
        return best


class _Clock:
    """Says where time goes."""

    def __init__(self) -> None:
        self.parts_s: dict[str, float] = {}
        self._since_s = time.monotonic()

    def lap(self, part: str) -> None:
        """What came since the last lap was this."""
        now_s = time.monotonic()
        self.parts_s[part], self._since_s = now_s - self._since_s, now_s
