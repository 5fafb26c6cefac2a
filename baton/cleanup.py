"""Keeps account of what a run leaves lying about, and has it cleared even if the run dies without a word."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from baton.janitor import remove

GRACE_S = 8.0


class Cleanup:
    """A context manager around a run: starts the janitor, and at an orderly end removes the paths itself.

    After a sudden death the children get `grace_s` to leave by themselves.
    """

    def __init__(self, *, grace_s: float = GRACE_S) -> None:
        self._grace_s = grace_s
        self._paths: list[Path] = []
        self._janitor: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C and a closing terminal must not reach it.
        self._janitor = subprocess.Popen(
            [sys.executable, "-m", "baton.janitor", str(self._grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        return self

    def will_remove(self, path: Path) -> None:
        """This file or directory goes when the run ends, however it ends."""
        self._paths.append(path)
        self._tell(f"remove {path}")

    def group(self, pid: int, alive: bool) -> None:
        """A process group began or is over."""
        self._tell(f"{'group' if alive else 'gone'} {pid}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from kvtransfer.region import sweep_stale

        for path in self._paths:
            remove(path)
        # A worker that was killed could not remove its shared memory.
        sweep_stale()
        self._tell("done")
        if self._janitor is not None and self._janitor.stdin is not None:
            with suppress(OSError):
                self._janitor.stdin.close()
            self._janitor.wait()

    def _tell(self, order: str) -> None:
        if self._janitor is None or self._janitor.stdin is None:
            return
        # The janitor is a safety net: if somebody killed it, the run goes on without.
        with suppress(OSError):
            self._janitor.stdin.write(f"{order}\n")
            self._janitor.stdin.flush()
