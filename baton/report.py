"""Progress of a starting fleet: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


class Stage(StrEnum):
    """Where one service is in its life."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    LEFT = "left"
    FAILED = "failed"
    STOPPED = "stopped"


class Reporter(Protocol):
    """Hears what happens to the services."""

    def changed(self, name: str, stage: Stage, *, elapsed_s: float, note: str = "") -> None:
        """`name` is in `stage`, `elapsed_s` after this life of it began."""

    def say(self, line: str) -> None:
        """One line for the person at the terminal."""


class PlainReporter:
    """One line per change, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def changed(self, name: str, stage: Stage, *, elapsed_s: float, note: str = "") -> None:
        """See `Reporter`."""
        self.say(f"{name}: {stage}{_after(stage, elapsed_s)}{f', {note}' if note else ''}")

    def say(self, line: str) -> None:
        """See `Reporter`."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing to put away."""


@dataclass(slots=True)
class _Row:
    stage: Stage
    note: str
    since_s: float
    took_s: float


@dataclass(slots=True)
class LiveReporter:
    """A table that redraws itself until `close`; later changes become lines."""

    console: Console
    _rows: dict[str, _Row] = field(default_factory=dict)
    _live: Live | None = None
    _spinner: Spinner = field(default_factory=lambda: Spinner("dots"))

    def changed(self, name: str, stage: Stage, *, elapsed_s: float, note: str = "") -> None:
        """See `Reporter`."""
        if self._live is None and self._rows:
            PlainReporter(self.console).changed(name, stage, elapsed_s=elapsed_s, note=note)
            return
        self._rows[name] = _Row(stage, note, time.monotonic() - elapsed_s, elapsed_s)
        if self._live is None:
            self._live = Live(get_renderable=self._table, console=self.console, refresh_per_second=8)
            self._live.start()

    def say(self, line: str) -> None:
        """See `Reporter`."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the table as it is now; idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, row in self._rows.items():
            busy = row.stage in {Stage.STARTING, Stage.LOADING, Stage.RESTARTING}
            mark = self._spinner.render(time.monotonic()) if busy else _mark(row.stage)
            seconds = time.monotonic() - row.since_s if busy else row.took_s
            table.add_row(mark, name, Text(row.stage), f"{seconds:5.1f} s", Text(row.note, style="dim"))
        return table


def make_reporter(console: Console) -> PlainReporter | LiveReporter:
    """The one that suits the console."""
    return LiveReporter(console) if console.is_terminal else PlainReporter(console)


def _mark(stage: Stage) -> Text:
    if stage is Stage.READY:
        return Text("✓", style="green")
    return Text("✗" if stage is Stage.FAILED else "·", style="red" if stage is Stage.FAILED else "dim")


def _after(stage: Stage, elapsed_s: float) -> str:
    return "" if stage is Stage.STARTING else f" after {elapsed_s:.1f} s"
