"""A runner without a model, whose answers depend on every byte of the pages it is told to read.

The "keys and values" of a token are one 64-bit number mixed from the token id and its predecessor's number, so they
depend on all tokens before it, as a model's do. The next token is mixed from the numbers of *all* tokens, read back
from the pages: a page that was lost, reused too early, shared wrongly or moved incompletely changes the output. The
reference `fake_output` computes the same from ids alone.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence

from engine.plan import Failed, Pooled, Result, Row, Sampled, ScoredPrompt, StepOutput, StepPlan
from fleet.types import FinishReason, SamplingParams, TokenLogprob, TopLogprob

SLOT_BYTES = 8
_MASK = 2**64 - 1


def _mix(number: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


def _kv(previous: int, token_id: int) -> int:
    return _mix(previous ^ (token_id + 1))


def fake_next_token(token_ids: Sequence[int], *, vocab_size: int = 1000) -> int:
    """The token after `token_ids`, a pure function of them."""
    total = kv = 0
    for token_id in token_ids:
        kv = _kv(kv, token_id)
        total += kv
    return _mix(total & _MASK) % vocab_size


def fake_output(
    prompt: Sequence[int], params: SamplingParams, *, max_model_len: int, vocab_size: int = 1000
) -> tuple[list[int], FinishReason]:
    """The whole output of a prompt and why it ends, computed without pages or schedulers."""
    token_ids = list(prompt)
    while True:
        index = len(token_ids) - len(prompt)
        token_ids.append(fake_next_token(token_ids, vocab_size=vocab_size))
        if token_ids[-1] in params.stop_token_ids and index >= params.min_tokens:
            return token_ids[len(prompt) :], FinishReason.STOP
        if index + 1 >= params.max_tokens or len(token_ids) >= max_model_len:
            return token_ids[len(prompt) :], FinishReason.LENGTH


def fake_logprob(token_id: int, *, num_top: int) -> TokenLogprob:
    """The made-up log-probabilities that go with a token: the token itself is the likeliest."""
    top = [TopLogprob(token_id=token_id + rank, logprob=-0.5 - rank) for rank in range(num_top)]
    return TokenLogprob(logprob=-0.5, top=top)


def fake_score(row: Row) -> ScoredPrompt:
    """Made-up log-probabilities of the prompt tokens that a row predicts."""
    ids = row.sequence.token_ids[row.start + 1 : min(row.start + row.count + 1, row.sequence.prompt_len)]
    return ScoredPrompt(row.start + 1, [fake_logprob(token_id, num_top=1) for token_id in ids])


class FakeRunner:
    """A `Runner` over `num_pages` pages of `page_size` slots of 8 bytes, page after page in one buffer.

    Args:
        num_pages: of the pool.
        page_size: slots per page.
        buffer: writable, `num_pages * page_size * 8` bytes or more; None: private memory.
        vocab_size: tokens are drawn from [0, vocab_size).
        step_s: how long each step takes at least.
        fail: called per row; a sentence makes the row `Failed`.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        buffer: bytearray | memoryview | None = None,
        vocab_size: int = 1000,
        step_s: float = 0.0,
        fail: Callable[[Row], str | None] = lambda _: None,
    ) -> None:
        self.page_bytes = page_size * SLOT_BYTES
        self.num_steps = 0
        self.num_computed_tokens = 0
        pool_bytes = num_pages * self.page_bytes
        self._bytes = memoryview(buffer if buffer is not None else bytearray(pool_bytes)).cast("B")[:pool_bytes]
        self._slots = self._bytes.cast("Q")
        self._page_size = page_size
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._fail = fail

    def feeds_next(self, plan: StepPlan) -> bool:
        """Steps are computed at once. See `support.late_runner` for others."""
        del plan
        return False

    def launch(self, plan: StepPlan) -> StepOutput:
        """As `run`."""
        return self.run(plan)

    def run(self, plan: StepPlan) -> StepOutput:
        """Write the numbers of all rows' tokens, then sample. Two rows that write the same slot fail the test."""
        if self._step_s:
            time.sleep(self._step_s)
        self.num_steps += 1
        self.num_computed_tokens += plan.num_tokens
        written: set[int] = set()
        for row in plan.rows:
            slots = [self._slot(row, position) for position in range(row.start, row.start + row.count)]
            assert written.isdisjoint(slots), "two rows of one step write the same slot"
            written.update(slots)
            self._write(row, slots)
        scored = {at: fake_score(row) for at, row in enumerate(plan.rows) if row.sequence.params.prompt_logprobs}
        return StepOutput(tuple(self._result(row) for row in plan.rows), scored)

    def read_page(self, page_id: int) -> bytes:
        """The bytes of one page."""
        return bytes(self._bytes[page_id * self.page_bytes : (page_id + 1) * self.page_bytes])

    def write_page(self, page_id: int, content: bytes) -> None:
        """Overwrite one page, as a transport would."""
        self._bytes[page_id * self.page_bytes : (page_id + 1) * self.page_bytes] = content

    def _slot(self, row: Row, position: int) -> int:
        page_id = row.sequence.page_table[position // self._page_size]
        return page_id * self._page_size + position % self._page_size

    def _write(self, row: Row, slots: list[int]) -> None:
        kv = self._slots[self._slot(row, row.start - 1)] if row.start else 0
        for position, slot in enumerate(slots, start=row.start):
            kv = _kv(kv, row.sequence.token_ids[position])
            self._slots[slot] = kv

    def _result(self, row: Row) -> Result | None:
        message = self._fail(row)
        if message is not None:
            return Failed(message=message)
        if row.sequence.passport.pooling is not None:
            return Pooled(struct.pack("=f", row.count))
        if not row.sample:
            return None
        total = 0
        num_left = row.start + row.count
        for page_id in row.sequence.page_table:
            first = page_id * self._page_size
            total += sum(self._slots[first : first + min(num_left, self._page_size)])
            num_left -= self._page_size
            if num_left <= 0:
                break
        token_id = _mix(total & _MASK) % self._vocab_size
        num_top = row.sequence.params.logprobs
        return Sampled(token_id, None if num_top is None else fake_logprob(token_id, num_top=num_top))
