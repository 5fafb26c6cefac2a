"""One child process: its own session, its own log file, bound to our life."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from baton import leash

TAIL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run.

    Attributes:
        name: unique in the fleet, e.g. `prefill-0`; names the log file.
        role: `redis`, `prefill`, `decode` or `gateway`; decides when it starts and stops.
        command: program and arguments.
        environ: its whole environment.
        grace_s: how long it may take to leave after SIGTERM.
    """

    name: str
    role: str
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)
    grace_s: float = 10.0


class Child:
    """One life of a spec. Its session is its own, so that Ctrl-C in the terminal reaches only us."""

    def __init__(self, spec: ChildSpec, process: asyncio.subprocess.Process, log_path: Path, log_start: int) -> None:
        self.spec = spec
        self.started_s = time.monotonic()
        self.log_path = log_path
        self._log_start = log_start
        self._process = process

    @classmethod
    async def start(cls, spec: ChildSpec, run_dir: Path) -> Child:
        """Start it; output is appended to `{run_dir}/{name}.log`.

        Raises:
            OSError: the program cannot be started.
        """
        log_path = run_dir / f"{spec.name}.log"
        with log_path.open("ab") as log:
            log_start = log.tell()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), str(int(signal.SIGTERM))),
                *spec.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(spec.environ),
                start_new_session=True,
            )
        return cls(spec, process, log_path, log_start)

    @property
    def pid(self) -> int:
        """Process id, which is also its session's and process group's."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.returncode

    @property
    def has_spoken(self) -> bool:
        """Whether this life has written to its log."""
        with suppress(OSError):
            return self.log_path.stat().st_size > self._log_start
        return False

    async def wait(self, timeout_s: float | None = None) -> int | None:
        """Its exit code, or None if it still runs after `timeout_s`."""
        if timeout_s is None:
            return await self._process.wait()
        try:
            return await asyncio.wait_for(self._process.wait(), timeout_s)
        except TimeoutError:
            return None

    async def stop(self, *, hurry: asyncio.Event) -> bool:
        """SIGTERM, a bounded wait, SIGKILL to whatever is left of its group. True if it left by itself.

        Setting `hurry` ends the wait at once.
        """
        left = True
        if self.exit_code is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            left = await self._leaves(hurry)
        self._kill_group()
        await self._process.wait()
        return left

    async def _leaves(self, hurry: asyncio.Event) -> bool:
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(self._process.wait()), group.create_task(hurry.wait())]
            await asyncio.wait(waits, timeout=self.spec.grace_s, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
        return self.exit_code is not None

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def clear_group(self) -> None:
        """Kill what an ended child may have left in its process group."""
        if self.exit_code is not None:
            self._kill_group()

    def tail(self, num_lines: int) -> list[str]:
        """The last lines of this life's output."""
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, size - TAIL_BYTES))
                text = log.read().decode("utf-8", "replace")
        except OSError:
            return []
        return text.splitlines()[-num_lines:]
