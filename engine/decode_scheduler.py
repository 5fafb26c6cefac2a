"""Which sequences a decode worker advances next: continuous batching under page pressure.

Every running sequence gets one token per step; sequences join and leave between any two steps (Orca, OSDI 2022).
A sequence comes in three strides: `reserve` sets pages aside for it, a giver writes them, `adopt` starts it. Pages
for output are taken one at a time, at each page boundary.

When they run out, the sequence that is last in order is given back for a replay elsewhere, as often as needed for
those before it to go on. The order is `(priority, -epoch, arrival)`: a sequence that was replayed before counts as
older than one that was not, so that nobody is sent around for ever. The first in order is never given back while
another runs. A lone one that lacks a page waits while open reservations or paused sequences are about to free some,
and is given back where nothing of ours holds any; hence the first in order always goes on, here or elsewhere.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq

from engine.errors import AlreadyFinished, OutOfPages, SequenceTooLong
from engine.limits import DecodeLimits
from engine.lookahead import rows_after
from engine.pages import PagePool, pages_for
from engine.plan import Row, StepOutput, StepPlan
from engine.prefix_cache import PrefixCache
from engine.progress import StepProgress, settle
from engine.reservations import Reservation, Reservations, growth_pages
from engine.scheduler import InFlight, SequenceIndex
from engine.sequence import Phase, Sequence
from engine.stopping import finished_on_arrival
from fleet.types import Passport


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return (sequence.passport.priority, -sequence.epoch, sequence.arrival)


class DecodeScheduler:
    """Running sequences, reservations for coming ones, and paused ones on their way out.

    Args:
        pool: where pages come from.
        cache: names of `pool`.
        limits: see there.
        feeds_next: see `engine.plan.Runner`; by default no step is planned ahead.

    Raises:
        ValueError: `limits.max_model_len` exceeds the pool; a sequence could outgrow it alone.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache,
        limits: DecodeLimits,
        *,
        feeds_next: Callable[[StepPlan], bool] = lambda _: False,
    ) -> None:
        if limits.max_model_len > pool.num_pages * pool.page_size:
            num_tokens = pool.num_pages * pool.page_size
            raise ValueError(f"max_model_len is {limits.max_model_len}, the pool holds {num_tokens} tokens")
        self._pool = pool
        self._cache = cache
        self._limits = limits
        self._feeds_next = feeds_next
        self._running: list[Sequence] = []  # in order
        self._paused: list[Sequence] = []
        self._sequences = SequenceIndex()  # running and paused
        self._returned: list[Sequence] = []
        self._reservations = Reservations(pool, cache)
        self._num_arrived = 0
        self._in_flight = InFlight()

    @property
    def num_running(self) -> int:
        """Sequences that get a token per step."""
        return len(self._running)

    @property
    def num_reserved(self) -> int:
        """Reservations that are neither adopted nor cancelled."""
        return len(self._reservations)

    @property
    def num_paused(self) -> int:
        """Sequences that hold pages but are out of the batch."""
        return len(self._paused)

    def num_wanted_pages(self, sequences: Iterable[Sequence]) -> int:
        """Pages that these sequences may want beyond theirs within the limits' lookahead."""
        growing = ((s.passport, len(s.token_ids), len(s.page_table)) for s in sequences)
        return sum(growth_pages(*one, page_size=self._pool.page_size, limits=self._limits) for one in growing)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that is here: running or paused."""
        return iter(self._sequences)

    # coming

    def reserve(self, passport: Passport, page_hashes: Seq[bytes], num_pages: int | None = None) -> Reservation | None:
        """Set pages aside for a sequence that a giver offers, or None where there is no room now.

        Refuses when all seats are taken, or when fewer pages would stay free than the watermark and than what all
        sequences here, this one included, may want for their next `lookahead_tokens` output tokens. Where nothing
        else is here, only the pages themselves must be free.

        Args:
            passport: as offered.
            page_hashes: names of its leading full pages, from the giver.
            num_pages: pages at Commit time; by default what the passport's ids fill.

        Mutates: the pool; the pages end with `adopt`, `cancel_reservation` or `writer_gone`.

        Raises:
            SequenceTooLong: it could never run here.
        """
        num_tokens = len(passport.token_ids)
        page_size = self._pool.page_size
        if num_tokens >= self._limits.max_model_len and passport.next_index == 0:
            raise SequenceTooLong(
                f"a prompt of {num_tokens} tokens leaves no room for output within {self._limits.max_model_len} tokens"
            )
        if num_pages is None:
            num_pages = pages_for(num_tokens, page_size)
        if num_pages > self._pool.num_pages:
            raise SequenceTooLong(f"{num_pages} pages offered, this worker has {self._pool.num_pages}")
        num_seats_taken = self.num_running + self.num_paused + self.num_reserved
        if num_seats_taken >= self._limits.max_num_seqs:
            return None
        num_spare = 0
        if num_seats_taken:
            growing = [(r.passport, len(r.passport.token_ids), r.num_pages) for r in self._reservations.open()]
            growing.append((passport, num_tokens, num_pages))
            promised = sum(growth_pages(*one, page_size=page_size, limits=self._limits) for one in growing)
            promised += self.num_wanted_pages(self._running)
            num_spare = max(self._limits.watermark_pages, promised)
        if passport.next_index > 0:
            # A giver that decodes has not computed its last token, so a page that ends with it is not to be held.
            page_hashes = page_hashes[: (num_tokens - 1) // page_size]
        return self._reservations.make(passport, page_hashes, num_pages=num_pages, num_spare=num_spare)

    def adopt(self, reservation: Reservation, passport: Passport, num_computed_tokens: int) -> Sequence:
        """The giver has written everything: the sequence is ours and runs from the next step on.

        Its full pages are named in the prefix cache: by the offered names, going on from there. It may have more
        than one uncomputed token; with nothing but held pages computed it is prefilled here.

        Args:
            reservation: open.
            passport: as of Commit.
            num_computed_tokens: tokens whose keys and values are in the reservation's pages.

        Raises:
            ReservationMismatch: the passport or the count does not fit; the reservation stays open.
            AlreadyFinished: the passport needs no further token; the reservation stays open.
            DuplicateSequence: it runs here already; the reservation stays open.
        """
        self._reservations.check(reservation, passport, num_computed_tokens)
        self._sequences.require_new(passport.request_id, passport.epoch)
        sequence = Sequence.from_passport(passport, arrival=self._num_arrived)
        finished = finished_on_arrival(sequence, self._limits.max_model_len)
        if finished is not None:
            raise AlreadyFinished(finished)
        self._num_arrived += 1
        num_held_pages = len(reservation.held_page_ids)
        num_full_pages = num_computed_tokens // self._pool.page_size
        sequence.page_table = self._reservations.take(reservation)
        sequence.num_cached_tokens = num_held_pages * self._pool.page_size
        sequence.num_computed_tokens = num_computed_tokens
        sequence.phase = Phase.RUNNING
        sequence.chain = self._cache.chain(passport.cache_salt, reservation.page_hashes[:num_full_pages])
        sequence.chain.extend(sequence.token_ids, num_computed_tokens)
        self._cache.insert(
            sequence.page_hashes[num_held_pages:num_full_pages],
            sequence.page_table[num_held_pages:num_full_pages],
        )
        self._sequences.add(sequence)
        insort(self._running, sequence, key=_order)
        return sequence

    def cancel_reservation(self, reservation: Reservation, writer_done: bool) -> None:
        """Give a reservation's pages back; quarantine them unless the writer has stopped. Idempotent."""
        self._reservations.cancel(reservation, writer_done=writer_done)

    def writer_gone(self, generation: int) -> None:
        """The writer of this generation has stopped for good: its quarantined pages are free again.

        A reservation of it that is still open is cancelled. Unknown generations are no error.
        """
        self._reservations.writer_gone(generation)

    # staying

    def schedule(self) -> StepPlan | None:
        """The next step: one row per running sequence, or None where none can go on now.

        A sequence with several uncomputed tokens computes as many as the step's budget leaves it, and samples with
        the last one. Look at `take_returned` after each call: sequences may have lost their place. None while
        sequences run means that a lone one waits for a reservation or a paused sequence to free pages.

        Mutates: page tables grow; sequences given back lose theirs.

        Raises:
            StepOutOfOrder: a plan is in flight.
        """
        self._in_flight.require_none()
        rows: list[Row] = []
        extra = max(0, self._limits.max_step_tokens - len(self._running))
        position = 0
        while position < len(self._running):
            sequence = self._running[position]
            num_uncomputed = sequence.num_uncomputed_tokens
            count = min(num_uncomputed, 1 + extra)
            start = sequence.num_computed_tokens
            if self._grow(sequence, start + count):
                rows.append(Row(sequence, start, count, sample=count == num_uncomputed))
                extra -= count - 1
                position += 1
            elif len(self._running) == 1 and (self.num_reserved or self.num_paused):
                break
            else:
                last = self._running[-1]
                self.release(last)
                self._returned.append(last)
        return self._in_flight.start(StepPlan(tuple(rows))) if rows else None

    def schedule_ahead(self) -> StepPlan | None:
        """See `Scheduler.schedule_ahead`. Gives nobody back: who is in flight keeps its pages anyway.

        Mutates: page tables grow.
        """
        before = self._in_flight.only
        if before is None or not self._feeds_next(before):
            return None
        rows = rows_after(before, self._running, self._limits.max_model_len)
        if not rows or not all(self._grow(row.sequence, row.start + row.count) for row in rows):
            return None
        plan = StepPlan(tuple(rows))
        return self._in_flight.start(plan) if self._feeds_next(plan) else None

    def take_returned(self) -> list[Sequence]:
        """Sequences given back since the last call, for replay elsewhere: no longer here, without pages."""
        returned, self._returned = self._returned, []
        return returned

    def commit(self, plan: StepPlan, out: StepOutput) -> StepProgress:
        """Book the results of the oldest plan in flight: tokens, ends, newly named pages.

        Ended sequences are DONE, without pages as soon as no plan in flight computes them.

        Raises:
            StepOutOfOrder: `plan` is not that one.
            BrokenInvariant: `out` is not as long as the plan; nothing was booked.
        """
        self._in_flight.finish(plan, out)
        rows = []
        for row, result in zip(plan.rows, out.sampled, strict=True):
            sequence = row.sequence
            if sequence.phase is Phase.DONE:  # aborted during the step, or ended by the one before
                self._free_unless_in_flight(sequence)
                continue
            progress = settle(
                row,
                result,
                cache=self._cache,
                page_size=self._pool.page_size,
                max_model_len=self._limits.max_model_len,
            )
            rows.append(progress)
            if progress.finish is not None:
                self.release(sequence)
        return StepProgress(tuple(rows))

    def abort(self, request_id: str, epoch: int) -> list[Sequence]:
        """See `Scheduler.abort`. Leaves reservations: their hand-off knows whether the writer has stopped."""
        ended = self._sequences.up_to(request_id, epoch)
        for sequence in ended:
            self.release(sequence)
        return ended

    # going

    def pause(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch, to move its last pages; it keeps them all.

        If a plan in flight computes it, that row is still booked, and may even end it: build the passport once
        `is_in_flight` says no. No effect on a sequence that is not running.
        """
        if sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
            self._paused.append(sequence)
            sequence.phase = Phase.PAUSED

    def resume(self, sequence: Sequence) -> None:
        """Put a paused sequence back into the batch. No effect on one that is not paused."""
        if sequence.phase is Phase.PAUSED:
            self._paused.remove(sequence)
            insort(self._running, sequence, key=_order)
            sequence.phase = Phase.RUNNING

    def is_in_flight(self, sequence: Sequence) -> bool:
        """Whether a plan in flight computes this sequence, so that its ids may still grow by `commit`."""
        return self._in_flight.holds(sequence)

    def release(self, sequence: Sequence) -> None:
        """Let go of a sequence, after it moved or because it is given up. Idempotent.

        Its full pages stay as prefix cache. If a plan in flight computes it, `commit` releases its pages and reports
        nothing of it.
        """
        if sequence.phase is Phase.DONE:
            return
        (self._running if sequence.phase is Phase.RUNNING else self._paused).remove(sequence)
        sequence.phase = Phase.DONE
        self._sequences.remove(sequence)
        self._free_unless_in_flight(sequence)

    def _grow(self, sequence: Sequence, num_tokens: int) -> bool:
        num_missing = pages_for(num_tokens, self._pool.page_size) - len(sequence.page_table)
        if num_missing <= 0:
            return True
        try:
            sequence.page_table += self._pool.allocate(num_missing)
        except OutOfPages:
            return False
        return True

    def _free_unless_in_flight(self, sequence: Sequence) -> None:
        if self._in_flight.holds(sequence):
            return
        self._pool.release(sequence.page_table)
        sequence.page_table = []
