"""Starts children in order, keeps them running, and stops them in order.

Start: Redis, and when it answers, workers and gateway together. A child that ends before its first readiness ends the
whole start. Afterwards a crash is answered by a restart (see `policy`); exit code 0 means that a worker left on
purpose (it was drained), and it stays away. Stop: gateway first, so that nothing new comes in, then prefill, then
decode workers, then Redis.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from baton.child import Child, ChildSpec
from baton.errors import ServiceDied, describe_exit
from baton.policy import CrashHistory, RestartPolicy
from baton.probes import Probe
from baton.report import Reporter, Stage

START_ORDER = (("redis",), ("prefill", "decode", "gateway"))
STOP_ORDER = ("gateway", "prefill", "decode", "redis")
WORKERS = frozenset({"prefill", "decode"})
PROBE_EVERY_S = 0.1
SHOWN_LINES = 20

Callback = Callable[[], Awaitable[None]]
Watcher = Callable[[int, bool], None]
"""Hears of each process group that begins (True) or is over (False)."""


class Supervisor:
    """Runs a set of children. Use `run` once.

    Args:
        specs: what to run.
        run_dir: where logs go.
        probe: tells when a child is ready.
        reporter: hears of every change.
        policy: of restarts.
        on_group: hears of process groups, so that somebody outside can clear up after a sudden death of ours.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        run_dir: Path,
        probe: Probe,
        reporter: Reporter,
        policy: RestartPolicy | None = None,
        on_group: Watcher = lambda _pid, _alive: None,
    ) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self._specs = list(specs)
        self._run_dir = run_dir
        self._probe = probe
        self._reporter = reporter
        self._policy = policy or RestartPolicy()
        self._on_group = on_group
        self._children: dict[str, Child] = {}
        self._ready = {spec.name: asyncio.Event() for spec in specs}
        self._given_up: set[str] = set()
        self._keepers: list[asyncio.Task[None]] = []

    async def run(self, *, on_ready: Callback, on_redis: Callback | None = None) -> None:
        """Start everything, call `on_ready` once all is, and run until `stop` is set; then stop everything.

        `on_redis` is called between Redis and the services.

        Raises:
            ServiceDied: a child ended before it was ready, or crashed too often and nothing can stand in for it.
                All others have been stopped by then.
        """
        try:
            async with asyncio.TaskGroup() as group:
                work = group.create_task(self._start_and_keep(group, on_redis, on_ready))
                await self.stop.wait()
                work.cancel()
                for keeper in self._keepers:
                    keeper.cancel()
        except* ServiceDied as died:
            raise _first(died) from None
        finally:
            await self._stop_all()

    async def _start_and_keep(self, group: asyncio.TaskGroup, on_redis: Callback | None, on_ready: Callback) -> None:
        for roles, then in zip(START_ORDER, (on_redis, on_ready), strict=True):
            wave = [spec for spec in self._specs if spec.role in roles]
            self._keepers += [group.create_task(self._keep(spec)) for spec in wave]
            for spec in wave:
                await self._ready[spec.name].wait()
            if then is not None:
                await then()
                _heed_cancellation()

    async def _keep(self, spec: ChildSpec) -> None:
        """Run lives of one child until it leaves on purpose or has crashed too often."""
        history = CrashHistory(self._policy)
        while True:
            child = await self._begin(spec)
            code = await self._live(child)
            elapsed_s = time.monotonic() - child.started_s
            self._end(child)
            if not self._ready[spec.name].is_set():
                self._reporter.changed(spec.name, Stage.FAILED, elapsed_s=elapsed_s, note=describe_exit(code))
                raise self._died(child, code, "ended before it was ready")
            if code == 0 and spec.role in WORKERS:
                self._reporter.changed(spec.name, Stage.LEFT, elapsed_s=elapsed_s, note="as asked; not restarted")
                return
            pause_s = history.pause_after_crash(time.monotonic())
            if pause_s is None:
                self._give_up(child, code, elapsed_s)
                return
            note = f"{describe_exit(code)}; restarting in {pause_s:g} s"
            self._reporter.changed(spec.name, Stage.RESTARTING, elapsed_s=elapsed_s, note=note)
            await asyncio.sleep(pause_s)

    async def _begin(self, spec: ChildSpec) -> Child:
        child = await Child.start(spec, self._run_dir)
        self._children[spec.name] = child
        self._on_group(child.pid, True)
        self._reporter.changed(spec.name, Stage.STARTING, elapsed_s=0.0)
        return child

    async def _live(self, child: Child) -> int:
        """Follow one life to its end and return its exit code, reporting on the way."""
        stage = Stage.STARTING
        while stage is not Stage.READY:
            code = await child.wait(PROBE_EVERY_S)
            if code is not None:
                return code
            if stage is Stage.STARTING and child.has_spoken:
                stage = Stage.LOADING
                self._changed(child, stage)
            ready = await self._probe(child)
            _heed_cancellation()
            if ready:
                stage = Stage.READY
                self._changed(child, stage)
                self._ready[child.spec.name].set()
        code = await child.wait()
        return 0 if code is None else code

    def _changed(self, child: Child, stage: Stage) -> None:
        self._reporter.changed(child.spec.name, stage, elapsed_s=time.monotonic() - child.started_s)

    def _end(self, child: Child) -> None:
        child.clear_group()
        self._on_group(child.pid, False)

    def _give_up(self, child: Child, code: int, elapsed_s: float) -> None:
        spec = child.spec
        note = f"{describe_exit(code)}, crashed too often; its log is {child.log_path}"
        self._reporter.changed(spec.name, Stage.FAILED, elapsed_s=elapsed_s, note=note)
        self._given_up.add(spec.name)
        if all(other.name in self._given_up for other in self._specs if other.role == spec.role):
            raise self._died(child, code, "crashed too often")

    def _died(self, child: Child, code: int, why: str) -> ServiceDied:
        return ServiceDied(
            child.spec.name, code=code, log_lines=child.tail(SHOWN_LINES), log_path=str(child.log_path), why=why
        )

    async def _stop_all(self) -> None:
        for role in STOP_ORDER:
            leaving = [
                child for child in self._children.values() if child.spec.role == role and child.exit_code is None
            ]
            async with asyncio.TaskGroup() as group:
                for child in leaving:
                    group.create_task(self._stop_one(child))

    async def _stop_one(self, child: Child) -> None:
        begun_s = time.monotonic()
        left = await child.stop(hurry=self.hurry)
        self._on_group(child.pid, False)
        took_s = time.monotonic() - begun_s
        self._reporter.changed(child.spec.name, Stage.STOPPED, elapsed_s=took_s, note="" if left else "by SIGKILL")
        if not left and not self.hurry.is_set():
            self._reporter.say(
                f"warning: {child.spec.name} did not leave within {child.spec.grace_s:g} s and was killed"
            )


def _heed_cancellation() -> None:
    """Raise CancelledError if this task was cancelled in a call that swallowed it, as the Redis client's reads do."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _first(group: ExceptionGroup[ServiceDied]) -> ServiceDied:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error
