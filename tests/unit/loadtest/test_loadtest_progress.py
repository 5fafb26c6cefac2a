"""The live line: rates since it was last drawn, tokens scaled from chunks, bar and plain form."""

import asyncio
import io
from array import array

import pytest
from rich.console import Console

from loadtest import progress
from loadtest.progress import ProgressView
from loadtest.record import Outcome, Record, Tally
from loadtest.runner import Limit


def ended(outcome: Outcome, times: list[float]) -> Record:
    return Record(
        index=0,
        scheduled_s=0,
        sent_s=0,
        outcome=outcome,
        asked_prompt_tokens=1,
        asked_output_tokens=1,
        output_tokens=3 * len(times),
        content_times_s=array("d", times),
    )


def test_rates_are_those_since_the_last_line() -> None:
    now_s = 10.0
    tally = Tally()
    view = ProgressView(Console(file=io.StringIO()), tally, Limit(num_requests=9), lambda: now_s)
    for outcome in (Outcome.OK, Outcome.REJECTED, Outcome.TIMEOUT):
        tally.sent()
        tally.ended(ended(outcome, [0.1, 0.2]))
    tally.sent()
    tally.num_chunks = 40
    now_s = 12.0
    assert view.line() == "1.5 req/s, 1 running, 3 done, 1 errors, 1 rejected, 60 tok/s"
    now_s = 13.0
    assert view.line() == "0.0 req/s, 1 running, 3 done, 1 errors, 1 rejected, 0 tok/s"


@pytest.mark.parametrize("terminal", [True, False])
async def test_it_draws_until_cancelled(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_BAR_INTERVAL_S", 0.01)
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.01)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    loop = asyncio.get_running_loop()
    with ProgressView(console, Tally(), Limit(duration_s=5.0), loop.time) as view, pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await view.show()
    assert shown.getvalue().count("0 running") >= 2
    assert ("\x1b[" in shown.getvalue()) is terminal
