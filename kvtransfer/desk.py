"""A process's whole part in hand-offs: giver, taker and pulse behind one door. Still without input or output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fleet.hand_off_messages import (
    Abort,
    Ack,
    Alive,
    Commit,
    Grant,
    HandOffMessage,
    Offer,
    Pages,
    PagesTaken,
    Refuse,
    Released,
)
from fleet.types import PeerRef
from kvtransfer.actions import Action, PeerLost, Send
from kvtransfer.giver import Giver
from kvtransfer.pulse import Pulse
from kvtransfer.stats import StaleReason
from kvtransfer.taker import Taker


class HandOffDesk:
    """Routes messages, beats for both halves at once, and declares peers lost to both.

    Attributes:
        giver, taker: call the service's side of them directly; the rest goes through here.
        stale: messages that came too late, counted by all three.
    """

    def __init__(self, giver: Giver, taker: Taker, pulse: Pulse, stale: Counter[StaleReason]) -> None:
        self.giver = giver
        self.taker = taker
        self.stale = stale
        self._pulse = pulse

    def on_message(self, message: HandOffMessage, frames: Sequence[memoryview], now_s: float) -> list[Action]:
        """Whatever came over the bus. A sign of a new life of a peer closes the hand-offs with its former one."""
        actions: list[Action] = []
        sender = _sender(message)
        if sender is not None:
            self._pulse.follow(self._peers(), now_s)
            self._pulse.heard(sender, now_s)
            for former in self._pulse.former_lives(sender, now_s):
                actions += self._lose(former, "it has restarted", now_s)
        actions += self._on_alive(message, now_s) if isinstance(message, Alive) else []
        actions += self._route(message, frames, now_s)
        return actions

    def _on_alive(self, alive: Alive, now_s: float) -> list[Action]:
        if not self._pulse.in_order(alive):
            self.stale[StaleReason.INCARNATION] += self._pulse.is_void(alive.sender, now_s)
            return []
        actions = self.giver.on_listing(alive.sender, alive.hand_offs, now_s)
        return actions + self.taker.on_listing(alive.sender, alive.hand_offs, now_s)

    def _route(self, message: HandOffMessage, frames: Sequence[memoryview], now_s: float) -> list[Action]:
        actions: list[Action] = []
        match message:
            case Offer():
                actions = self.taker.on_offer(message, now_s)
            case Grant():
                actions = self.giver.on_grant(message, now_s)
            case Refuse():
                actions = self.giver.on_refuse(message, now_s)
            case Pages():
                actions = self.taker.on_pages(message, frames, now_s)
            case PagesTaken():
                actions = self.giver.on_pages_taken(message, now_s)
            case Commit():
                actions = self.taker.on_commit(message, now_s)
            case Ack():
                actions = self.giver.on_ack(message, now_s)
            case Abort():
                # the receiver's half follows from who numbered the offer; the other half does not know it
                actions = self.taker.on_abort(message, now_s) + self.giver.on_abort(message, now_s)
            case Released():
                actions = self.taker.on_released(message, now_s)
            case Alive():
                pass  # handled before
        return actions

    def cancel(self, request_id: str, epoch: int, now_s: float) -> list[Action]:
        """The request is over up to and including `epoch`, on both halves."""
        return self.giver.cancel(request_id, epoch) + self.taker.cancel(request_id, epoch, now_s)

    def peer_lost(self, address: str, now_s: float) -> list[Action]:
        """The bus saw the connection to an address break."""
        self._pulse.follow(self._peers(), now_s)
        actions: list[Action] = []
        for peer in self._pulse.at_address(address):
            actions += self._lose(peer, "its connection broke", now_s)
        return actions

    def tick(self, now_s: float) -> list[Action]:
        """Call it no later than `next_tick_s` says."""
        actions: list[Action] = []
        self._pulse.follow(self._peers(), now_s)
        for peer in self._pulse.silent(now_s):
            actions += self._lose(peer, "it was silent beyond the liveness deadline", now_s)
        actions += self.giver.tick(now_s) + self.taker.tick(now_s)
        if self._pulse.due(now_s):
            for peer in sorted(self._peers(), key=lambda p: (p.name, p.incarnation)):
                listing = self.giver.listing(peer) + self.taker.listing(peer)
                actions.append(Send(peer, self._pulse.alive(listing)))
        return actions

    def next_tick_s(self) -> float:
        """When something is due next, on the clock of `now_s`."""
        retry_s = self.giver.next_retry_s
        return min(self._pulse.next_beat_s, retry_s) if retry_s is not None else self._pulse.next_beat_s

    def _lose(self, peer: PeerRef, reason: str, now_s: float) -> list[Action]:
        actions: list[Action] = [PeerLost(peer, reason)]
        actions += self.giver.peer_lost(peer, reason, now_s)
        return actions + self.taker.peer_lost(peer, reason, now_s)

    def _peers(self) -> set[PeerRef]:
        return self.giver.peers() | self.taker.peers()


def _sender(message: HandOffMessage) -> PeerRef | None:
    """Who sent this, where the message says so."""
    match message:
        case Offer() | Commit():
            return message.giver
        case Grant() | Refuse():
            return message.taker
        case Abort() | Alive():
            return message.sender
        case _:
            return None
