"""The step after a step, made before that one's tokens are known.

A decode step adds one token to each of its sequences: how many there will be is known, which ones is not. That is
enough for positions, slots, pages and ends by length; only the ids come from the step itself, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

from engine.plan import Row, StepPlan
from engine.sequence import Sequence
from engine.stopping import ends_with_next


def rows_after(plan: StepPlan, running: Many[Sequence], max_model_len: int) -> list[Row] | None:
    """One token for each of `running` that does not surely end with `plan`; nothing is mutated.

    Args:
        plan: in flight; each of its rows chooses a token.
        running: in batch order, as they are before `plan` is booked.
        max_model_len: longest prompt plus output in tokens.

    Returns:
        The rows in order; None where a sequence has a prompt or its rest to compute first.
    """
    places = {row.sequence: at for at, row in enumerate(plan.rows)}
    rows: list[Row] = []
    for sequence in running:
        at = places.get(sequence)
        if at is not None:
            if not ends_with_next(sequence, max_model_len):
                before = plan.rows[at]
                rows.append(Row(sequence, before.start + before.count, 1, sample=True, follows=at))
        elif sequence.num_uncomputed_tokens == 1:
            rows.append(Row(sequence, sequence.num_computed_tokens, 1, sample=True))
        else:
            return None
    return rows
