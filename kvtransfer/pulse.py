"""Liveness: who was heard when, Alive messages both ways, and process lives that are over.

A deadline here measures silence of a peer with which hand-offs are shared, never the length of a queue. If this
process itself stood still (stopped, or its event loop starved), the time it was away does not count against peers.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleet.hand_off_messages import Alive, OpenHandOff
from fleet.types import PeerRef
from kvtransfer.limits import HandOffLimits
from kvtransfer.remembered import Remembered


@dataclass(slots=True)
class _Heard:
    at_s: float
    beat: int = -1


class Pulse:
    """Times of the peers that share hand-offs with this process. Knows no hand-off itself."""

    def __init__(self, peer: PeerRef, limits: HandOffLimits) -> None:
        self._peer = peer
        self._limits = limits
        self._heard: dict[PeerRef, _Heard] = {}
        self._void: Remembered[tuple[str, int], bool] = Remembered(
            memory_s=limits.memory_s, max_entries=limits.memory_entries
        )
        self._beat = 0
        self._last_beat_s: float | None = None
        self._last_tick_s: float | None = None

    def heard(self, peer: PeerRef, now_s: float) -> None:
        """Note a sign of life of a peer with which we share hand-offs."""
        if (known := self._heard.get(peer)) is not None:
            known.at_s = now_s

    def in_order(self, alive: Alive) -> bool:
        """Whether this Alive is newer than the last one of its sender, whose hand-offs we share. Mutates: the count."""
        known = self._heard.get(alive.sender)
        if known is None or alive.beat <= known.beat:
            return False
        known.beat = alive.beat
        return True

    def former_lives(self, peer: PeerRef, now_s: float) -> list[PeerRef]:
        """Other incarnations of a peer just heard, with which we share hand-offs; they are void from now on.

        None if this one was voided before: a message that it sent before its end can come after its successor's.
        Incarnations have no order of their own, so that a late word of a life unknown so far may void its successor's
        hand-offs; they begin anew then, and as no message is dropped for it, nothing else is lost.
        """
        if self.is_void(peer, now_s):
            return []
        former = [p for p in self._heard if p.name == peer.name and p.incarnation != peer.incarnation]
        for void in former:
            self._void.put((void.name, void.incarnation), True, now_s)
            del self._heard[void]
        return former

    def is_void(self, peer: PeerRef, now_s: float) -> bool:
        """Whether a later life of this peer was heard not long ago."""
        return bool(self._void.get((peer.name, peer.incarnation), now_s))

    def at_address(self, address: str) -> list[PeerRef]:
        """Peers known at this address."""
        return [peer for peer in self._heard if peer.address == address]

    def follow(self, peers: set[PeerRef], now_s: float) -> None:
        """Watch exactly these peers; silence of new ones is counted from now on."""
        for peer in [known for known in self._heard if known not in peers]:
            del self._heard[peer]
        for peer in peers:
            self._heard.setdefault(peer, _Heard(now_s))

    def silent(self, now_s: float) -> list[PeerRef]:
        """Peers beyond the deadline, each once per deadline. Call it at least every beat."""
        away_s = now_s - self._last_tick_s if self._last_tick_s is not None else 0.0
        self._last_tick_s = now_s
        if away_s > 2 * self._limits.beat_s:
            for known in self._heard.values():
                known.at_s += away_s
        silent = [p for p, known in self._heard.items() if now_s - known.at_s >= self._limits.liveness_s]
        for peer in silent:
            self._heard[peer].at_s = now_s
        return silent

    def due(self, now_s: float) -> bool:
        """Whether a beat is due; if so, it counts as done."""
        if self._last_beat_s is not None and now_s - self._last_beat_s < self._limits.beat_s:
            return False
        self._last_beat_s = now_s
        self._beat += 1
        return True

    def alive(self, hand_offs: list[OpenHandOff]) -> Alive:
        """The message of this beat."""
        return Alive(sender=self._peer, beat=self._beat, hand_offs=hand_offs)

    @property
    def next_beat_s(self) -> float:
        """When the next beat is due."""
        return 0.0 if self._last_beat_s is None else self._last_beat_s + self._limits.beat_s
