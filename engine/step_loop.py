"""The step loop: schedule, run, commit, over and over.

Everything but the model step happens on the event loop's thread, so that scheduler and pages have one owner and need
no locks; the step alone runs on a thread of its own, and messages are handled while it does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from engine.plan import Failed, Runner, StepOutput, StepPlan
from engine.progress import StepProgress
from engine.scheduler import Scheduler
from fleet.logs import get_logger

_log = get_logger("step_loop")


class StepLoop:
    """Drives one scheduler and one runner.

    Args:
        scheduler: what to compute next.
        runner: computes it; called on the step thread alone.
        on_step: called after each commit with its progress and how long the model step took, in seconds.
        on_scheduled: called after each `schedule` with its plan, before the step runs; also when there is none,
            since sequences may have lost their place.
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
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._wake.clear()
                plan = self._scheduler.schedule()
                self._on_scheduled(plan)
                if plan is None:
                    await self._wake.wait()
                    continue
                began_s = time.perf_counter()
                out = await loop.run_in_executor(self._thread, self._run_step, plan)
                step_s = time.perf_counter() - began_s
                self._on_step(plan, self._scheduler.commit(plan, out), step_s)
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _run_step(self, plan: StepPlan) -> StepOutput:
        """One model step. If it fails as a whole its requests end with an error, and the worker lives on."""
        try:
            return self._runner.run(plan)
        except Exception as error:  # noqa: BLE001 - whatever it was, these requests fail and the worker lives on
            _log.exception("model step failed", num_rows=len(plan.rows), num_tokens=plan.num_tokens)
            failed = Failed(message=f"the model step failed: {type(error).__name__}")
            return StepOutput(tuple(failed for _ in plan.rows))
