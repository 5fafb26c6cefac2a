"""Pages of a shared pool are made before they are wanted.

The kernel gives a file in /dev/shm memory when it is first touched, 4 KiB at a time, which it has to find and to zero:
for a chunk of a prompt that is a twentieth of the time that computing takes, and more than a tenth in a virtual machine
whose host must find the memory too. So a thread goes ahead of whoever takes pages, by a bounded distance, while nobody
computes: beside a step, even at the lowest priority, it made steps twice as long.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from kvtransfer.pool_memory import Region
from kvtransfer.region import PoolRegion

AHEAD_BYTES = 512 * 2**20
"""How far: some bursts of prompts. It is memory that a pool may never need."""
STRIDE_BYTES = 2**20
"""At a time, one to three milliseconds: a step that begins waits for no more."""
LOOK_S = 0.1
"""How often it looks whether somebody still computes."""


class FirstTouch:
    """Touches the pages after those in use. Nothing to do for a region that is not a file in /dev/shm.

    It reads: that makes a page of a shared file as writing would, and harms nobody who writes it meanwhile.

    Attributes:
        must_wait: whether somebody computes; asked from the thread.
    """

    def __init__(self, region: Region, *, ahead_bytes: int = AHEAD_BYTES) -> None:
        self.must_wait: Callable[[], bool] = lambda: False
        self._page_bytes = region.ref.page_bytes
        self._pool_bytes = region.ref.num_pages * region.ref.page_bytes
        self._ahead_bytes = ahead_bytes
        self._wanted_bytes = 0
        self._touched_bytes = 0
        self._news = threading.Event()
        self._closed = threading.Event()
        if isinstance(region, PoolRegion) and region.ref.name:
            view = np.frombuffer(region.buffer, dtype=np.uint8)
            threading.Thread(target=self._touch, args=(view,), name="first-touch", daemon=True).start()
            self.follow(0)

    @property
    def touched_bytes(self) -> int:
        """So far, from the first page on."""
        return self._touched_bytes

    def follow(self, num_pages: int) -> None:
        """The first `num_pages` have been taken, now or before: go on to the distance from there. Cheap."""
        self._wanted_bytes = min(self._pool_bytes, num_pages * self._page_bytes + self._ahead_bytes)
        self._news.set()

    def close(self) -> None:
        """Touch no more, but for a stride under way; the memory of a region that is closed lasts until then."""
        self._closed.set()
        self._news.set()

    def _touch(self, view: NDArray[np.uint8]) -> None:
        with suppress(OSError):  # a sandbox may forbid even this
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        compare = ctypes.CDLL(None).memcmp
        compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        while not self._closed.is_set():
            left_bytes = self._wanted_bytes - self._touched_bytes
            if left_bytes <= 0:
                self._news.wait()
                self._news.clear()
            elif self.must_wait():
                self._closed.wait(LOOK_S)
            else:
                stride_bytes = min(STRIDE_BYTES, left_bytes)
                place = view.ctypes.data + self._touched_bytes
                compare(place, place, stride_bytes)  # lets the interpreter go meanwhile
                self._touched_bytes += stride_bytes
