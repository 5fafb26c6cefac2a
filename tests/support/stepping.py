"""The step loop, run until there is nothing left to compute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine.plan import Runner, StepPlan
from engine.progress import StepProgress
from engine.scheduler import Scheduler
from engine.step_loop import StepLoop


async def run_until_idle(
    scheduler: Scheduler,
    runner: Runner,
    on_step: Callable[[StepPlan, StepProgress, float], None],
    *,
    timeout_s: float,
) -> None:
    """Step until the scheduler has no plan. Raises: TimeoutError."""
    idle = asyncio.Event()
    loop = StepLoop(scheduler, runner, on_step=on_step, on_scheduled=lambda plan: idle.set() if plan is None else None)
    async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
        task = group.create_task(loop.run())
        await idle.wait()
        task.cancel()
