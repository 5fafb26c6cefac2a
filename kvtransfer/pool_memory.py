"""Where a worker's pages lie: host memory, shared or private, or a GPU's."""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.device_memory import CudaMemory
from kvtransfer.device_region import DeviceRegion
from kvtransfer.region import PoolRegion, shared_room_bytes
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport

Region = PoolRegion | DeviceRegion


@dataclass(frozen=True, slots=True)
class PoolPlace:
    """The memory that pages will lie in, and the transports that go with it.

    Attributes:
        cuda_device: index of the GPU, None for the host.
        transports: names, best first.
    """

    cuda_device: int | None
    transports: tuple[str, ...]

    @classmethod
    def of(cls, device: str, transports: tuple[str, ...]) -> PoolPlace:
        """For a model on `device` (`cpu`, `cuda` or `cuda:1`); without names, the transports that suit it."""
        kind, _, index = device.partition(":")
        if kind == "cpu":
            return cls(None, transports or (ShmTransport.name, TcpTransport.name))
        return cls(int(index or 0), transports or (CudaIpcTransport.name, TcpTransport.name))

    @property
    def _shared(self) -> bool:
        return self.cuda_device is None and ShmTransport.name in self.transports

    @property
    def ceiling_bytes(self) -> int | None:
        """What the memory can hold at most, None where only the machine's own size bounds it. Raises: RegionError."""
        return shared_room_bytes() if self._shared else None

    def create(self, name: str, *, num_pages: int, page_bytes: int) -> Region:
        """Make the memory of a pool.

        Raises:
            RegionError: it cannot be made.
            TransportUnavailable: cupy is missing, or there is no such device.
        """
        if self.cuda_device is None:
            return PoolRegion.create(name, num_pages=num_pages, page_bytes=page_bytes, shared=self._shared)
        memory = CudaMemory(self.cuda_device)
        return DeviceRegion.create(name, num_pages=num_pages, page_bytes=page_bytes, memory=memory)
