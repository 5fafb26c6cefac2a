"""Which candidates stay under top-k, top-p and min-p, and drawing one of them.

Scores are natural-log probabilities up to a constant per row. A cut is a limit: candidates that score at least as high
stay, ties with the last one included, so which tokens stay never depends on the order of equal scores. A draw inverts
the cumulative distribution in vocabulary order: unlike by rank, two scores that differ in the last bit between devices
cannot trade places, and a draw moves only if it falls into the sliver by which a boundary moved.

Letters: R rows, V vocab_size, S likeliest candidates looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# A cut row is decided among its likeliest few if the cut lies there, as it does unless the row is nearly flat. How
# many are looked at depends on the row's own top-k alone, so that company cannot change a row's arithmetic.
_FEW = 128
_MANY = 1024
# Vocabulary ids per partial sum of the cumulative distribution over a whole row.
_STRIDE = 512


class Cuts(NamedTuple):
    """Parameters of R rows.

    Attributes:
        top_k: [R] int64, keep this many of the likeliest; 0 is off.
        top_p: [R] float32, of what top-k left, the smallest set of likeliest whose mass reaches this share
            (arXiv 1904.09751); 1 is off.
        min_p: [R] float32, share of the likeliest candidate's probability (arXiv 2407.01082); 0 is off.
    """

    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def rows(self, index: torch.Tensor) -> Cuts:
        """The parameters of some rows."""
        return Cuts(self.top_k[index], self.top_p[index], self.min_p[index])


def draw(scores: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one kept candidate per row.

    Args:
        scores: [R, V] float32, the best of each row 0; minus infinity where banned. Mutated.
        cuts: of the R rows.
        uniforms: [R] float64 in (0, 1).

    Returns:
        [R] int64 token ids.
    """
    chosen = torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)
    narrow = (cuts.top_k > 0) & (cuts.top_k <= _FEW // 2)
    uncut = (cuts.top_k <= 0) & (cuts.top_p >= 1) & (cuts.min_p <= 0)
    for index, num_likeliest in (
        (torch.nonzero(narrow).squeeze(1), _FEW),
        (torch.nonzero(~narrow & ~uncut).squeeze(1), _MANY),
    ):
        if index.numel():
            chosen[index] = _draw_cut(_rows(scores, index), cuts.rows(index), uniforms[index], num_likeliest)
    index = torch.nonzero(uncut).squeeze(1)
    if index.numel():
        chosen[index] = draw_whole(_rows(scores, index), uniforms[index])
    return chosen


def draw_whole(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw among all candidates, `[R]` int64. The distribution is summed in two levels, runs of ids first.

    Args:
        scores: [R, V] float32, the best of each row 0; mutated.
        uniforms: [R] float64 in (0, 1).
    """
    weights = scores.exp_()
    vocab_size = weights.shape[1]
    whole = vocab_size - vocab_size % _STRIDE
    runs = weights[:, :whole].view(weights.shape[0], -1, _STRIDE)  # a view also of rows that are longer
    run_sums = torch.cat((runs.sum(dim=-1), weights[:, whole:].sum(dim=-1, keepdim=True)), dim=1).to(torch.float64)
    run_ends = run_sums.cumsum(dim=-1)
    target = uniforms.unsqueeze(1) * run_ends[:, -1:]
    run = torch.searchsorted(run_ends, target, right=True)  # [R, 1]: the first run that ends beyond the target
    ids = run * _STRIDE + torch.arange(_STRIDE, device=scores.device)  # [R, _STRIDE]
    inside = weights.gather(1, ids.clamp(max=vocab_size - 1)).masked_fill_(ids >= vocab_size, 0.0)
    within = _invert(inside, target - (run_ends - run_sums).gather(1, run))
    return ids.gather(1, within).squeeze(1)


def limits(
    ordered: torch.Tensor, totals: torch.Tensor, cuts: Cuts, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The score from which candidates are kept, and whether S candidates were enough to know it.

    Args:
        ordered: [R, S] float32, each row's likeliest, falling.
        totals: [R] float32, log of the row's whole mass; read where top-k is off.
        cuts: of the R rows.
        vocab_size: V; with S = V the answer is always known.

    Returns:
        [R] float32 and [R] bool. Where known, every kept candidate is among the S.
    """
    num_rows, num_likeliest = ordered.shape
    complete = num_likeliest == vocab_size
    last = ordered[:, -1]
    none = torch.full((num_rows,), -torch.inf, device=ordered.device)

    ranks = cuts.top_k.clamp(min=1, max=num_likeliest).unsqueeze(1) - 1
    by_rank = torch.where(cuts.top_k > 0, ordered.gather(1, ranks).squeeze(1), none)
    known = (cuts.top_k <= 0) | (by_rank > last)

    survivors = ordered.masked_fill(ordered < by_rank.unsqueeze(1), -torch.inf)
    totals = torch.where(cuts.top_k > 0, survivors.logsumexp(dim=-1), totals)
    mass = (survivors - totals.unsqueeze(1)).exp_().cumsum(dim=-1, dtype=torch.float64)
    # A candidate is in the nucleus if those before it have not reached the share; the first one always is.
    num_kept = 1 + (mass[:, :-1] < cuts.top_p.unsqueeze(1)).sum(dim=-1, keepdim=True)
    by_mass = torch.where(cuts.top_p < 1, survivors.gather(1, num_kept - 1).squeeze(1), none)

    by_share = ordered[:, 0] + cuts.min_p.log()  # log(0) is minus infinity: off
    limit = torch.maximum(torch.maximum(by_rank, by_mass), by_share)
    return limit, (known & (limit > last)) | complete


def _draw_cut(scores: torch.Tensor, cuts: Cuts, uniforms: torch.Tensor, num_likeliest: int) -> torch.Tensor:
    """Draw among the likeliest few where they hold all that is kept, else over whole rows. Mutates `scores`."""
    vocab_size = scores.shape[1]
    ordered, ids = scores.topk(min(num_likeliest, vocab_size), dim=-1)
    needs_totals = bool(((cuts.top_k <= 0) & (cuts.top_p < 1)).any())
    totals = scores.logsumexp(dim=-1) if needs_totals else ordered[:, 0]
    limit, known = limits(ordered, totals, cuts, vocab_size)
    by_id = ids.argsort(dim=-1)
    weights = ordered.masked_fill(ordered < limit.unsqueeze(1), -torch.inf).gather(1, by_id).exp_()
    target = uniforms.unsqueeze(1) * weights.sum(dim=-1, keepdim=True, dtype=torch.float64)
    chosen = ids.gather(1, by_id.gather(1, _invert(weights, target))).squeeze(1)
    deep = torch.nonzero(~known).squeeze(1)
    if deep.numel():
        scores = _rows(scores, deep)
        ordered = scores.sort(dim=-1, descending=True).values
        limit, _ = limits(ordered, totals[deep], cuts.rows(deep), vocab_size)
        scores.masked_fill_(scores < limit.unsqueeze(1), -torch.inf)
        chosen[deep] = draw_whole(scores, uniforms[deep])
    return chosen


def _invert(weights: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index of the first column whose running sum exceeds `target`, never one of weight 0. `[R, S]`, `[R, 1]`."""
    ends = weights.cumsum(dim=-1, dtype=torch.float64)
    # Sums taken in another order may round apart by a hair: stay before the very end.
    inside = torch.minimum(target.clamp(min=0.0), ends[:, -1:] * (1 - 2.0**-50))
    return torch.searchsorted(ends, inside, right=True)


def _rows(scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Some rows; all of them without a copy. `index` rises."""
    return scores if index.numel() == scores.shape[0] else scores[index]
