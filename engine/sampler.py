"""Choosing tokens: a pure function of logits, parameters, ids so far and seed.

Order: logit bias, ban of stop ids before `min_tokens`, repetition, presence and frequency penalties, grammar masks,
temperature, top-k, top-p, min-p, draw. At temperature 0 the likeliest candidate after bias, ban, penalties and mask is
taken, the lowest id among equals. The noise of a draw is `engine.noise.uniforms(seed, index of the output token)`, so a
stream continues alike on any worker. A row's result does not depend on the other rows.

Letters: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from engine.candidates import Cuts, draw
from engine.grammar.desk import StepMasks
from engine.grammar.masks import forbid
from engine.logit_edits import edit_row, needs_edits
from engine.logprobs import token_logprob
from engine.noise import as_int64, uniforms
from engine.plan import Failed, Sampled
from engine.sequence import Sequence
from fleet.types import TokenLogprob


def sample(logits: torch.Tensor, sequences: Many[Sequence], masks: StepMasks | None = None) -> list[Sampled | Failed]:
    """Choose the next token of each sequence.

    Args:
        logits: [R, V] float32, the model's own; mutated.
        sequences: R of them, as they were when the step was planned; not mutated.
        masks: of the constrained rows; waited for once everything else is ready.

    Returns:
        One result per row. A row whose logits are not finite, that has no candidate left, or whose parameters are
        bad fails alone.
    """
    failed: dict[int, str] = {}
    logprobs = _RawLogprobs(logits, sequences)
    for row, sequence in enumerate(sequences):
        if needs_edits(sequence.params, sequence.num_output_tokens):
            try:
                edit_row(logits[row], sequence.params, sequence.token_ids, sequence.prompt_len)
            except ValueError as error:
                failed[row] = str(error)
    if masks is not None:
        forbid(logits, *masks.wait())
    best_scores, chosen = logits.max(dim=-1)  # NaN wins a maximum, so this finds it too
    for row in torch.nonzero(~torch.isfinite(best_scores)).squeeze(1).tolist():
        failed.setdefault(row, "the model gave no finite score to choose from")
    drawing = [row for row, sequence in enumerate(sequences) if sequence.params.temperature > 0 and row not in failed]
    if drawing:
        index = torch.tensor(drawing, device=logits.device)
        scores = logits if len(drawing) == len(sequences) else logits[index]
        scores.sub_(best_scores[index].unsqueeze(1))
        chosen[index] = _draw_rows(scores, [sequences[row] for row in drawing])
    ids = chosen.tolist()
    return [
        Failed(failed[row]) if row in failed else Sampled(ids[row], logprobs.of(row, ids[row]))
        for row in range(len(sequences))
    ]


def _draw_rows(scores: torch.Tensor, sequences: Many[Sequence]) -> torch.Tensor:
    """Temperature, cuts and draw for rows whose best score is 0. Mutates `scores` `[R, V]`; returns `[R]` int64."""
    params = [sequence.params for sequence in sequences]
    device = scores.device
    temperatures = torch.tensor([one.temperature for one in params], dtype=torch.float32, device=device)
    # The best score is 0, so no temperature however small can overflow it.
    scores.div_(temperatures.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1))
    cuts = Cuts(
        torch.tensor([one.top_k for one in params], device=device),
        torch.tensor([one.top_p for one in params], dtype=torch.float32, device=device),
        torch.tensor([one.min_p for one in params], dtype=torch.float32, device=device),
    )
    seeds = torch.tensor([as_int64(one.seed) for one in params], dtype=torch.int64, device=device)
    indexes = torch.tensor([sequence.num_output_tokens for sequence in sequences], device=device)
    return draw(scores, cuts, uniforms(seeds, indexes))


class _RawLogprobs:
    """Log probabilities under the model's unmodified logits, for the rows that ask; taken before any edit."""

    def __init__(self, logits: torch.Tensor, sequences: Many[Sequence]) -> None:
        wanted = {
            row: sequence.params.logprobs
            for row, sequence in enumerate(sequences)
            if sequence.params.logprobs is not None
        }
        self._place = {row: place for place, row in enumerate(wanted)}
        if not wanted:
            return
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
