"""A page pool in GPU memory that a peer on the same host can open.

The pages are one device allocation, exported once. Beside them lies a small file in /dev/shm, a `PoolRegion` whose
pages are a few bytes each: it holds the generation words, by which a taker takes pages back from a giver, and in its
first bytes the handle of the allocation. A Grant names that file, so names and ownership are checked as for shared
memory, and the handle never crosses a wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fleet.hand_off_messages import PoolRef
from kvtransfer.device_memory import HANDLE_BYTES, DeviceArray, DeviceMemory, Run
from kvtransfer.errors import GrantRevoked
from kvtransfer.region import PoolRegion


class DeviceRegion:
    """The pages of this process (`create`), or those of a peer (`attach`).

    Attributes:
        ref: name of the control file, and size of the pool, as a Grant carries them.
        memory: the device.
    """

    def __init__(self, memory: DeviceMemory, ref: PoolRef, control: PoolRegion, pointer: int, *, owned: bool) -> None:
        self.ref = ref
        self.memory = memory
        self._control = control
        self._pointer = pointer
        self._owned = owned

    @classmethod
    def create(cls, name: str, *, num_pages: int, page_bytes: int, memory: DeviceMemory) -> DeviceRegion:
        """Allocate and export a pool. Raises: RegionError, and what the device raises when it is full."""
        control = PoolRegion.create(name, num_pages=num_pages, page_bytes=HANDLE_BYTES, shared=True)
        try:
            pointer = memory.allocate(num_pages * page_bytes)
            control.page(0)[:] = memory.export(pointer)
        except BaseException:
            control.unlink()
            control.close()
            raise
        ref = PoolRef(name=control.ref.name, num_pages=num_pages, page_bytes=page_bytes)
        return cls(memory, ref, control, pointer, owned=True)

    @classmethod
    def attach(cls, ref: PoolRef, memory: DeviceMemory) -> DeviceRegion:
        """Open a peer's pool. Raises: RegionRejected, TransportUnavailable."""
        control = PoolRegion.attach(PoolRef(name=ref.name, num_pages=ref.num_pages, page_bytes=HANDLE_BYTES))
        try:
            pointer = memory.open(bytes(control.page(0)))
        except BaseException:
            control.close()
            raise
        return cls(memory, ref, control, pointer, owned=False)

    @property
    def buffer(self) -> DeviceArray:
        """All pages, `[num_pages * page_bytes] u8` on the device; valid until `close`."""
        return DeviceArray(self._pointer, self.ref.num_pages * self.ref.page_bytes)

    def address(self, page_id: int) -> int:
        """Where a page lies on the device. Raises IndexError for an id outside the pool."""
        if not 0 <= page_id < self.ref.num_pages:
            raise IndexError(f"page {page_id} is outside a pool of {self.ref.num_pages}")
        return self._pointer + page_id * self.ref.page_bytes

    def frame(self, page_id: int) -> memoryview:
        """A copy of one page on the host, to be carried."""
        return memoryview(self.memory.read(self.address(page_id), self.ref.page_bytes))

    def store(self, page_id: int, data: memoryview) -> None:
        """Write one page from the host."""
        self.memory.write(self.address(page_id), data)

    def open_pages(self, page_ids: Iterable[int], generation: int) -> None:
        """See `PoolRegion.open_pages`."""
        self._control.open_pages(page_ids, generation)

    def close_pages(self, page_ids: Iterable[int]) -> None:
        """See `PoolRegion.close_pages`."""
        self._control.close_pages(page_ids)

    def writer(self, page_id: int) -> int:
        """See `PoolRegion.writer`."""
        return self._control.writer(page_id)

    def take_over(self, source: DeviceRegion, sources: Sequence[int], targets: Sequence[int], generation: int) -> None:
        """Copy pages of `source` into this region, each only while its generation word names this grant.

        Neighbours on both sides are copied as one run.

        Raises:
            GrantRevoked: a word names another grant or none; that page and later ones were not written.
        """
        runs: list[Run] = []
        revoked: int | None = None
        for source_id, target_id in zip(sources, targets, strict=True):
            if self.writer(target_id) != generation:
                revoked = target_id
                break
            target, origin, size = self.address(target_id), source.address(source_id), self.ref.page_bytes
            if runs and runs[-1][0] + runs[-1][2] == target and runs[-1][1] + runs[-1][2] == origin:
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + size)
            else:
                runs.append((target, origin, size))
        if runs:
            source.memory.copy(runs)
        if revoked is not None:
            raise GrantRevoked(f"page {revoked} is no longer granted to generation {generation}")

    def close(self) -> None:
        """Free the pool, or unmap the peer's. Requires: no tensor over it is used any more. Idempotent."""
        if self._pointer:
            (self.memory.free if self._owned else self.memory.close)(self._pointer)
            self._pointer = 0
            self._control.close()

    def unlink(self) -> None:
        """Remove the control file's name. Idempotent."""
        self._control.unlink()
