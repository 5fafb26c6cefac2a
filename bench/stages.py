"""Stages of a bench, one after the other, each within its own time, whatever becomes of the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stage_results import Booking, Fault, Results

LEAST_S = 5.0
"""A stage is not begun with less."""


class Clock:
    """What is left of a time limit, and of one around it."""

    def __init__(self, limit_s: float, within: Clock | None = None) -> None:
        self._limit_s = limit_s
        self._within = within
        self.restart()

    def restart(self) -> None:
        """Begin anew; the limit around it goes on."""
        self._end_s = time.monotonic() + self._limit_s

    @property
    def left_s(self) -> float:
        """Never negative."""
        own_s = max(0.0, self._end_s - time.monotonic())
        return own_s if self._within is None else min(own_s, self._within.left_s)


@dataclass(frozen=True)
class Stage:
    """One part of a bench.

    Attributes:
        name: as `--only` and `--skip` take it.
        limit_s: for `work`.
        work: books figures; raises Fault, or anything else, which is booked as a fault too. It must heed the clock, as
            nothing can stop it.
        needs: what must be there first and is not the stage's own time, e.g. a running fleet; and its limit.
    """

    name: str
    limit_s: float
    work: Callable[[Booking, Clock], None]
    needs: tuple[Callable[[Clock], None], float] | None = None


def choose(stages: Sequence[Stage], results: Results, *, only: Iterable[str], skip: Iterable[str]) -> list[Stage]:
    """Those to run: the ones in `only`, else all that `results` do not hold as done; less those in `skip`.

    Raises:
        ValueError: a name is none of a stage.
    """
    wanted, unwanted = set(only), set(skip)
    unknown = (wanted | unwanted) - {stage.name for stage in stages}
    if unknown:
        raise ValueError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(each.name for each in stages)}")
    return [
        stage
        for stage in stages
        if stage.name not in unwanted and (stage.name in wanted if wanted else not results.is_done(stage.name))
    ]


def run(stages: Sequence[Stage], results: Results, budget: Clock) -> None:
    """Run them in turn until the budget is used up; what is left then is booked as not run."""
    for stage in stages:
        with results.stage(stage.name) as booking:
            if budget.left_s < LEAST_S:
                raise Fault("not run: the budget is used up; go on with --resume")
            if stage.needs is not None:
                prepare, limit_s = stage.needs
                prepare(Clock(limit_s, budget))
            stage.work(booking, Clock(stage.limit_s, budget))
