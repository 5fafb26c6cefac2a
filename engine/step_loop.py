"""The step loop: schedule, run, commit, over and over.

Everything but the model step happens on the event loop's thread, so that scheduler and pages have one owner and need
no locks; the step alone runs on a thread of its own, and messages are handled while it does.

Where a step runs on a device, the next one is scheduled and launched behind it before its results are awaited, so that
the device never waits for this loop:

    step n     schedule launch ......................... wait commit publish
    step n+1                    schedule_ahead launch ....................... wait commit publish
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from engine.plan import Failed, Pending, Runner, StepOutput, StepPlan
from engine.progress import StepProgress
from engine.scheduler import Scheduler
from fleet.logs import get_logger

_log = get_logger("step_loop")

_Result = TypeVar("_Result", StepOutput, "StepOutput | Pending")


@dataclass(frozen=True, slots=True)
class _Started:
    """A plan in flight."""

    plan: StepPlan
    began_s: float
    result: StepOutput | Pending


class StepLoop:
    """Drives one scheduler and one runner.

    Args:
        scheduler: what to compute next.
        runner: computes it; called on the step thread alone.
        on_step: called after each commit with its progress and how long the model step took, in seconds; of a step
            that was launched behind another, since that one's end.
        on_scheduled: called after each `schedule` with its plan, before the step runs; also when there is none,
            since sequences may have lost their place. Not after `schedule_ahead`, which begins or ends nothing.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        on_step: Callable[[StepPlan, StepProgress, float], None],
        on_scheduled: Callable[[StepPlan | None], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._on_step = on_step
        self._on_scheduled = on_scheduled
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="step")

    def wake(self) -> None:
        """There may be something to compute now."""
        self._wake.set()

    async def run(self) -> None:
        """Step until cancelled; a task of the service's group."""
        try:
            while True:
                self._wake.clear()
                plan = self._scheduler.schedule()
                self._on_scheduled(plan)
                if plan is None:
                    await self._wake.wait()
                    continue
                started: _Started | None = await self._start(plan)
                ended_s = 0.0
                while started is not None:
                    ahead = self._scheduler.schedule_ahead()
                    following = await self._start(ahead) if ahead is not None else None
                    out = await self._outcome(started)
                    step_s = time.perf_counter() - max(started.began_s, ended_s)
                    ended_s = time.perf_counter()
                    self._on_step(started.plan, self._scheduler.commit(started.plan, out), step_s)
                    started = following
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    async def _start(self, plan: StepPlan) -> _Started:
        began_s = time.perf_counter()
        result = await self._on_thread(plan, lambda: self._runner.launch(plan))
        return _Started(plan, began_s, result)

    async def _outcome(self, started: _Started) -> StepOutput:
        result = started.result
        return result if isinstance(result, StepOutput) else await self._on_thread(started.plan, result.wait)

    async def _on_thread(self, plan: StepPlan, work: Callable[[], _Result]) -> _Result | StepOutput:
        """Run a part of a step. If it fails its requests end with an error, and the worker lives on."""

        def guarded() -> _Result | StepOutput:
            try:
                return work()
            except Exception as error:  # noqa: BLE001 - whatever it was, these requests fail and the worker lives on
                _log.exception("model step failed", num_rows=len(plan.rows), num_tokens=plan.num_tokens)
                failed = Failed(message=f"the model step failed: {type(error).__name__}")
                return StepOutput(tuple(failed for _ in plan.rows))

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)
