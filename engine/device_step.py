"""A step whose tokens a device chooses: what is on its way back.

Letters: R rows of the step, A rows that ask for log-probabilities, V vocab_size, S likeliest tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np
import torch

from engine.choice import NO_CHOICE
from engine.device_copies import to_device, to_host
from engine.grammar.desk import StepMasks
from engine.grammar.matcher import MaskWords
from engine.logprobs import token_logprob
from engine.plan import Failed, Row, Sampled, StepOutput
from fleet.types import TokenLogprob

NOTHING_TO_CHOOSE = Failed("the model gave no finite score to choose from")


class AskedLogprobs:
    """Log-probabilities under the model's own logits for the rows that ask, computed on the device.

    Args:
        logits: [R, V] of the model's type, before any edit; only read, at once.
        rows: R of them.
    """

    def __init__(self, logits: torch.Tensor, rows: Many[Row]) -> None:
        asked = [(at, row.sequence.params.logprobs) for at, row in enumerate(rows)]
        self._num_top = {at: min(count, logits.shape[1]) for at, count in asked if count is not None}
        self._places = {at: place for place, at in enumerate(self._num_top)}
        if not self._num_top:
            return
        self._index = torch.empty(len(self._num_top), dtype=torch.int64, device=logits.device)
        to_device(np.array(list(self._num_top), dtype=np.int64), self._index)
        self._values = logits.index_select(0, self._index).log_softmax(dim=-1, dtype=torch.float32)  # [A, V]
        scores, ids = self._values.topk(max(self._num_top.values()), dim=-1)  # [A, S]
        self._top = to_host(scores), to_host(ids)

    def note(self, chosen: torch.Tensor) -> None:
        """Queue the chosen tokens' own; `chosen` is `[R]` int64."""
        if self._num_top:
            ids = chosen.index_select(0, self._index).clamp(min=0).unsqueeze(1)
            self._chosen = to_host(self._values.gather(1, ids).squeeze(1))

    def of(self, at: int) -> TokenLogprob | None:
        """Of row `at`'s token; None if it did not ask. Requires: all copies are there."""
        place = self._places.get(at)
        if place is None:
            return None
        scores, ids = self._top
        best = zip(ids[place].tolist(), scores[place].tolist(), strict=True)
        return token_logprob(float(self._chosen[place]), best, num_top=self._num_top[at])


class DeviceStep:
    """A step in a device's queue. Implements `engine.plan.Pending`.

    Its forward pass is queued; the choice of its tokens too, unless rows are constrained: their masks follow from the
    tokens of the step before, which the host must have booked by then.

    Args:
        logprobs: of the rows that ask.
        choose: queues the choice, given the constrained rows' masks, in the rows' order; returns the ids, [R] int64.
        begin_masks: starts on those masks; None where no row is constrained.
    """

    def __init__(
        self,
        logprobs: AskedLogprobs,
        choose: Callable[[MaskWords | None], torch.Tensor],
        begin_masks: Callable[[], StepMasks | None] | None,
    ) -> None:
        self._logprobs = logprobs
        self._choose = choose
        self._begin_masks = begin_masks
        self._masks: StepMasks | None = None
        self._ids: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None
        if begin_masks is None:
            self.choose()

    def choose(self) -> torch.Tensor:
        """Queue the choice if it is not yet, and the ids' way back; waits for masks, not for the device.

        Requires: nothing that the rows follow is unbooked, and no step is queued behind this one.
        """
        if self._ids is None:
            words = None
            if self._begin_masks is not None and (masks := self._begin_masks()) is not None:
                _, words = masks.wait()
                self._masks = masks
            chosen = self._choose(words)
            self._logprobs.note(chosen)
            self._ids = to_host(chosen)
            if chosen.is_cuda:
                self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                self._done.record()
        return self._ids

    def wait(self) -> StepOutput:
        """Sleep until the device has written tokens and pages."""
        ids = self.choose()
        if self._done is not None:
            self._done.synchronize()
        chosen: list[Sampled | Failed] = [
            NOTHING_TO_CHOOSE if token == NO_CHOICE else Sampled(token, self._logprobs.of(at))
            for at, token in enumerate(ids.tolist())
        ]
        return StepOutput(tuple(chosen if self._masks is None else self._masks.settle(chosen)))
