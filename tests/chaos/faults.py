"""What can go wrong: each fault strikes while streams run, and is mended once they have ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import httpx

from chaos.arena import LEASE_S, Arena
from chaos.streams import Ask
from chaos.wires import Cut

REDIS_PAUSE_S = 10.0


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name, role: what happens, to whom; an empty role for what is not a worker.
        strike: makes it happen to the named victim; returns once it has, which for a pause is its end.
        mend: undoes it after the streams have ended.
        breaks_gateway: the victim's own streams may break.
        late: the share of streams that begins only after the strike.
    """

    name: str
    role: str
    strike: Callable[[Arena, str], None]
    mend: Callable[[Arena, str], None] = lambda _arena, _victim: None
    breaks_gateway: bool = False
    late: float = 0.0
    storms: bool = False


def _kill(arena: Arena, victim: str) -> None:
    arena.remove(victim, signal.SIGKILL)


def _term(arena: Arena, victim: str) -> None:
    code = arena.remove(victim, signal.SIGTERM)
    if code != 0:
        raise RuntimeError(f"{victim} left with {code}")


def _replace(role: str, arena: Arena, _victim: str) -> None:
    arena.add(role)


def _stop(arena: Arena, victim: str) -> None:
    arena.signal(victim, signal.SIGSTOP)


def _go_on(arena: Arena, victim: str) -> None:
    arena.signal(victim, signal.SIGCONT)


def _stop_for(arena: Arena, victim: str, *, seconds: float) -> None:
    _stop(arena, victim)
    arena.rest(seconds)
    _go_on(arena, victim)


def _cut(arena: Arena, victim: str, *, how: Cut) -> None:
    arena.cut(victim, how)


def _heal(arena: Arena, victim: str) -> None:
    arena.wires.heal(victim)


def _redis_restarts_empty(arena: Arena, _victim: str) -> None:
    arena.fleet.redis.stop()
    arena.rest(LEASE_S)
    arena.fleet.redis.start()


def _redis_pauses(arena: Arena, _victim: str) -> None:
    arena.fleet.redis.pause()
    arena.rest(REDIS_PAUSE_S)
    arena.fleet.redis.resume()


def _nothing(_arena: Arena, _victim: str) -> None:
    pass


def all_faults() -> list[Fault]:
    """Every row, in the table's order."""
    rows = []
    for role in ("prefill", "decode"):
        rows += [
            Fault("kill -9", role, _kill, partial(_replace, role)),
            Fault("SIGTERM", role, _term, partial(_replace, role)),
            Fault("frozen beyond the lease", role, _stop, _go_on),
            Fault("frozen for half a lease", role, partial(_stop_for, seconds=LEASE_S / 2)),
            Fault("link cut", role, partial(_cut, how=Cut.RESET), _heal),
            Fault("link silent", role, partial(_cut, how=Cut.SILENT), _heal),
        ]
    return [
        *rows,
        Fault("kill -9", "gateway", _kill, partial(_replace, "gateway"), breaks_gateway=True),
        Fault("Redis killed, back empty", "", _redis_restarts_empty, late=0.5),
        Fault(f"Redis paused {REDIS_PAUSE_S:g} s", "", _redis_pauses, late=0.5),
        Fault("abort storm", "", _nothing, storms=True),
    ]


async def storm(client: httpx.AsyncClient, arena: Arena, asks: list[Ask], num_requests: int) -> None:
    """Open so many requests over half a minute at most, and leave each at a random moment of its life."""
    room = asyncio.Semaphore(100)

    async def come_and_go(number: int, life_s: float) -> None:
        asked = asks[number % len(asks)]
        url = list(arena.urls.values())[number % len(arena.urls)]
        body = {**asked.body, "seed": 10**6 + number}
        async with room:
            try:
                async with asyncio.timeout(life_s), client.stream("POST", url + asked.path, json=body) as response:
                    async for _ in response.aiter_raw():
                        pass
            except (TimeoutError, httpx.HTTPError):
                return

    async with asyncio.TaskGroup() as tasks:
        for number in range(num_requests):
            tasks.create_task(come_and_go(number, arena.luck.choice((0.005, 0.05, 0.2, 0.6)) * arena.luck.random() * 2))
