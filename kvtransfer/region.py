"""The memory of a page pool: a private mapping, or a file in /dev/shm that a peer on the same host can map.

A region is `num_pages * page_bytes` bytes of pages, then one 64-bit word per page: the generation of the grant whose
giver may write that page now, 0 for none. The taker sets the words, a giver checks them before each page.

The owner holds an advisory lock on the file for its life. Python's resource tracker is not used: it unlinks regions
that are still in use when one of several unrelated processes exits.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.hand_off_messages import PoolRef
from kvtransfer.errors import RegionError, RegionRejected, RegionTooLarge
from kvtransfer.host import SHM_DIRECTORY, own_process

_NAME: Final = re.compile(r"baton-\d+-\d+-[0-9a-f]{16}(-[A-Za-z0-9_.]{1,64})?")
_WORD_BYTES: Final = 8
_ATTEMPTS: Final = 8


class PoolRegion:
    """Pages in mapped memory. Make one with `create` (owner) or `attach` (a peer that writes into it).

    Attributes:
        ref: name and size as a Grant carries them; the name is empty for a private region.
    """

    def __init__(self, mapping: mmap.mmap, ref: PoolRef, *, lock_fd: int | None) -> None:
        self.ref = ref
        self._mapping = mapping
        self._lock_fd = lock_fd
        pages_end = ref.num_pages * ref.page_bytes
        self._view = memoryview(mapping)
        self._pages = self._view[:pages_end]
        self._words: NDArray[np.int64] = np.frombuffer(
            mapping, dtype=np.int64, count=ref.num_pages, offset=_words_offset(pages_end)
        )

    @classmethod
    def create(cls, name: str, *, num_pages: int, page_bytes: int, shared: bool) -> PoolRegion:
        """Map zeroed memory for a pool; nothing is committed before it is touched.

        `name` is a label put into the file's name, for people; letters, digits, `_` and `.`, others are replaced.
        `shared`: as a file of mode 0600 in /dev/shm; else private to the process.

        Raises:
            RegionTooLarge: /dev/shm has not enough room.
            RegionError: it cannot be made for another reason.
        """
        if num_pages < 1 or page_bytes < 1:
            raise RegionError(f"a region needs pages: num_pages={num_pages}, page_bytes={page_bytes}")
        size = _region_bytes(num_pages, page_bytes)
        if not shared:
            ref = PoolRef(name="", num_pages=num_pages, page_bytes=page_bytes)
            return cls(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), ref, lock_fd=None)
        _require_room(size)
        file_name, fd = _create_file(re.sub(r"[^A-Za-z0-9_.]", "_", name)[:64])
        try:
            os.ftruncate(fd, size)
            mapping = mmap.mmap(fd, size)
        except OSError as error:
            os.close(fd)
            (SHM_DIRECTORY / file_name).unlink()
            raise RegionError(f"cannot map {size} bytes of shared memory: {error}") from error
        ref = PoolRef(name=file_name, num_pages=num_pages, page_bytes=page_bytes)
        return cls(mapping, ref, lock_fd=fd)

    @classmethod
    def attach(cls, ref: PoolRef) -> PoolRegion:
        """Map a peer's region by name.

        Raises:
            RegionRejected: the name is not of ours, or the file is missing, another user's or of another size.
        """
        if _NAME.fullmatch(ref.name) is None:
            raise RegionRejected(f"{ref.name!r} is not the name of a shared pool")
        try:
            fd = os.open(SHM_DIRECTORY / ref.name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RegionRejected(f"cannot open the shared pool {ref.name}: {error}") from error
        try:
            found = os.fstat(fd)
            size = _region_bytes(ref.num_pages, ref.page_bytes)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise RegionRejected(f"the shared pool {ref.name} is not a file of this user")
            if found.st_size != size or size == 0:
                raise RegionRejected(f"the shared pool {ref.name} has {found.st_size} bytes, promised were {size}")
            return cls(mmap.mmap(fd, size), ref, lock_fd=None)
        except OSError as error:
            raise RegionRejected(f"cannot map the shared pool {ref.name}: {error}") from error
        finally:
            os.close(fd)

    @property
    def buffer(self) -> memoryview:
        """All pages as one writable run of bytes, `[num_pages * page_bytes] u8`; valid until `close`."""
        return self._pages

    def page(self, page_id: int) -> memoryview:
        """One page, `[page_bytes] u8`, writable. Raises IndexError for an id outside the pool."""
        if not 0 <= page_id < self.ref.num_pages:
            raise IndexError(f"page {page_id} is outside a pool of {self.ref.num_pages}")
        start = page_id * self.ref.page_bytes
        return self._pages[start : start + self.ref.page_bytes]

    def frame(self, page_id: int) -> memoryview:
        """One page as bytes to be carried; not a copy."""
        return self.page(page_id)

    def store(self, page_id: int, data: memoryview) -> None:
        """Write one page. numpy lets other threads run meanwhile; slicing would not."""
        np.copyto(np.frombuffer(self.page(page_id), dtype=np.uint8), np.frombuffer(data, dtype=np.uint8))

    def open_pages(self, page_ids: Iterable[int], generation: int) -> None:
        """Let the giver of grant `generation` write these pages. Mutates: their generation words."""
        for page_id in page_ids:
            self._words[page_id] = generation

    def close_pages(self, page_ids: Iterable[int]) -> None:
        """Let nobody write these pages from now on; a write that began before may still be in flight."""
        for page_id in page_ids:
            self._words[page_id] = 0

    def writer(self, page_id: int) -> int:
        """Generation of the grant whose giver may write this page; 0 for none."""
        return int(self._words[page_id])

    def close(self) -> None:
        """Drop the mapping and the owner's lock. Memory that a tensor or a view still uses stays mapped for it."""
        self._words = np.empty(0, dtype=np.int64)
        with suppress(BufferError):
            self._pages.release()
            self._view.release()
            self._mapping.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def unlink(self) -> None:
        """Remove the name, so that the memory goes with its last mapping. Idempotent; nothing for private ones."""
        if self.ref.name:
            (SHM_DIRECTORY / self.ref.name).unlink(missing_ok=True)


