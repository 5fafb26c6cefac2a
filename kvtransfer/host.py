"""Who shares memory with whom, and whether a process on this host still lives.

Two containers on one machine share a boot id, but neither /dev/shm nor process ids unless told to. The identity
covers all of it, so that processes which cannot share memory never try.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

SHM_DIRECTORY = Path("/dev/shm")  # noqa: S108  # where POSIX shared memory lives on Linux, made with O_EXCL and 0600


@cache
def host_identity() -> str:
    """Equal in two processes exactly if they can map each other's shared memory and see each other's process ids.

    Boot id, process-id and IPC namespaces, device of /dev/shm, and user (regions are private to one).
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    namespaces = [_namespace(kind) for kind in ("pid", "ipc")]
    device = SHM_DIRECTORY.stat().st_dev if SHM_DIRECTORY.is_dir() else "none"
    return "/".join([boot_id, *namespaces, f"shm:[{device}]", f"uid:[{os.geteuid()}]"])


def _namespace(kind: str) -> str:
    try:
        return str(Path(f"/proc/self/ns/{kind}").readlink())
    except OSError:
        return f"{kind}:[unknown]"


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process life on this host: ids are reused, start times are not (clock ticks since boot, proc(5))."""

    pid: int
    start_ticks: int


class ProcessWatch(Protocol):
    """Tells whether a process on this host is gone; tests put their own in its place."""

    def is_gone(self, process: ProcessIdentity) -> bool:
        """True only if the process can write no more: ended (a zombie's memory is unmapped), or its id reused."""


class ProcProcessWatch:
    """Reads /proc."""

    def is_gone(self, process: ProcessIdentity) -> bool:
        """See `ProcessWatch`. A leader that ended before its other threads still counts as alive."""
        fields = _stat_fields(process.pid)
        if fields is None:
            return True
        state, num_threads, start_ticks = fields[0], int(fields[17]), int(fields[19])
        if start_ticks != process.start_ticks:
            return True
        return state in {"X", "Z"} and num_threads <= 1


@cache
def own_process() -> ProcessIdentity:
    """Identity of the calling process. Not to be called before a fork that goes on without exec."""
    fields = _stat_fields(os.getpid())
    return ProcessIdentity(os.getpid(), int(fields[19]) if fields is not None else 0)


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the state on, or None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()
