"""What is shown while the run goes on: a live bar on a terminal, a line now and then elsewhere."""

import asyncio
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadtest.connection import Clock
from loadtest.record import Tally
from loadtest.runner import Limit

_BAR_INTERVAL_S = 0.5
_LINE_INTERVAL_S = 5.0


class ProgressView:
    """Shows ``tally`` against ``limit``; a context manager that holds the bar's place on the terminal.

    Enter it before the measured phase: rich's first drawing loads modules for tens of milliseconds. Drawing
    happens in the event loop, seldom, rather than in rich's own thread, which would compete for the
    interpreter lock at moments nobody chose.
    """

    def __init__(self, console: Console, tally: Tally, limit: Limit, clock: Clock) -> None:
        self._console = console
        self._tally = tally
        self._limit = limit
        self._clock = clock
        self._started_s = self._last_s = clock()
        self._last_done = 0
        self._last_chunks = 0
        columns: list[ProgressColumn] = [
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False),
            TimeElapsedColumn(),
        ]
        self._bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
        self._task = self._bar.add_task("", total=limit.num_requests or limit.duration_s, line="")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
            self._bar.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    async def show(self) -> None:
        """Draw until cancelled."""
        self._started_s = self._last_s = self._clock()
        interval_s = _BAR_INTERVAL_S if self._console.is_terminal else _LINE_INTERVAL_S
        while True:
            await asyncio.sleep(interval_s)
            elapsed_s = self._clock() - self._started_s
            if self._console.is_terminal:
                done = self._tally.num_done if self._limit.num_requests else elapsed_s
                self._bar.update(self._task, completed=done, line=self.line())
                self._bar.refresh()
            else:
                self._console.print(f"[{elapsed_s:6.1f} s] {self.line()}", markup=False, highlight=False)

    def line(self) -> str:
        """Return the counts and the rates since the last call. Mutates: where the next rates begin."""
        tally, now_s = self._tally, self._clock()
        span_s = max(now_s - self._last_s, 1e-9)
        done_per_s = (tally.num_done - self._last_done) / span_s
        # Chunks are seen at once, tokens only in the usage at the end: scale one by the other.
        tokens_per_s = (tally.num_chunks - self._last_chunks) * tally.tokens_per_chunk / span_s
        self._last_s, self._last_done, self._last_chunks = now_s, tally.num_done, tally.num_chunks
        return (
            f"{done_per_s:.1f} req/s, {tally.num_running} running, {tally.num_done} done, "
            f"{tally.num_failed} errors, {tally.num_rejected} rejected, {tokens_per_s:.0f} tok/s"
        )
