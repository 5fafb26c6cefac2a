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
    """

    def __init__(self, attach: Callable[[PoolRef], R], drop: Callable[[R], None] = lambda _: None) -> None:
        self._attach = attach
        self._drop = drop
        self._mapped: OrderedDict[PeerRef, R] = OrderedDict()
        self._lock = threading.Lock()  # transfer threads map, the event loop forgets

    def of(self, grant: Grant) -> R:
        """The pool that a grant names, mapped now if it was not. Raises: what `attach` raises."""
        with self._lock:
            region = self._mapped.get(grant.taker)
            if region is None or region.ref != grant.pool:
                region = self._mapped[grant.taker] = self._attach(grant.pool)
            self._mapped.move_to_end(grant.taker)
            while len(self._mapped) > _MAX_MAPPED:
                self._drop(self._mapped.popitem(last=False)[1])
            return region

    def forget(self, peer: PeerRef) -> None:
        """Drop a taker's region."""
        with self._lock:
            region = self._mapped.pop(peer, None)
            if region is not None:
                self._drop(region)

    def close(self) -> None:
        """Drop everything."""
        with self._lock:
            while self._mapped:
                self._drop(self._mapped.popitem()[1])
