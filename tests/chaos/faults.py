"""What can go wrong: each fault strikes while streams run, and is mended once they have ended."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import psutil

from chaos.arena import LEASE_S, Arena
from chaos.asks import Ask
from chaos.wires import Cut, Side, Trap

REDIS_PAUSE_S = 10.0
TRAP_S = 10.0
"""Streams that have not said what a trap waits for by then never will."""
MAX_NTH = 6
"""Sixteen streams say everything at least so often after half of them have begun."""


@dataclass(frozen=True)
class Struck:
    """Whom a fault that chooses its moment itself has struck, and when (monotonic)."""

    victim: str
    at_s: float


@dataclass(frozen=True)
class Fault:
    """One row of the table.

    Attributes:
        name, role: what happens, to whom; an empty role for what is not a process.
        strike: makes it happen to the named victim; returns once it has, which for a pause is its end. A fault that
            waits for a message returns what came of it: None if the message never passed.
        mend: undoes it after the streams have ended.
        breaks_gateway: the victim's own streams may break.
        late: the share of streams that begins only after the strike.
        moment: the strike comes before this share of the streams' tokens.
        storms: requests come and go meanwhile.
        awaits: it waits for a message. Such faults share their rounds between the two sides of it.
    """

    name: str
    role: str
    strike: Callable[[Arena, str], Struck | None]
    mend: Callable[[Arena, str], None] = lambda _arena, _victim: None
    breaks_gateway: bool = False
    late: float = 0.0
    moment: float = 0.75
    storms: bool = False
    awaits: bool = False

    @property
    def title(self) -> str:
        """The fault and whom it hits."""
        return f"{self.name} ({self.role})" if self.role else self.name


def _kill(arena: Arena, victim: str) -> None:
    arena.replace(victim, signal.SIGKILL)


def _term(arena: Arena, victim: str) -> None:
    code = arena.replace(victim, signal.SIGTERM)
    if code != 0:
        raise RuntimeError(f"{victim} left with {code}")


def _stop(arena: Arena, victim: str) -> None:
    arena.signal(victim, signal.SIGSTOP)


def _go_on(arena: Arena, victim: str) -> None:
    if victim:  # nobody is, where a message that was waited for never passed
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


def _trap(
    arena: Arena,
    victim: str,
    *,
    kind: str,
    way: tuple[str, str],
    side: Side,
    blow: Callable[[psutil.Process], None] = psutil.Process.kill,
    leaves: bool = False,
) -> Struck | None:
    """Strike at some message of a kind on its way, before or after it arrives.

    `leaves`: the victim is asked to leave, so that its sequences move. Who is killed at that may have been the last who
    stays, so that its successor is waited for.
    """
    nth = arena.luck.randint(1, 2 if leaves else MAX_NTH)
    trap = Trap(kind, *way, side, nth=nth, before=arena.luck.random() < 0.5, blow=blow)
    arena.wires.set_trap(trap)
    if leaves:
        arena.ask_to_leave(victim)
    sprung = trap.sprung.wait(TRAP_S)
    arena.wires.set_trap(None)
    if sprung and blow is psutil.Process.kill:
        arena.replace(trap.victim, signal.SIGKILL, wait=leaves)
    return Struck(trap.victim, trap.sprung_s) if sprung else None


def _replace_leaver(arena: Arena, _victim: str) -> None:
    arena.replace_leaver()


_HAND_OFF = ("prefill", "decode")
_ANSWER = ("decode", "prefill")
_STATES = [
    ("PrefillRequest", ("gateway", "prefill"), (Side.RECEIVER,)),
    ("Offer", _HAND_OFF, (Side.SENDER, Side.RECEIVER)),
    ("Grant", _ANSWER, (Side.SENDER, Side.RECEIVER)),
    ("TokenChunk", ("prefill", "gateway"), (Side.SENDER,)),
    ("Commit", _HAND_OFF, (Side.SENDER, Side.RECEIVER)),
    ("Ack", _ANSWER, (Side.SENDER, Side.RECEIVER)),
    ("HandedOff", ("decode", "gateway"), (Side.SENDER, Side.RECEIVER)),
    ("RequestFinished", ("decode", "gateway"), (Side.SENDER,)),
]
"""The messages of a request's life with the pools they pass between, and whose death is tried at them."""


def _faults_at_messages() -> list[Fault]:
    rows = []
    for kind, way, sides in _STATES:
        for side in sides:
            role = way[side is Side.RECEIVER]
            strike = partial(_trap, kind=kind, way=way, side=side)
            rows.append(_at(f"kill -9 at {kind}", role, strike, breaks_gateway=role == "gateway"))
    for side, role in ((Side.SENDER, "prefill"), (Side.RECEIVER, "decode")):
        frozen = partial(_trap, kind="Commit", way=_HAND_OFF, side=side, blow=psutil.Process.suspend)
        rows.append(_at("frozen at Commit", role, frozen, _go_on))
    for kind in ("Grant", "Commit"):
        for side in Side:
            who = "giver" if (side is Side.SENDER) == (kind == "Commit") else "taker"
            strike = partial(_trap, kind=kind, way=("decode", "decode"), side=side, leaves=True)
            rows.append(_at(f"kill -9 of the {who} at a move's {kind}", "decode", strike, late=0.0, moment=0.3))
    return rows


def _at(
    name: str,
    role: str,
    strike: Callable[[Arena, str], Struck | None],
    mend: Callable[[Arena, str], None] = _replace_leaver,
    **fields: Any,
) -> Fault:
    return Fault(name, role, strike, mend, awaits=True, **{"late": 0.5, **fields})


def all_faults() -> list[Fault]:
    """Every row, in the table's order."""
    rows = []
    for role in ("prefill", "decode"):
        # A prefill worker is hit while prompts are under way, others in the middle of the streams.
        moment = 0.0 if role == "prefill" else 0.75
        rows += [
            Fault("kill -9", role, _kill, moment=moment),
            Fault("SIGTERM", role, _term, moment=moment),
            Fault("frozen beyond the lease", role, _stop, _go_on, moment=moment),
            Fault("frozen for half a lease", role, partial(_stop_for, seconds=LEASE_S / 2), moment=moment),
            Fault("link cut", role, partial(_cut, how=Cut.RESET), _heal, moment=moment),
            Fault("link silent", role, partial(_cut, how=Cut.SILENT), _heal, moment=moment),
        ]
    return [
        *rows,
        Fault("kill -9", "gateway", _kill, breaks_gateway=True),
        Fault("Redis killed, back empty", "", _redis_restarts_empty, late=0.5),
        Fault(f"Redis paused {REDIS_PAUSE_S:g} s", "", _redis_pauses, late=0.5),
        Fault("abort storm", "", _nothing, storms=True),
        *_faults_at_messages(),
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
