"""Hand-offs on one host: the giver maps the taker's region by name and writes straight into its pages."""

from __future__ import annotations

from collections.abc import Sequence

from fleet.hand_off_messages import Grant, Offer
from kvtransfer.copying import write_granted
from kvtransfer.errors import RegionRejected, TransportUnavailable
from kvtransfer.host import host_identity
from kvtransfer.mapped_peers import MappedPeers
from kvtransfer.region import PoolRegion, is_named


class ShmTransport:
    """A direct transport over POSIX shared memory. Keeps one mapping per taker's process life.

    Args:
        region: this process's own pages, for others to write and to copy from.

    Raises:
        TransportUnavailable: the region is private, so that the transport could only ever fail.
    """

    name = "shm"

    def __init__(self, region: PoolRegion) -> None:
        if not region.ref.name:
            raise TransportUnavailable("the shm transport is configured, but the page pool is not in shared memory")
        self._region = region
        self._peers = MappedPeers(PoolRegion.attach, exists=is_named)

    def can_take(self, offer: Offer) -> bool:
        """Only from a giver that shares memory and process ids with this process."""
        return offer.host == host_identity()

    def write(self, grant: Grant, first: int, page_ids: Sequence[int]) -> None:
        """See `DirectTransport.write`."""
        try:
            taker = self._peers.of(grant)
        except RegionRejected as error:
            raise TransportUnavailable(str(error)) from error
        targets = grant.page_ids[first : first + len(page_ids)]
        write_granted(taker, targets, grant.generation, [self._region.page(page_id) for page_id in page_ids])

    def forget(self, address: str) -> None:
        """Unmap a taker's region once no write uses it."""
        self._peers.forget(address)

    def close(self) -> None:
        """Unmap everything."""
        self._peers.close()
