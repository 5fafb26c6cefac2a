"""What a committed step did to its sequences: everything that a service has to publish."""

from __future__ import annotations

from dataclasses import dataclass

from engine.plan import Complete, Failed, Pooled, Result, Row, Sampled, ScoredPrompt
from engine.prefix_cache import PrefixCache
from engine.sequence import Sequence
from engine.stopping import finish_reason
from fleet.types import FinishReason


@dataclass(frozen=True, slots=True)
class RowProgress:
    """One row after `commit`. Rows of sequences that were aborted meanwhile are left out.

    Attributes:
        sequence: after the step.
        new_pages: indexes into the sequence's page table of pages that this step filled. The first row of a
            sequence begins with its cached pages, so `new_pages.stop` always says how many leading pages are
            final. Of no use once `finish` is set, since the page table is empty then.
        sampled: the token appended, with its log-probability if asked for; None after an early chunk, and where
            the output was complete already.
        index: output index of that token; where there is none, of the next one.
        finish: why the sequence ended with this row; its pages are released already.
        error: a sentence for the client, exactly when `finish` is `error`.
        pooled: what the row adds to the sequence's vector, if it is to become one.
        scored: log-probabilities of prompt tokens that the row predicted, if the sequence asked for them.
    """

    sequence: Sequence
    new_pages: range
    sampled: Sampled | None
    index: int
    finish: FinishReason | None = None
    error: str | None = None
    pooled: Pooled | None = None
    scored: ScoredPrompt | None = None


@dataclass(frozen=True, slots=True)
class StepProgress:
    """The rows of one step, in the plan's order."""

    rows: tuple[RowProgress, ...]


def settle(
    row: Row,
    result: Result | None,
    scored: ScoredPrompt | None = None,
    *,
    cache: PrefixCache,
    page_size: int,
    max_model_len: int,
) -> RowProgress:
    """Book one row: what is computed, which pages it filled and named, the token, and whether that was the last.

    Mutates: the sequence's counts, ids and chain; names pages in `cache`. Phases and releases are the scheduler's.
    A row that should have given a token or the end of a vector and did not is a failed one.
    """
    sequence = row.sequence
    index = sequence.num_output_tokens
    first_page = 0 if row.start == sequence.num_cached_tokens else row.start // page_size
    is_whole = row.start + row.count == len(sequence.token_ids)
    if row.sample and not isinstance(result, Sampled | Complete | Failed):
        result = Failed(message="the model step returned no token for this request")
    if is_whole and sequence.passport.pooling is not None and result is None:
        result = Failed(message="the model step returned no vector for this request")
    nothing = range(first_page, first_page)
    if isinstance(result, Failed):
        return RowProgress(sequence, nothing, None, index, FinishReason.ERROR, result.message)
    if isinstance(result, Complete):
        return RowProgress(sequence, nothing, None, index, FinishReason.STOP, scored=scored)

    sequence.num_computed_tokens = row.start + row.count
    new_pages = range(first_page, sequence.num_computed_tokens // page_size)
    if new_pages and sequence.chain is not None:
        sequence.chain.extend(sequence.token_ids, sequence.num_computed_tokens)
        cache.insert(
            sequence.chain.hashes[new_pages.start : new_pages.stop],
            sequence.page_table[new_pages.start : new_pages.stop],
        )
    if not row.sample or not isinstance(result, Sampled):
        finish = FinishReason.LENGTH if sequence.is_prompt_only and is_whole else None
        pooled = result if isinstance(result, Pooled) else None
        return RowProgress(sequence, new_pages, None, index, finish, pooled=pooled, scored=scored)

    finish = FinishReason.STOP if result.ends else finish_reason(sequence, result.token_id, max_model_len)
    sequence.token_ids.append(result.token_id)
    return RowProgress(sequence, new_pages, result, index, finish, scored=scored)
