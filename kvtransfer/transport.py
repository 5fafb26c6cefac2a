"""What a transport is. One contract suite holds for all of them (`tests/contract/kvtransfer`).

| module | name | bytes go | status |
| --- | --- | --- | --- |
| `loopback.py` | `loopback` | within one process, giver writes the taker's region | for tests and single-process use |
| `shm.py` | `shm` | giver maps the taker's region by name and writes it | here |
| `tcp.py` | `tcp` | as payload frames of the bus; the taker copies | here |
| `cuda_ipc.py` | `cuda_ipc` | giver opens the taker's device pool by IPC handle | here; no GPU has run it yet |
| `nixl.py` | `nixl` | giver writes registered memory by RDMA | has its place here, not built |

There are two kinds. A *direct* transport lets the giver write the taker's memory: after a revoked grant the pages stay
quarantined until the giver is known to be done. A *carried* one sends pages as payload frames which the taker itself
copies, so the taker can always take pages back. A transport over other memory joins by implementing `DirectTransport`;
`PoolRef.name` then names its handle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from fleet.hand_off_messages import Grant, Offer


class Transport(Protocol):
    """A way for pages to reach a taker."""

    @property
    def name(self) -> str:
        """As it stands in settings, Offers, Grants and metrics."""

    def can_take(self, offer: Offer) -> bool:
        """Whether this process can take the offered pages over this transport."""

    def close(self) -> None:
        """Drop whatever it maps or holds. Idempotent."""


@runtime_checkable
class DirectTransport(Transport, Protocol):
    """The giver writes straight into the taker's memory."""

    def write(self, grant: Grant, first: int, page_ids: Sequence[int]) -> None:
        """Copy these pages of this process to pages `first`, `first + 1`, … of the grant; on return they are there.

        Runs on a transfer thread.

        Raises:
            GrantRevoked: the taker closed the grant.
            TransportUnavailable: the taker's memory cannot be reached.
        """

    def forget(self, address: str) -> None:
        """Nobody answers at this address any more: drop what is mapped of the taker there, dead or not."""


Transports = Mapping[str, Transport]
"""By name, best first."""