def is_named(ref: PoolRef) -> bool:
    """Whether the name still stands for a shared pool: neither its owner nor a sweep has removed it."""
    return (SHM_DIRECTORY / ref.name).exists()


def sweep_stale() -> list[str]:
    """Remove shared regions of this user whose owner is gone, and return their names.

    The owner's lock decides, not the process id in the name: it is right across process-id namespaces too.
    """
    removed = []
    for path in _region_files():
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or another user's
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed.append(path.name)
        except OSError:
            continue  # its owner lives
        finally:
            os.close(fd)
    return removed


def _region_files() -> list[Path]:
    return [path for path in SHM_DIRECTORY.glob("baton-*") if _NAME.fullmatch(path.name) is not None]


def _create_file(label: str) -> tuple[str, int]:
    """A new locked file of mode 0600 in /dev/shm: its name and descriptor."""
    owner = own_process()
    for _ in range(_ATTEMPTS):
        name = f"baton-{owner.pid}-{owner.start_ticks}-{secrets.token_hex(8)}" + (f"-{label}" if label else "")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(SHM_DIRECTORY / name, flags, 0o600)
        except OSError as error:
            raise RegionError(f"cannot create shared memory in {SHM_DIRECTORY}: {error}") from error
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink == 1:
                return name, fd
        os.close(fd)  # a sweep by another process came between creating and locking: try another name
    raise RegionError(f"shared memory in {SHM_DIRECTORY} keeps being removed while it is made")


def shared_room_bytes() -> int:
    """Room left in /dev/shm for a new region's pages, counting what other sparse regions may still fill.

    A 64th of it is kept back for the region's generation words.

    Raises:
        RegionError: there is no /dev/shm.
    """
    try:
        found = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        raise RegionError(f"there is no {SHM_DIRECTORY} here: {error}; use the tcp transport") from error
    promised = 0
    for path in _region_files():
        with suppress(OSError):
            other = path.stat()
            promised += max(0, other.st_size - other.st_blocks * 512)
    room = max(0, found.f_bavail * found.f_frsize - promised)
    return room - room // 64


def _require_room(size: int) -> None:
    """Raise RegionTooLarge unless /dev/shm has room."""
    room = shared_room_bytes()
    if size > room:
        mib = 1024 * 1024
        raise RegionTooLarge(
            f"the page pool needs {-(-size // mib)} MiB of shared memory, {SHM_DIRECTORY} has {room // mib} MiB left: "
            f"give the container more (`shm_size` in the compose file, `--shm-size` of docker run), "
            f"make the pool smaller, or use the tcp transport"
        )


def _words_offset(pages_end: int) -> int:
    return -(-pages_end // mmap.PAGESIZE) * mmap.PAGESIZE


def _region_bytes(num_pages: int, page_bytes: int) -> int:
    return _words_offset(num_pages * page_bytes) + num_pages * _WORD_BYTES
