"""Which candidates stay under top-k, top-p and min-p, and drawing one of them: the specification, in plain torch.

Scores are natural-log probabilities up to a constant per row, the best one 0. A cut is a limit: candidates that reach
it stay, ties with the last one included, so which tokens stay never depends on the order of equal scores. The limit of
top-k and top-p is a score; that of min-p a weight, which needs no logarithm that every device takes its own way.
A draw inverts the cumulative distribution in vocabulary order: unlike by rank, two scores that differ in the last bit
between devices cannot trade places, and a draw moves only if it falls into the sliver by which a boundary moved.

Probabilities are whole numbers (`whole_weights`): additions of those give one result in any order, so every
implementation that follows this one says the same token to the letter, whatever its vectors and threads.

Letters: R rows, V vocab_size.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

UNIT_BITS = 44
"""A weight of 1 is 2**44: below the float32 resolution of what is likely, and 2**18 candidates of it fit an int64."""

# exp(x) = 2**n * exp(r), n whole and |r| <= ln(2) / 2: Taylor's series, every product and sum rounded to float32.
# Constants are given as the float32 that they are, so that all implementations hold the same.
LOWEST = -32.0  # the weight of exp(-32) is 0
LOG2_E = 1.44269502162933349609375
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194441701285541057586669921875e-4  # n * LN2_HIGH is exact
ROUNDER = 1.5 * 2.0**23  # adding it leaves the nearest whole number in the low bits of a float32
SERIES = tuple(float(torch.tensor(1 / math.factorial(power))) for power in range(6, -1, -1))  # of r**6 down to 1
EXPONENT_OF_UNIT = (127 + UNIT_BITS) << 23


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
        scores: [R, V] float32, the best of each row 0; minus infinity where banned.
        cuts: of the R rows.
        uniforms: [R] float64 in (0, 1), multiples of 2**-49.

    Returns:
        [R] int64 token ids, of candidates with a weight above 0.
    """
    weights = whole_weights(scores)
    weights.masked_fill_(beyond(scores, weights, cuts), 0)
    ends = weights.cumsum(dim=-1)
    # The product stays below the sum: a uniform number is at least 2**-49 from 1, rounding moves less.
    target = (uniforms * ends[:, -1].to(torch.float64)).to(torch.int64)
    return torch.searchsorted(ends, target.unsqueeze(1), right=True).squeeze(1)


def whole_weights(scores: torch.Tensor) -> torch.Tensor:
    """`exp(scores) * 2**44` in whole numbers, `[R, V]` int64, from `[R, V]` float32 of at most 0.

    Exact to about 2 units in the last place of float32 and to 2**-44; below that it is 0.
    """
    clamped = scores.clamp(min=LOWEST)
    shifted = clamped * LOG2_E + ROUNDER
    whole = shifted - ROUNDER
    rest = (clamped - whole * LN2_HIGH) - whole * LN2_LOW
    series = torch.full_like(rest, SERIES[0])
    for coefficient in SERIES[1:]:
        series = series * rest + coefficient
    power = ((shifted.view(torch.int32) << 23) + EXPONENT_OF_UNIT).view(torch.float32)
    return (series * power).to(torch.int64)


def beyond(scores: torch.Tensor, weights: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Which candidates the cuts leave out, `[R, V]` bool.

    Args:
        scores: [R, V] float32, the best of each row 0.
        weights: of them.
        cuts: of the R rows.
    """
    least = (cuts.min_p.to(torch.float64) * 2.0**UNIT_BITS).ceil().to(torch.int64)  # the product is exact
    return (scores < _limits(scores, weights, cuts).unsqueeze(1)) | (weights < least.unsqueeze(1))


def _limits(scores: torch.Tensor, weights: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """The score from which top-k and top-p keep candidates, `[R]` float32."""
    num_rows, vocab_size = scores.shape
    limit = torch.full((num_rows,), -torch.inf, device=scores.device)
    index = torch.nonzero(((cuts.top_k > 0) & (cuts.top_k < vocab_size)) | (cuts.top_p < 1)).squeeze(1)
    if index.numel():
        top_k, top_p = cuts.top_k[index].unsqueeze(1), cuts.top_p[index].unsqueeze(1)
        ordered, ids = scores[index].sort(dim=-1, descending=True)
        by_rank = ordered.gather(1, torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size) - 1)
        ends = weights[index].gather(1, ids).masked_fill_(ordered < by_rank, 0).cumsum(dim=-1)
        # A candidate is in the nucleus if those before it have not reached the share; the first one always is.
        needed = (top_p.to(torch.float64) * ends[:, -1:].to(torch.float64)).ceil().to(torch.int64).clamp(min=1)
        by_mass = ordered.gather(1, torch.searchsorted(ends, needed).clamp(max=vocab_size - 1))
        limit[index] = torch.where(top_p < 1, torch.maximum(by_rank, by_mass), by_rank).squeeze(1)
    return limit
