"""Cores that the workers of one machine lend each other: who is alone at work takes them all, two take half each.

A file stands for the machine. A worker that has something to compute holds a lock on one byte of it, its slot, and
counts the locks of others; the kernel drops the locks of a process that dies, so no core is ever lent to the dead.
Whoever has borrowed looks again before each layer, so that a core comes back within milliseconds and not after a chunk.

POSIX record locks, whose place may lie beyond the end of the file; `fcntl(2)` has the layout of `struct flock`.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import torch

from fleet.errors import SettingsError

MAX_SLOTS = 1024
_CLAIMS = MAX_SLOTS
"""From this byte on a lock says that the slot is taken, whether its worker computes or not."""
_FLOCK = "hhqqi"


class SharedCores:
    """One worker's part in the sharing. `work` and `rest` from one thread, `refresh` from the one that computes."""

    def __init__(self, path: Path, own: int) -> None:
        """Take a slot.

        Args:
            path: the file, which says in decimal how many cores are shared.
            own: threads that this worker may always use.

        Raises:
            SettingsError: the file is not there or says something else.
        """
        try:
            self._cores = int(path.read_text())
            self._file = path.open("r+b", buffering=0)
        except (OSError, ValueError) as error:
            raise SettingsError(f"BATON_SHARED_CORES = {path}: no file that says a number of cores: {error}") from None
        self._own = own
        self._threads = 0
        self._slot = next((slot for slot in range(MAX_SLOTS) if self._lock(_CLAIMS + slot)), None)

    def close(self) -> None:
        """Give the slot back, and with it all cores."""
        self._file.close()

    def work(self) -> None:
        """From now on this worker computes."""
        if self._slot is not None:
            self._lock(self._slot)

    def rest(self) -> None:
        """It does not any more."""
        if self._slot is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, self._slot)

    def others_work(self) -> bool:
        """Whether another worker computes now; from any thread."""
        return self._num_others(0, MAX_SLOTS) > 0

    def refresh(self) -> None:
        """Set torch's threads to our present share, for products that the calling thread begins from now on."""
        threads = max(self._own, self._cores // (1 + self._num_others(0, MAX_SLOTS)))
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)

    def _lock(self, place: int) -> bool:
        """Lock one byte; False if another process holds it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            return False
        return True

    def _num_others(self, begin: int, end: int) -> int:
        """Locks of other processes in `[begin, end)`; a question names one of them, wherever it is."""
        if begin >= end:
            return 0
        question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, begin, end - begin, 0)
        kind, _, place, _, _ = struct.unpack(_FLOCK, fcntl.fcntl(self._file, fcntl.F_GETLK, question))
        if kind == fcntl.F_UNLCK:
            return 0
        return 1 + self._num_others(begin, place) + self._num_others(place + 1, end)
