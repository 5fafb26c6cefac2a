"""What the schedulers share: the face they show to a step loop, and two small books."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from engine.errors import BrokenInvariant, DuplicateSequence, StepOutOfOrder
from engine.plan import StepOutput, StepPlan
from engine.progress import StepProgress
from engine.sequence import Sequence


class Scheduler(Protocol):
    """Decides in integers which tokens the model computes next.

    One thread owns a scheduler; the model step alone may run elsewhere. While a plan is in flight, between `schedule`
    and `commit`, sequences may come and go, but pages of a sequence in the plan are not reused. At most two plans are
    in flight, the second made by `schedule_ahead`; they are committed in order. A step that fails as a whole is
    committed like any other, with a `Failed` for every row.
    """

    def schedule(self) -> StepPlan | None:
        """The next step, now in flight, or None where nothing can be computed now.

        Raises:
            StepOutOfOrder: a plan is in flight.
        """

    def schedule_ahead(self) -> StepPlan | None:
        """The step after the one in flight, in flight too, where that one's tokens need not be known to make it.

        None where they must be, or where one has been made already. A sequence that ends with a token of the plan
        before is computed once more all the same: what comes of it is thrown away.
        """

    def commit(self, plan: StepPlan, out: StepOutput) -> StepProgress:
        """Book the results of the oldest plan in flight.

        Raises:
            StepOutOfOrder: `plan` is not that one.
            BrokenInvariant: `out` is not as long as the plan; nothing was booked and the plan is still in flight.
        """

    def abort(self, request_id: str, epoch: int) -> list[Sequence]:
        """Forget this request at every epoch up to and including `epoch`; idempotent.

        Returns the sequences that ended by it, each of which owes its gateway one terminal message; empty (hence
        false) where there was none. Their pages are released at once, or by `commit` if a plan is in flight with
        them.
        """


class SequenceIndex:
    """The sequences of a scheduler by request; a request may be here under several epochs for a moment."""

    __slots__ = ("_of_request",)

    def __init__(self) -> None:
        self._of_request: dict[str, list[Sequence]] = {}

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._of_request.values():
            yield from sequences

    def require_new(self, request_id: str, epoch: int) -> None:
        """Raises DuplicateSequence where this request is here under this epoch."""
        if any(other.epoch == epoch for other in self._of_request.get(request_id, ())):
            raise DuplicateSequence(request_id=request_id, epoch=epoch)

    def up_to(self, request_id: str, epoch: int) -> list[Sequence]:
        """The sequences of this request at epochs up to and including `epoch`."""
        return [s for s in self._of_request.get(request_id, ()) if s.epoch <= epoch]

    def add(self, sequence: Sequence) -> None:
        """Enter a new sequence."""
        self._of_request.setdefault(sequence.request_id, []).append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Strike a sequence that is here."""
        same_request = self._of_request[sequence.request_id]
        same_request.remove(sequence)
        if not same_request:
            del self._of_request[sequence.request_id]


class InFlight:
    """The plans between `schedule` and `commit`, oldest first, and whom they name."""

    __slots__ = ("_plans",)

    def __init__(self) -> None:
        self._plans: list[StepPlan] = []

    @property
    def only(self) -> StepPlan | None:
        """The plan in flight, where it is just one."""
        return self._plans[0] if len(self._plans) == 1 else None

    def holds(self, sequence: Sequence) -> bool:
        """Whether a plan in flight computes this sequence."""
        return any(row.sequence is sequence for plan in self._plans for row in plan.rows)

    def require_none(self) -> None:
        """Raises StepOutOfOrder where a plan is in flight."""
        if self._plans:
            raise StepOutOfOrder("the last plan must be committed before the next one is made")

    def start(self, plan: StepPlan) -> StepPlan:
        """Put `plan` in flight and return it."""
        self._plans.append(plan)
        return plan

    def finish(self, plan: StepPlan, out: StepOutput) -> None:
        """Take `plan` out of flight, after checking that its turn is now and that `out` fits it. Raises as `commit`."""
        if not self._plans or plan is not self._plans[0]:
            raise StepOutOfOrder("the plan committed is not the oldest one in flight")
        if len(out.sampled) != len(plan.rows):
            raise BrokenInvariant(f"{len(out.sampled)} results for {len(plan.rows)} rows")
        del self._plans[0]
