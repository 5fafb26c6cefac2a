"""Processes that a bench starts: bounded in time, and gone when the bench is, however it ends.

Each has a session of its own and hears of the bench's death, even by SIGKILL (`baton/leash.py`). What they start and
leave behind becomes the bench's child (`adopt_orphans`), so that `end_all` finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from stage_results import Fault
from stages import Clock

ROOT = Path(__file__).resolve().parents[1]
TAIL_CHARS = 2500
_PR_SET_CHILD_SUBREAPER = 36
_LEASH = ROOT / "baton" / "leash.py"
_POLL_S = 0.05


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (prctl(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def start(words: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a program in the checkout; what it says, on either stream, goes to the file `log`."""
    leashed = [sys.executable, "-I", "-S", str(_LEASH), str(os.getpid()), str(int(signal.SIGTERM)), *words]
    with log.open("wb") as out:
        return subprocess.Popen(
            leashed, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it started, less those that are gone."""
    try:
        head = psutil.Process(pid)
        return [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill and bury those that still run; each is known by its start too, so that no other can be meant."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=5)  # one that a driver holds in the kernel is not waited for any longer


def end_all() -> None:
    """Kill every descendant of this process."""
    for _ in range(3):  # what a dying one started meanwhile
        if found := family(os.getpid())[1:]:
            kill(found)


@contextlib.contextmanager
def watched(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed, with what it started, if it still runs at the end."""
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(family(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def run(
    words: Sequence[str],
    clock: Clock,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> str:
    """Run a Python program (its arguments begin with a script or `-m`) to its end; returns what it said.

    Args:
        words: arguments of this interpreter.
        clock: when it must be done.
        log: takes what it says.
        environment: this process's own if None.
        on_line: hears each line as it comes.

    Raises:
        Fault: it failed or ran out of time; with the end of what it said.
    """
    name = " ".join(words[:3])
    with watched(start([sys.executable, *words], log, environment)) as process, log.open(errors="replace") as said:
        lines = _Lines(on_line)
        while process.poll() is None:
            lines.take(said.read())
            if clock.left_s == 0:
                raise Fault(f"{name}: ended when its time was up; it had said:\n{tail(log)}")
            time.sleep(_POLL_S)
        lines.take(said.read() + "\n")
        if process.returncode != 0:
            raise Fault(f"{name}: exit status {process.returncode}; the end of what it said:\n{tail(log)}")
    return log.read_text(errors="replace")


def run_for_json(words: Sequence[str], clock: Clock, log: Path, *, environment: Mapping[str, str] | None = None) -> Any:
    """What a program says on its last line of JSON; libraries may warn after it.

    Raises:
        Fault: as `run`, or there is no such line.
    """
    for line in reversed(run(words, clock, log, environment=environment).splitlines()):
        with contextlib.suppress(ValueError):
            return json.loads(line)
    raise Fault(f"{words[0]}: no line of JSON in what it said:\n{tail(log)}")


def tail(log: Path, num_chars: int = TAIL_CHARS) -> str:
    """The end of a file, empty if it is not there."""
    try:
        return log.read_text(errors="replace")[-num_chars:]
    except OSError:
        return ""


class _Lines:
    """Whole lines out of pieces of text."""

    def __init__(self, on_line: Callable[[str], None] | None) -> None:
        self._on_line = on_line
        self._rest = ""

    def take(self, piece: str) -> None:
        *whole, self._rest = (self._rest + piece).split("\n")
        for line in whole:
            if self._on_line is not None and line.strip():
                self._on_line(line)
