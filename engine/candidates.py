"""Which candidates stay under top-k, top-p and min-p, and drawing one of them.

Letters: R rows, V vocab_size.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Nucleus cuts look at this many of the likeliest first; only rows whose mass lies deeper are sorted whole.
_SHALLOW = 1024
# Vocabulary ids per partial sum of the cumulative distribution.
_STRIDE = 512


def keep_candidates(scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> None:
    """Set all but the kept candidates to minus infinity: top-k, then top-p over what is left, then min-p.

    Cuts are by score, so candidates that tie with the last one kept are kept too: which tokens stay never depends on
    the order of equal scores.

    Args:
        scores: [R, V] float32, natural-log probabilities up to a constant per row; mutated.
        top_k: [R] int64, 0 is off.
        top_p: [R] float32, the smallest set of likeliest candidates whose mass reaches it (arXiv 1904.09751); 1 is off.
        min_p: [R] float32, share of the likeliest candidate's probability (arXiv 2407.01082); 0 is off.
    """
    vocab_size = scores.shape[1]
    if bool((top_k > 0).any()):
        ranks = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size)
        limited = ranks < vocab_size
        if bool(limited.any()):
            deepest = int(ranks[limited].max())
            likeliest = scores.topk(deepest, dim=-1).values  # [R, deepest], falling
            last = likeliest.gather(1, ranks.clamp(max=deepest).unsqueeze(1) - 1)
            last = last.masked_fill(~limited.unsqueeze(1), -torch.inf)
            scores.masked_fill_(scores < last, -torch.inf)
    rows = torch.nonzero(top_p < 1).squeeze(1)
    if rows.numel():
        lowest = torch.full_like(top_p, -torch.inf)
        lowest[rows] = _nucleus_limits(scores[rows], top_p[rows])
        scores.masked_fill_(scores < lowest.unsqueeze(1), -torch.inf)
    if bool((min_p > 0).any()):
        limits = scores.amax(dim=-1) + min_p.log()
        scores.masked_fill_(scores < limits.unsqueeze(1), -torch.inf)


def draw(scores: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw a candidate per row by inverting the cumulative distribution in vocabulary order.

    In that order, unlike by rank, two scores that differ in the last bit between devices cannot trade places: a draw
    moves to another token only if it falls into the sliver by which a boundary moved. The distribution is summed in
    two levels, runs of ids first, in float64.

    Args:
        scores: [R, V] float32, log probabilities up to a constant, minus infinity where dropped; not all of a row.
        uniform: [R] float64 in (0, 1).

    Returns:
        [R] int64 token ids; never one that was dropped.
    """
    num_rows, vocab_size = scores.shape
    weights = (scores - scores.amax(dim=-1, keepdim=True)).exp_()
    weights = functional.pad(weights, (0, -vocab_size % _STRIDE)).view(num_rows, -1, _STRIDE)
    run_sums = weights.sum(dim=-1, dtype=torch.float64)  # [R, runs]
    run_ends = run_sums.cumsum(dim=-1)
    target = uniform.unsqueeze(1) * run_ends[:, -1:]
    run = torch.searchsorted(run_ends, target, right=True)  # [R, 1]: the first run that ends beyond the target
    rows = torch.arange(num_rows, device=scores.device)
    inside = weights[rows, run.squeeze(1)].to(torch.float64)  # [R, _STRIDE]
    rest = target - (run_ends - run_sums).gather(1, run)
    ends = inside.cumsum(dim=-1)
    # The two sums may round apart by a hair: stay within the run, before its very end.
    rest = torch.minimum(rest.clamp(min=0.0), ends[:, -1:] * (1 - 2.0**-50))
    within = torch.searchsorted(ends, rest, right=True)
    return (run * _STRIDE + within).squeeze(1)


def _nucleus_limits(scores: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Score of the last candidate in each row's nucleus, `[R]`."""
    vocab_size = scores.shape[1]
    totals = scores.logsumexp(dim=-1, keepdim=True)
    shallow = min(_SHALLOW, vocab_size)
    limits, reached = _limits_among(scores.topk(shallow, dim=-1).values, totals, top_p)
    deep = torch.nonzero(~reached).squeeze(1)
    if deep.numel() and shallow < vocab_size:
        ordered = scores[deep].sort(dim=-1, descending=True).values
        limits[deep] = _limits_among(ordered, totals[deep], top_p[deep])[0]
    return limits


def _limits_among(
    ordered: torch.Tensor, totals: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Limit per row among falling scores, and whether their mass reached `top_p`."""
    mass = (ordered - totals).exp().cumsum(dim=-1, dtype=torch.float64)
    before = functional.pad(mass[:, :-1], (1, 0))
    num_kept = (before < top_p.unsqueeze(1)).sum(dim=-1).clamp(min=1)
    limits = ordered.gather(1, num_kept.unsqueeze(1) - 1).squeeze(1)
    return limits, mass[:, -1] >= top_p
