"""Whom a giver asks next: round after round over its targets, with a growing pause after a round of refusals."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field

from fleet.types import PeerRef
from kvtransfer.limits import HandOffLimits


@dataclass(slots=True)
class Target:
    """One taker that may be asked; `broken` are transports that failed towards it, `struck` means never again."""

    peer: PeerRef
    broken: set[str] = field(default_factory=set)
    struck: bool = False


class TargetRounds:
    """Targets of one hand-off, best first. Mutated only by the giver that owns it."""

    def __init__(self, peers: Iterable[PeerRef], limits: HandOffLimits, rng: random.Random) -> None:
        self._targets = [Target(peer) for peer in dict.fromkeys(peers)]
        self._limits = limits
        self._rng = rng
        self._next = 0
        self._rounds = 0
        self._hint_s = 0.0

    def next(self) -> Target | None:
        """The next target of this round; None at its end. After None, `pause_s` tells how long to wait."""
        while self._next < len(self._targets):
            target = self._targets[self._next]
            self._next += 1
            if not target.struck:
                return target
        return None

    def hint(self, retry_after_s: float) -> None:
        """A target said when to come again; the soonest of a round counts."""
        self._hint_s = min(self._hint_s, retry_after_s) if self._hint_s else retry_after_s

    @property
    def exhausted(self) -> bool:
        """No target is left that might ever take it."""
        return all(target.struck for target in self._targets)

    def pause_s(self) -> float:
        """Begin the next round and return how long to wait before it: doubles from `backoff_s`, half of it jitter."""
        ceiling_s = min(self._limits.max_backoff_s, self._limits.backoff_s * (1 << min(self._rounds, 16)))
        wait_s = ceiling_s * (0.5 + 0.5 * self._rng.random())
        hint_s = min(self._hint_s, self._limits.max_backoff_s)
        self._rounds += 1
        self._next = 0
        self._hint_s = 0.0
        return max(wait_s, hint_s)
