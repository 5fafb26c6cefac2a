"""Hand-offs within one process: the giver writes the taker's region through a shared directory of regions."""

from __future__ import annotations

from collections.abc import Sequence

from fleet.hand_off_messages import Grant, Offer
from fleet.types import PeerRef
from kvtransfer.copying import write_granted
from kvtransfer.errors import TransportUnavailable
from kvtransfer.host import host_identity, own_process
from kvtransfer.region import PoolRegion


class LoopbackTransport:
    """A direct transport between endpoints of one process.

    Args:
        peer: whose region this is.
        region: pages that others write.
        directory: shared by all endpoints of the process; mutated here.
    """

    name = "loopback"

    def __init__(self, peer: PeerRef, region: PoolRegion, directory: dict[PeerRef, PoolRegion]) -> None:
        self._peer = peer
        self._region = region
        self._directory = directory
        directory[peer] = region

    def can_take(self, offer: Offer) -> bool:
        """Only from the same process."""
        return offer.host == host_identity() and offer.pid == own_process().pid

    def write(self, grant: Grant, first: int, page_ids: Sequence[int]) -> None:
        """See `DirectTransport.write`."""
        taker = self._directory.get(grant.taker)
        if taker is None:
            raise TransportUnavailable(f"{grant.taker.name} has no pages in this process")
        targets = grant.page_ids[first : first + len(page_ids)]
        write_granted(taker, targets, grant.generation, [self._region.page(page_id) for page_id in page_ids])

    def forget(self, address: str) -> None:
        """Nothing is mapped per peer."""

    def close(self) -> None:
        """Take the region out of the directory."""
        self._directory.pop(self._peer, None)
