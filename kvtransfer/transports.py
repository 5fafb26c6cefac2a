"""Builds the configured transports. A configured one that cannot work stops the start."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_region import DeviceRegion
from kvtransfer.errors import TransportUnavailable
from kvtransfer.pool_memory import Region
from kvtransfer.region import PoolRegion
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import Transport, Transports

CONFIGURABLE = ("cuda_ipc", "shm", "tcp")
"""Names that settings may list. `loopback` is wired by hand where one process holds both sides."""


def build_transports(names: Sequence[str], region: Region) -> Transports:
    """The transports of a worker, best first.

    Raises:
        TransportUnavailable: a name is unknown or repeated, none is given, or the transport cannot work here.
    """
    if not names or len(set(names)) != len(names):
        raise TransportUnavailable(f"transports must be a list of different names out of {CONFIGURABLE}, not {names}")
    built: dict[str, Transport] = {}
    for name in names:
        if name == ShmTransport.name:
            if not isinstance(region, PoolRegion):
                raise TransportUnavailable("the shm transport is configured, but the pages are in GPU memory")
            built[name] = ShmTransport(region)
        elif name == CudaIpcTransport.name:
            if not isinstance(region, DeviceRegion):
                raise TransportUnavailable("the cuda_ipc transport is configured, but the pages are not in GPU memory")
            built[name] = CudaIpcTransport(region)
        elif name == TcpTransport.name:
            built[name] = TcpTransport()
        else:
            raise TransportUnavailable(f"there is no transport {name!r}; known are {', '.join(CONFIGURABLE)}")
    return built
