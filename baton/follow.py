"""Copies what children write to their log files to the terminal, each line under its child's name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

FOLLOW_EVERY_S = 0.2
CHUNK_BYTES = 256 * 1024


class LogFollower:
    """Follows `*.log` in a run directory; half lines wait for their end."""

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self._run_dir = run_dir
        self._say = say
        self._offsets: dict[Path, int] = {}
        self._halves: dict[Path, bytes] = {}

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            self.look()
            await asyncio.sleep(FOLLOW_EVERY_S)

    def look(self) -> None:
        """Say what is new."""
        for path in sorted(self._run_dir.glob("*.log")):
            with path.open("rb") as log:
                log.seek(self._offsets.get(path, 0))
                new = log.read(CHUNK_BYTES)
            if not new:
                continue
            self._offsets[path] = self._offsets.get(path, 0) + len(new)
            *lines, half = (self._halves.get(path, b"") + new).split(b"\n")
            self._halves[path] = half
            for line in lines:
                self._say(f"[{path.stem}] {line.decode('utf-8', 'replace')}")
