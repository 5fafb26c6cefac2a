"""Sends the load: by the clock (open loop) or by the answers (closed loop)."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import msgspec

from loadtest.client import Client
from loadtest.record import Outcome, Record
from loadtest.workload import Call, Workload

# A closed-loop user that was turned away rests for as long as the server says, within these bounds; else
# a full server would be hammered as fast as it can refuse.
_MIN_REST_S = 0.1
_MAX_REST_S = 30.0
_CATCH_UP = 16


class Limit(msgspec.Struct, frozen=True):
    """When to stop sending: after a number of requests, or after a time; neither for arrivals that end themselves."""

    num_requests: int | None = None
    duration_s: float | None = None

    def reached(self, num_sent: int, at_s: float) -> bool:
        """Whether the next request, due at ``at_s`` seconds after the start, is one too many."""
        if self.num_requests is not None and num_sent >= self.num_requests:
            return True
        return self.duration_s is not None and at_s >= self.duration_s


class Runner:
    """Drives one phase. ``num_unsent`` counts arrivals that the cap kept back until the time was over."""

    def __init__(self, client: Client, workload: Workload, limit: Limit) -> None:
        self._client = client
        self._workload = workload
        self._limit = limit
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_taken = 0
        self.num_unsent = 0
        self.stopped = False

    async def open_loop(self, arrivals: Iterator[float], cap: int | None) -> None:
        """Send a request at each of ``arrivals`` (seconds after the start), at most ``cap`` at a time.

        Returns when the last one has ended. An arrival that finds the cap reached waits, in order; its
        record tells for how long.
        """
        async with asyncio.TaskGroup() as group:
            self._spawn(group, self._follow(group, arrivals, cap))

    async def closed_loop(self, num_users: int) -> None:
        """Let each of ``num_users`` send its next request when its last one has ended."""
        # All users start at once: making their first prompts then would make the later ones late.
        calls = [self._workload.next_call() for _ in range(min(num_users, self._limit.num_requests or num_users))]
        async with asyncio.TaskGroup() as group:
            for call in calls:
                self._spawn(group, self._user(call))

    def stop(self) -> None:
        """Send no more and cancel what is in flight; the loop then returns. Idempotent."""
        self.stopped = True
        for task in self._tasks:
            task.cancel()

    async def _follow(self, group: asyncio.TaskGroup, arrivals: Iterator[float], cap: int | None) -> None:
        gate = asyncio.Semaphore(cap) if cap is not None else None
        gate_passed_s = 0.0  # when the cap last let this loop go on
        for number, due_s in enumerate(arrivals):
            if self._limit.reached(number, due_s):
                return
            call = self._workload.next_call()  # made ahead of time, so that its making delays nothing
            early_s = due_s - self._client.now_s()
            # Late arrivals are caught up with together: one per turn of a busy loop might never catch up.
            if early_s > 0 or number % _CATCH_UP == 0:
                await asyncio.sleep(max(0.0, early_s))
            if gate is not None:
                full = gate.locked()
                await gate.acquire()
                if full:
                    gate_passed_s = self._client.now_s()
                    if self._limit.reached(number, gate_passed_s):
                        self.num_unsent = 1 + self._count_due(number + 1, arrivals)
                        return
            held_s = max(0.0, gate_passed_s - due_s)
            self._spawn(group, self._one(call, due_s, held_s, gate))

    def _count_due(self, number: int, arrivals: Iterator[float]) -> int:
        count = 0
        for due_s in arrivals:
            if self._limit.reached(number + count, due_s):
                break
            count += 1
        return count

    async def _one(self, call: Call, due_s: float, held_s: float, gate: asyncio.Semaphore | None) -> None:
        try:
            async for _ in self._turns(call, due_s, held_s):
                pass
        finally:
            if gate is not None:
                gate.release()

    async def _user(self, first: Call) -> None:
        call: Call | None = first
        while not self._limit.reached(self._num_taken, free_s := self._client.now_s()):
            async for record in self._turns(call or self._workload.next_call(), free_s):
                rest_s = _rest_s(record)
                if rest_s > 0 and not self._limit.reached(self._num_taken, self._client.now_s() + rest_s):
                    await asyncio.sleep(rest_s)
            call = None

    async def _turns(self, call: Call, due_s: float, held_s: float = 0.0) -> AsyncIterator[Record]:
        """Send a conversation turn by turn; a failed turn, or the end of the time, ends it."""
        while True:
            self._num_taken += 1
            heard: list[str] | None = [] if call.turn + 1 < call.turns else None
            record = await self._client.send(call, scheduled_s=due_s, held_s=held_s, heard=heard)
            yield record
            if heard is None or record.outcome is not Outcome.OK:
                return
            due_s, held_s = self._client.now_s() + call.think_s[call.turn], 0.0
            if self._limit.reached(self._num_taken, due_s):
                return
            call = self._workload.follow_up(call, "".join(heard), record.output_tokens)
            await asyncio.sleep(due_s - self._client.now_s())

    def _spawn(self, group: asyncio.TaskGroup, work: "asyncio._CoroutineLike[None]") -> None:
        task = group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _rest_s(record: Record) -> float:
    if record.outcome is Outcome.OK:
        return 0.0
    if record.outcome is Outcome.REJECTED and record.retry_after_s is not None:
        return min(max(record.retry_after_s, _MIN_REST_S), _MAX_REST_S)
    return _MIN_REST_S
