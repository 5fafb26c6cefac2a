"""Hand-offs on one host: the giver maps the taker's region by name and writes straight into its pages."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from fleet.hand_off_messages import Grant, Offer
from fleet.types import PeerRef
from kvtransfer.copying import write_granted
from kvtransfer.errors import RegionRejected, TransportUnavailable
from kvtransfer.host import host_identity
from kvtransfer.region import PoolRegion

_MAX_MAPPED: Final = 64


class ShmTransport:
    """A direct transport over POSIX shared memory. Keeps one mapping per taker's process life.

    Args:
        region: this process's own pages, for others to write.

    Raises:
        TransportUnavailable: the region is private, so that the transport could only ever fail.
    """

    name = "shm"

    def __init__(self, region: PoolRegion) -> None:
        if not region.ref.name:
            raise TransportUnavailable("the shm transport is configured, but the page pool is not in shared memory")
        self._mapped: OrderedDict[PeerRef, PoolRegion] = OrderedDict()
        self._lock = threading.Lock()  # transfer threads map, the event loop forgets

    def can_take(self, offer: Offer) -> bool:
        """Only from a giver that shares memory and process ids with this process."""
        return offer.host == host_identity()

    def write(self, grant: Grant, first: int, pages: Sequence[memoryview]) -> None:
        """See `DirectTransport.write`."""
        try:
            region = self._region_of(grant)
        except RegionRejected as error:
            raise TransportUnavailable(str(error)) from error
        write_granted(region, grant.page_ids[first : first + len(pages)], grant.generation, pages)

    def _region_of(self, grant: Grant) -> PoolRegion:
        with self._lock:
            region = self._mapped.get(grant.taker)
            if region is None or region.ref != grant.pool:
                region = self._mapped[grant.taker] = PoolRegion.attach(grant.pool)
            self._mapped.move_to_end(grant.taker)
            while len(self._mapped) > _MAX_MAPPED:
                self._mapped.popitem(last=False)  # a write under way keeps its own reference
            return region

    def forget(self, peer: PeerRef) -> None:
        """Unmap a taker's region once no write uses it."""
        with self._lock:
            self._mapped.pop(peer, None)

    def close(self) -> None:
        """Unmap everything."""
        with self._lock:
            self._mapped.clear()
