"""What is shown while the run goes on: a live bar on a terminal, a line now and then elsewhere."""

import asyncio

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadtest.connection import Clock
from loadtest.record import Tally
from loadtest.runner import Limit

_BAR_INTERVAL_S = 0.5
_LINE_INTERVAL_S = 5.0


class ProgressView:
    """Shows ``tally`` against ``limit``.

    Drawing happens in the event loop, seldom, rather than in rich's own thread: that would compete for the
    interpreter lock at moments nobody chose.
    """

    def __init__(self, console: Console, tally: Tally, limit: Limit, clock: Clock) -> None:
        self._console = console
        self._tally = tally
        self._limit = limit
        self._clock = clock
        self._started_s = clock()
        self._last_s = self._started_s
        self._last_done = 0
        self._last_chunks = 0

    async def show(self) -> None:
        """Draw until cancelled; leaves the terminal as it was."""
        if self._console.is_terminal:
            await self._bar()
        else:
            while True:
                await asyncio.sleep(_LINE_INTERVAL_S)
                elapsed_s = self._clock() - self._started_s
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

    async def _bar(self) -> None:
        columns: list[ProgressColumn] = [
            SpinnerColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[line]}", markup=False),
            TimeElapsedColumn(),
        ]
        total = self._limit.num_requests or self._limit.duration_s
        with Progress(*columns, console=self._console, auto_refresh=False, transient=True) as progress:
            task = progress.add_task("", total=total, line="")
            while True:
                elapsed_s = self._clock() - self._started_s
                done = self._tally.num_done if self._limit.num_requests else elapsed_s
                progress.update(task, completed=min(done, total or done), line=self.line())
                progress.refresh()
                await asyncio.sleep(_BAR_INTERVAL_S)
