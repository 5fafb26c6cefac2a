"""Hand-offs between GPU workers of one host: the giver opens the taker's pool by its IPC handle and copies into it.

Page ids alone cross the wire. Copies run on a stream of their own, beside the model's kernels, and end with an event.
CUDA IPC needs one process-id namespace and a device that both processes see; `host_identity` covers the former.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from fleet.hand_off_messages import Grant, Offer
from kvtransfer.device_region import DeviceRegion
from kvtransfer.errors import RegionRejected, TransportUnavailable
from kvtransfer.host import host_identity
from kvtransfer.mapped_peers import MappedPeers


class CudaIpcTransport:
    """A direct transport over GPU memory.

    Args:
        region: this process's own pages, for others to write and to copy from.
    """

    name = "cuda_ipc"

    def __init__(self, region: DeviceRegion) -> None:
        self._region = region
        self._peers = MappedPeers(lambda ref: DeviceRegion.attach(ref, region.memory), DeviceRegion.close)
        self._copying = threading.Lock()  # one stream, one event

    def can_take(self, offer: Offer) -> bool:
        """Only from a giver that shares memory and process ids with this process."""
        return offer.host == host_identity()

    def write(self, grant: Grant, first: int, page_ids: Sequence[int]) -> None:
        """See `DirectTransport.write`."""
        try:
            taker = self._peers.of(grant)
        except RegionRejected as error:
            raise TransportUnavailable(str(error)) from error
        with self._copying:
            targets = grant.page_ids[first : first + len(page_ids)]
            taker.take_over(self._region, page_ids, targets, grant.generation)

    def forget(self, address: str) -> None:
        """Unmap a taker's pool; waits for a copy into it."""
        with self._copying:
            self._peers.forget(address)

    def close(self) -> None:
        """Unmap everything."""
        with self._copying:
            self._peers.close()
