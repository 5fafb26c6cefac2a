"""Choosing tokens: a pure function of logits, parameters, ids so far and seed.

Order: logit bias, ban of stop ids before `min_tokens`, repetition, presence and frequency penalties, grammar masks,
temperature, top-k, top-p, min-p, draw. At temperature 0 the likeliest candidate after bias, ban, penalties and mask is
taken, the lowest id among equals. The noise of a draw is `engine.noise.uniforms(seed, index of the output token)`, so a
stream continues alike on any worker. A row's result does not depend on the other rows. From the masks on it is the
work of a `Choose` (`engine.choice`).

Letters: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

import torch

from engine.choice import NO_CHOICE, ChoiceRows, Choose, choose_in_torch
from engine.grammar.desk import StepMasks
from engine.grammar.masks import forbid
from engine.logit_edits import edit_row, needs_edits
from engine.logprobs import token_logprob
from engine.plan import Failed, Sampled
from engine.sequence import Sequence
from fleet.types import TokenLogprob


def sample(
    logits: torch.Tensor,
    sequences: Many[Sequence],
    masks: StepMasks | None = None,
    choose: Choose = choose_in_torch,
) -> list[Sampled | Failed]:
    """Choose the next token of each sequence.

    Args:
        logits: [R, V] float32, the model's own; mutated.
        sequences: R of them, as they were when the step was planned; not mutated.
        masks: of the constrained rows; waited for once everything else is ready.
        choose: how; all ways give the same tokens.

    Returns:
        One result per row. A row whose logits are not finite, that has no candidate left, or whose parameters are
        bad fails alone.
    """
    failed: dict[int, str] = {}
    wanted = {row: one.params.logprobs for row, one in enumerate(sequences) if one.params.logprobs is not None}
    logprobs = _RawLogprobs(logits, wanted) if wanted else None
    for row, sequence in enumerate(sequences):
        if needs_edits(sequence.params, sequence.num_output_tokens):
            try:
                edit_row(logits[row], sequence.params, sequence.token_ids, sequence.prompt_len)
            except ValueError as error:
                failed[row] = str(error)
    if masks is not None:
        forbid(logits, *masks.wait())
    ids = choose(logits, ChoiceRows.of(sequences))
    for row, token_id in enumerate(ids):
        if token_id == NO_CHOICE:
            failed.setdefault(row, "the model gave no finite score to choose from")
    if logprobs is None and not failed:
        return [Sampled(token_id) for token_id in ids]
    return [
        Failed(failed[row]) if row in failed else Sampled(token_id, logprobs.of(row, token_id) if logprobs else None)
        for row, token_id in enumerate(ids)
    ]


class _RawLogprobs:
    """Log probabilities under the model's unmodified logits, for the rows that ask; taken before any edit."""

    def __init__(self, logits: torch.Tensor, wanted: Mapping[int, int]) -> None:
        self._place = {row: place for place, row in enumerate(wanted)}
        rows = torch.tensor(list(wanted), device=logits.device)
        self._values = logits[rows].log_softmax(dim=-1)  # [asking rows, V]
        deepest = min(max(wanted.values()), logits.shape[1])
        self._counts = [min(count, deepest) for count in wanted.values()]
        scores, ids = self._values.topk(deepest, dim=-1)
        self._top_scores: list[list[float]] = scores.tolist()
        self._top_ids: list[list[int]] = ids.tolist()

    def of(self, row: int, token_id: int) -> TokenLogprob | None:
        """For the chosen token and the likeliest ones, best first, lower ids first among equals; None if not asked."""
        place = self._place.get(row)
        if place is None:
            return None
        best = zip(self._top_ids[place], self._top_scores[place], strict=True)
        return token_logprob(float(self._values[place, token_id]), best, num_top=self._counts[place])
