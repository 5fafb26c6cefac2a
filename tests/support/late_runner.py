"""A runner that computes as late as it may, like a device with a queue: launches return before anything is written."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from engine.plan import Row, Sampled, StepOutput, StepPlan
from engine.sequence import Sequence
from support.fake_runner import FakeRunner


class _Launched:
    """One step in the queue; implements `engine.plan.Pending`."""

    def __init__(self, device: LateRunner, plan: StepPlan) -> None:
        self.plan = plan
        self.output: StepOutput | None = None
        self._device = device

    def wait(self) -> StepOutput:
        while self.output is None:
            self._device.compute_oldest()
        return self.output


class LateRunner:
    """`FakeRunner`'s pages and tokens; implements `engine.plan.Runner` with steps that overlap.

    A step is computed when it is waited for, or when `compute_oldest` is called. It writes the pages that its rows
    named at the launch, whatever became of them since, so that a page given away too early gives itself away.

    Attributes:
        num_followers: rows launched so far whose token was not known.
    """

    def __init__(self, runner: FakeRunner) -> None:
        self._runner = runner
        self._queue: deque[_Launched] = deque()
        self._last: StepOutput | None = None
        self.num_followers = 0

    def feeds_next(self, plan: StepPlan) -> bool:
        """Steps of one token per row do, unless a row is constrained."""
        return all(row.count == 1 and row.sample and row.sequence.params.grammar is None for row in plan.rows)

    def launch(self, plan: StepPlan) -> StepOutput | _Launched:
        """Read the rows as a device's launch would: ids, slots and pages now, missing ids from the step before."""
        followers = [row for row in plan.rows if row.follows is not None]
        self.num_followers += len(followers)
        assert len(self._queue) <= 1, "more than two steps at once"
        if not self.feeds_next(plan):
            assert not self._queue
            assert not followers
            return self._runner.run(plan)
        launched = _Launched(self, StepPlan(tuple(_as_of_now(row) for row in plan.rows)))
        self._queue.append(launched)
        return launched

    def compute_oldest(self) -> None:
        """The device gets on by one step."""
        launched = self._queue.popleft()
        for row in launched.plan.rows:
            if row.follows is not None:
                assert self._last is not None
                token = self._last.sampled[row.follows]
                row.sequence.token_ids.append(token.token_id if isinstance(token, Sampled) else 0)
        launched.output = self._last = self._runner.run(launched.plan)

    @property
    def num_queued(self) -> int:
        """Steps launched and not computed."""
        return len(self._queue)


def _as_of_now(row: Row) -> Row:
    sequence = row.sequence
    known = row.start if row.follows is not None else row.start + row.count
    assert len(sequence.token_ids) >= known
    copied = Sequence(sequence.passport, sequence.token_ids[:known], sequence.arrival, list(sequence.page_table))
    return replace(row, sequence=copied)
