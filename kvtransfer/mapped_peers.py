"""Peers' regions that this process has mapped: one for each taker's process life, the least used dropped first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from fleet.hand_off_messages import Grant, PoolRef
from fleet.types import PeerRef

_MAX_MAPPED: Final = 64


class Mapped(Protocol):
    """A region, as far as this book is concerned."""

    @property
    def ref(self) -> PoolRef:
        """Which pool it is."""


R = TypeVar("R", bound=Mapped)


class MappedPeers(Generic[R]):
    """A book of mappings. A write under way keeps its own reference to what is dropped here.

    Args:
        attach: maps a pool.
        drop: is given what is no longer kept.
        exists: whether a pool's owner still has it; what was mapped of others is dropped when the next one is mapped.
    """

    def __init__(
        self,
        attach: Callable[[PoolRef], R],
        drop: Callable[[R], None] = lambda _: None,
        exists: Callable[[PoolRef], bool] = lambda _: True,
    ) -> None:
        self._attach = attach
        self._drop = drop
        self._exists = exists
        self._mapped: OrderedDict[PeerRef, R] = OrderedDict()
        self._lock = threading.Lock()  # transfer threads map, the event loop forgets

    def of(self, grant: Grant) -> R:
        """The pool that a grant names, mapped now if it was not. Raises: what `attach` raises."""
        with self._lock:
            region = self._mapped.get(grant.taker)
            if region is None or region.ref != grant.pool:
                region = self._mapped[grant.taker] = self._attach(grant.pool)
                self._drop_of([taker for taker, mapped in self._mapped.items() if not self._exists(mapped.ref)])
            self._mapped.move_to_end(grant.taker)
            while len(self._mapped) > _MAX_MAPPED:
                self._drop(self._mapped.popitem(last=False)[1])
            return region

    def forget(self, address: str) -> None:
        """Drop the regions of whoever was at this address; one who is there again is mapped again."""
        with self._lock:
            self._drop_of([taker for taker in self._mapped if taker.address == address])

    def _drop_of(self, takers: list[PeerRef]) -> None:
        for taker in takers:
            self._drop(self._mapped.pop(taker))

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            while self._mapped:
                self._drop(self._mapped.popitem()[1])
