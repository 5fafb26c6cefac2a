"""Where a request has been: one entry per worker that held it, written behind into its state in Redis."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec

from fleet.types import Role

MAX_HOPS = 32
"""A request that moves more often keeps its latest ones."""
UNEXPLAINED = "handed_off"


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """One stay on a worker.

    Attributes:
        worker: its name.
        role: prefill or decode.
        epoch: under which it held the request; a higher one than before means a replay.
        reason: why the request came here: `admitted`, why it was replayed (`worker_lost`, …), or why it was handed
            off (`prefilled`, `drain`, …; `handed_off` until the giver's word has arrived).
        at_s: Unix time.
        transport: over which its pages came; None where none did, or the giver's word has not arrived.
    """

    worker: str
    role: Role
    epoch: Annotated[int, msgspec.Meta(ge=0)]
    reason: str
    at_s: float
    transport: str | None = None


class HopLog:
    """The latest hops of one request. Giver and taker of a hand-off may be heard in either order."""

    def __init__(self) -> None:
        self._hops: list[Hop] = []
        self._announced: tuple[str, str, str] | None = None  # taker, transport, reason

    def send(self, worker: str, *, epoch: int, reason: str) -> None:
        """A prefill worker gets the request."""
        self._announced = None
        self._append(Hop(worker=worker, role=Role.PREFILL, epoch=epoch, reason=reason, at_s=time.time()))

    def announce(self, taker: str, *, transport: str, reason: str) -> bool:
        """A giver says to whom it hands the request, how its pages go, and why. True if the taker was heard before."""
        for at in reversed(range(len(self._hops))):
            hop = self._hops[at]
            if hop.role is Role.PREFILL:
                break
            if hop.worker == taker and (hop.reason == UNEXPLAINED or hop is self._hops[-1]):
                self._hops[at] = msgspec.structs.replace(hop, transport=transport, reason=reason)
                return hop.reason == UNEXPLAINED
        self._announced = (taker, transport, reason)
        return False

    def adopt(self, worker: str, *, epoch: int) -> None:
        """A decode worker has taken the request."""
        transport, reason = None, UNEXPLAINED
        if self._announced is not None and self._announced[0] == worker:
            _, transport, reason = self._announced
        self._announced = None
        self._append(
            Hop(worker=worker, role=Role.DECODE, epoch=epoch, reason=reason, at_s=time.time(), transport=transport)
        )

    def _append(self, hop: Hop) -> None:
        self._hops = [*self._hops[1 - MAX_HOPS :], hop]

    def encoded(self) -> str:
        """As it lies in Redis: JSON."""
        return msgspec.json.encode(self._hops).decode()


def decode_hops(raw: bytes) -> list[Hop]:
    """Hops out of Redis; none where they cannot be read."""
    try:
        return msgspec.json.decode(raw, type=list[Hop])
    except msgspec.MsgspecError:
        return []
