"""Log-probabilities as they leave the engine: finite, the likeliest first, lower ids first among equals."""

from __future__ import annotations

from collections.abc import Iterable

from fleet.types import TokenLogprob, TopLogprob

LOGPROB_FLOOR = -9999.0  # JSON has no infinity; OpenAI's API uses the same value for "as good as impossible"


def token_logprob(
    logprob: float, likeliest: Iterable[tuple[int, float]], *, num_top: int, rank: int = 0
) -> TokenLogprob:
    """Of a token, and of the first `num_top` of the likeliest `(id, logprob)` in whatever order they come."""
    ordered = sorted(likeliest, key=lambda pair: (-pair[1], pair[0]))[:num_top]
    top = [TopLogprob(token_id=token_id, logprob=_floored(value)) for token_id, value in ordered]
    return TokenLogprob(logprob=_floored(logprob), top=top, rank=rank)


def _floored(logprob: float) -> float:
    return max(logprob, LOGPROB_FLOOR)
