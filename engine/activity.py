"""Whether anybody computes: what can wait, waits until nobody does."""

from __future__ import annotations

from engine.cpu.shared_cores import SharedCores
from engine.plan import StepPlan


class Activity:
    """Of this worker, and of those that it shares cores with. `show` from one thread, `is_any` from all."""

    def __init__(self, cores: SharedCores | None) -> None:
        self._cores = cores
        self._computes = False

    def show(self, plan: StepPlan | None) -> None:
        """What this worker computes from now on; called as steps are planned."""
        self._computes = plan is not None
        if self._cores is not None:
            (self._cores.work if self._computes else self._cores.rest)()

    def is_any(self) -> bool:
        """Whether a step runs here, or at a worker of this machine that we know of."""
        return self._computes or (self._cores is not None and self._cores.others_work())

    def close(self) -> None:
        """Leave the sharing."""
        if self._cores is not None:
            self._cores.close()
