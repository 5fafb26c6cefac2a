"""Which prompt tokens a prefill worker computes next: chunked prefill with a prefix cache.

Order of service is first come, first served by `(priority, arrival)`, chunk by chunk: each step fills its token
budget from the prompt that is first in order, then the next, until tokens, pages or seats run out. So nobody starves:

- A short prompt waits at most for the prompts before it; a long prompt cannot be overtaken by later ones for good.
- `max_chunk_tokens` bounds what one prompt takes of a step while others want the rest (chunked prefill as in
  Sarathi-Serve, arXiv 2403.02310); what they leave, the first in order gets back, so no step runs short.
- A more urgent prompt takes the budget from the next chunk on; the one interrupted keeps its pages.
- Pages for the whole prompt are taken when its first chunk is scheduled, hence a prompt under way never lacks any.
  Where they lack, the first waiting prompt waits and none behind it passes, or large ones would never find room.
- A prompt whose next page is just being computed for another one waits for that page and is passed meanwhile, so the
  samples of one request compute their prompt once.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from engine.errors import AlreadyFinished, OutOfPages, SequenceTooLong
from engine.limits import PrefillLimits
from engine.pages import PagePool, pages_for
from engine.plan import Row, StepOutput, StepPlan
from engine.prefix_cache import PrefixCache
from engine.progress import StepProgress, settle
from engine.scheduler import InFlight, SequenceIndex
from engine.sequence import Phase, Sequence
from engine.stopping import finished_on_arrival

MAX_PASSED = 64
"""Waiting prompts that a step passes over at most; those behind them wait too."""


def _order(sequence: Sequence) -> tuple[int, int]:
    return (sequence.passport.priority, sequence.arrival)


class PrefillScheduler:
    """Sequences wait, are computed chunk by chunk, and keep their pages as PREFILLED until `release`.

    A sequence that was replayed with output in its passport is just a longer prompt. One that never samples
    (`max_tokens` 0) is DONE as soon as it is computed.

    Args:
        pool: where pages come from.
        cache: names of `pool`.
        limits: see there; `max_model_len` may exceed the pool, whose size `add` checks too.
    """

    def __init__(self, pool: PagePool, cache: PrefixCache, limits: PrefillLimits) -> None:
        self._pool = pool
        self._cache = cache
        self._limits = limits
        self._waiting: list[Sequence] = []  # in order of service
        self._running: list[Sequence] = []  # likewise
        self._sequences = SequenceIndex()  # all that are not DONE
        self._num_prefilled = 0
        self._in_flight = InFlight()

    @property
    def num_waiting(self) -> int:
        """Sequences without pages."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that are partly computed."""
        return len(self._running)

    @property
    def num_prefilled(self) -> int:
        """Sequences that are computed and hold their pages until `release`."""
        return self._num_prefilled

    @property
    def waiting_tokens(self) -> int:
        """Tokens still to be computed, of waiting and running sequences. O(sequences).

        What the prefix cache holds of a waiting one is not deducted: it may be gone when its turn comes.
        """
        return sum(s.num_uncomputed_tokens for s in self._waiting) + sum(s.num_uncomputed_tokens for s in self._running)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is here: waiting, running or prefilled."""
        return iter(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Take a waiting sequence. Mutates: its `chain`, which from now on names all full pages of its ids.

        Raises:
            SequenceTooLong: it leaves no room for a token within `max_model_len`, or exceeds the whole pool.
            AlreadyFinished: the output it came with is complete.
            DuplicateSequence: it is here already.
        """
        num_tokens = len(sequence.token_ids)
        finished = finished_on_arrival(sequence, self._limits.max_model_len)
        if finished is not None:
            raise AlreadyFinished(finished)
        if num_tokens >= self._limits.max_model_len + sequence.is_prompt_only:
            raise SequenceTooLong(
                f"a prompt of {num_tokens} tokens leaves no room for output within {self._limits.max_model_len} tokens"
            )
        if pages_for(num_tokens, self._pool.page_size) > self._pool.num_pages:
            raise SequenceTooLong(
                f"a prompt of {num_tokens} tokens exceeds this worker's "
                f"{self._pool.num_pages} pages of {self._pool.page_size} tokens"
            )
        self._sequences.require_new(sequence.request_id, sequence.epoch)
        self._sequences.add(sequence)
        sequence.phase = Phase.WAITING
        sequence.chain = self._cache.chain(sequence.passport.cache_salt)
        sequence.chain.extend(sequence.token_ids, num_tokens)
        insort(self._waiting, sequence, key=_order)

    def schedule(self) -> StepPlan | None:
        """The next step (see the module for the order), or None where nothing can be computed now.

        A sequence's first row is the one that starts at its `num_cached_tokens`.

        Mutates: sequences that begin get their pages, the cached ones among them shared.

        Raises:
            StepOutOfOrder: a plan is in flight.
        """
        self._in_flight.require_none()
        budget = self._limits.max_step_tokens
        max_chunk = self._limits.max_chunk_tokens or budget
        chosen: list[Sequence] = []
        counts: list[int] = []
        for sequence in self._candidates():
            count = min(sequence.num_uncomputed_tokens, max_chunk, budget)
            chosen.append(sequence)
            counts.append(count)
            budget -= count
            if budget == 0:
                break
        for position, sequence in enumerate(chosen):
            extra = min(sequence.num_uncomputed_tokens - counts[position], budget)
            counts[position] += extra
            budget -= extra
        if not chosen:
            return None
        rows = (
            Row(
                sequence,
                sequence.num_computed_tokens,
                count,
                sample=count == sequence.num_uncomputed_tokens and not sequence.is_prompt_only,
            )
            for sequence, count in zip(chosen, counts, strict=True)
        )
        return self._in_flight.start(StepPlan(tuple(rows)))

    def schedule_ahead(self) -> StepPlan | None:
        """None: what a prompt's last chunk gives is for its hand-off, not for a next step."""
        return None

    def commit(self, plan: StepPlan, out: StepOutput) -> StepProgress:
        """Book the results of the plan in flight.

        A sequence that sampled is PREFILLED and holds its pages until `release`, unless that token ended it (by a
        stop id, or by its length) or it samples none: then it is DONE, its pages are released and the row says why.

        Raises:
            StepOutOfOrder: `plan` is not the one in flight.
            BrokenInvariant: `out` is not as long as the plan; nothing was booked.
        """
        self._in_flight.finish(plan, out)
        rows = []
        for at, (row, result) in enumerate(zip(plan.rows, out.sampled, strict=True)):
            sequence = row.sequence
            if sequence.phase is Phase.DONE:  # aborted during the step
                self._free_pages(sequence)
                continue
            progress = settle(
                row,
                result,
                out.scored.get(at),
                cache=self._cache,
                page_size=self._pool.page_size,
                max_model_len=self._limits.max_model_len,
            )
            rows.append(progress)
            if progress.finish is not None:
                self.release(sequence)
            elif progress.sampled is not None:
                self._running.remove(sequence)
                sequence.phase = Phase.PREFILLED
                self._num_prefilled += 1
        return StepProgress(tuple(rows))

    def abort(self, request_id: str, epoch: int) -> list[Sequence]:
        """Forget this request at epochs up to and including `epoch`; see `Scheduler.abort`."""
        ended = self._sequences.up_to(request_id, epoch)
        for sequence in ended:
            self.release(sequence)
        return ended

    def release(self, sequence: Sequence) -> None:
        """Let go of a sequence: after its hand-off, or because it is given up. Idempotent.

        Its full pages stay as prefix cache. If the plan in flight computes it, `commit` releases its pages and
        reports nothing of it.
        """
        if sequence.phase is Phase.DONE:
            return
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
        elif sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
        else:
            self._num_prefilled -= 1
        sequence.phase = Phase.DONE
        self._sequences.remove(sequence)
        if not self._in_flight.holds(sequence):
            self._free_pages(sequence)

    def _candidates(self) -> Iterator[Sequence]:
        """Running sequences and, as far as there is room, waiting ones, in order of service; begins them lazily."""
        running = list(self._running)
        position = 0
        num_passed = 0
        may_begin = True
        while True:
            head = self._waiting[num_passed] if may_begin and num_passed < len(self._waiting) else None
            if position < len(running) and (head is None or _order(running[position]) < _order(head)):
                yield running[position]
                position += 1
            elif head is None:
                return
            elif self._is_being_computed(head):
                num_passed += 1
                may_begin = num_passed < MAX_PASSED
            elif self._begin(head):
                yield head
            else:
                may_begin = False

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether the next page that an earlier sequence fills is one that this sequence could take from the cache.

        A page's name stands for all tokens before it too, so the two begin alike. O(running sequences).
        """
        if not self._cache.enabled:
            return False
        num_reusable, names = self._num_reusable(sequence), sequence.page_hashes
        for other in self._running:
            if _order(other) > _order(sequence):
                return False
            place = other.num_computed_tokens // self._pool.page_size
            if place < min(num_reusable, len(other.page_hashes)) and other.page_hashes[place] == names[place]:
                return names[place] not in self._cache
        return False

    def _num_reusable(self, sequence: Sequence) -> int:
        """Leading pages that a sequence could take from the cache.

        The last token is always computed, since its logits are what we are after.
        """
        return 0 if sequence.needs_every_token else (len(sequence.token_ids) - 1) // self._pool.page_size

    def _begin(self, sequence: Sequence) -> bool:
        """Move a waiting sequence to the running ones with all its pages, or return False."""
        if len(self._running) >= self._limits.max_num_seqs:
            return False
        page_size = self._pool.page_size
        num_tokens = len(sequence.token_ids)
        cached = self._cache.match(sequence.page_hashes[: self._num_reusable(sequence)])
        try:
            fresh = self._pool.allocate(pages_for(num_tokens, page_size) - len(cached))
        except OutOfPages:
            self._pool.release(cached)
            return False
        sequence.page_table = cached + fresh
        sequence.num_cached_tokens = sequence.num_computed_tokens = len(cached) * page_size
        sequence.phase = Phase.RUNNING
        self._cache.record(query_tokens=num_tokens, hit_tokens=sequence.num_cached_tokens)
        self._waiting.remove(sequence)
        insort(self._running, sequence, key=_order)
        return True

    def _free_pages(self, sequence: Sequence) -> None:
        self._pool.release(sequence.page_table)
        sequence.page_table = []
