"""The bounds within which the schedulers work. Resolved once by the services; never mutated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    """Bounds of a prefill scheduler.

    Attributes:
        max_model_len: longest prompt plus output in tokens.
        max_step_tokens: tokens that go through the model in one step, over all prompts.
        max_chunk_tokens: tokens of one prompt in one step while others want the rest of the step; None: no
            such bound. A small value lets short prompts pass beside a long one, at the long one's expense.
        max_num_seqs: prompts that are partly computed at once; finished ones held for a hand-off do not count.

    Raises:
        ValueError: a bound is not positive.
    """

    max_model_len: int
    max_step_tokens: int = 2048
    max_chunk_tokens: int | None = None
    max_num_seqs: int = 64

    def __post_init__(self) -> None:
        _require_positive(
            max_model_len=self.max_model_len,
            max_step_tokens=self.max_step_tokens,
            max_chunk_tokens=1 if self.max_chunk_tokens is None else self.max_chunk_tokens,
            max_num_seqs=self.max_num_seqs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    """Bounds of a decode scheduler.

    Attributes:
        max_model_len: longest prompt plus output in tokens; at most the pool's tokens.
        max_num_seqs: sequences that run, are paused or have pages reserved at once.
        max_step_tokens: tokens in one step; each running sequence gets one whatever this says, and sequences
            with more than one uncomputed token share what is left.
        watermark_pages: pages that stay free after an admission, unless nothing else is here.
        lookahead_tokens: output tokens per sequence for whose pages room must be left at an admission. Larger
            values admit later and preempt less.

    Raises:
        ValueError: a bound is not positive, or one of the last two is negative.
    """

    max_model_len: int
    max_num_seqs: int = 128
    max_step_tokens: int = 2048
    watermark_pages: int = 0
    lookahead_tokens: int = 128

    def __post_init__(self) -> None:
        _require_positive(
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self.max_step_tokens,
            watermark_pages=self.watermark_pages + 1,
            lookahead_tokens=self.lookahead_tokens + 1,
        )


def _require_positive(**bounds: int) -> None:
    for name, value in bounds.items():
        if value < 1:
            raise ValueError(f"{name} is too small")
