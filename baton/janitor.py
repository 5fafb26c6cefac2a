"""Run beside `baton up`: if that dies without a word (SIGKILL), end its children and remove what it left.

    python -m baton.janitor GRACE_S < pipe

The pipe's other end is held by `baton up` alone. It carries lines: `group PID` and `gone PID` for process groups,
`remove PATH` for files and directories, and `done` before an orderly end. End of file without `done` is a sudden death.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

POLL_S = 0.05


def read_orders(lines: Iterable[str]) -> tuple[list[int], list[Path]] | None:
    """Follow the lines to their end: groups and paths to clear away, or None after an orderly end."""
    groups: list[int] = []
    paths: list[Path] = []
    for line in lines:
        verb, _, argument = line.rstrip("\n").partition(" ")
        match verb:
            case "group":
                groups.append(int(argument))
            case "gone":
                with suppress(ValueError):
                    groups.remove(int(argument))
            case "remove":
                paths.append(Path(argument))
            case "done":
                return None
    return groups, paths


def end_groups(groups: list[int], *, grace_s: float) -> None:
    """SIGTERM to every group, then SIGKILL to those still there after `grace_s`."""
    _signal_all(groups, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while any(_exists(group) for group in groups) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    _signal_all(groups, signal.SIGKILL)


def remove(path: Path) -> None:
    """Remove a file, socket or directory if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _signal_all(groups: list[int], signum: signal.Signals) -> None:
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signum)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    return True


def main() -> int:
    """Wait for the end of the pipe and act on it; children get GRACE_S seconds to leave by themselves."""
    orders = read_orders(sys.stdin)
    if orders is None:
        return 0
    groups, paths = orders
    end_groups(groups, grace_s=float(sys.argv[1]))
    for path in paths:
        remove(path)
    from kvtransfer.region import sweep_stale

    sweep_stale()
    return 0


if __name__ == "__main__":
    sys.exit(main())
