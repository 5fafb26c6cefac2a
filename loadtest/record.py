"""What is kept of each request, and the live counts."""

import itertools
from array import array
from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    """How a request ended; every request sent has exactly one."""

    OK = "ok"
    REJECTED = "rejected"  # 429
    HTTP_ERROR = "http_error"  # any other status but 200
    CONNECT_ERROR = "connect_error"
    DISCONNECTED = "disconnected"  # the stream broke off
    STREAM_ERROR = "stream_error"  # the stream itself said that it failed
    BAD_ANSWER = "bad_answer"  # unreadable
    TIMEOUT = "timeout"  # --timeout-s passed
    CANCELLED = "cancelled"  # the run was interrupted


class TokenCount(StrEnum):
    """Where a request's output token count comes from."""

    USAGE = "usage"
    CHUNKS = "chunks"  # the server sent no usage: each content chunk counted as one token


class Record(msgspec.Struct, kw_only=True):
    """One request. Times are seconds after the start of the measured phase; None: it never happened.

    ``turn`` counts within a conversation, whose later turns share the ``index``. ``scheduled_s`` is when the
    request was due (closed loop: when its user was free), ``held_s`` how long the ``--concurrency`` cap of an open
    loop then kept it back, ``sent_s`` when the client let it go, before connecting if it had to.
    ``content_times_s`` are the arrivals of chunks with content, float64 seconds.
    Latencies count from ``sent_s``.
    """

    index: int
    turn: int = 0
    scheduled_s: float
    sent_s: float
    held_s: float = 0.0
    end_s: float = 0.0
    outcome: Outcome = Outcome.OK
    status: int | None = None
    error: str | None = None
    retry_after_s: float | None = None
    finish_reason: str | None = None
    asked_prompt_tokens: int
    asked_output_tokens: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    token_count: TokenCount = TokenCount.USAGE
    content_times_s: "array[float]" = msgspec.field(default_factory=lambda: array("d"))

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from sending to the first chunk with content."""
        return self.content_times_s[0] - self.sent_s if self.content_times_s else None

    @property
    def e2e_s(self) -> float:
        """From sending to the end of the answer."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first, however tokens were packed; None below two tokens."""
        times = self.content_times_s
        if self.output_tokens < 2 or not times:
            return None
        return (times[-1] - times[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Gaps between consecutive chunks with content."""
        times = self.content_times_s
        return [later - sooner for sooner, later in itertools.pairwise(times)]


class Tally:
    """Counts that change while the run goes on; read by the progress line and the runner."""

    def __init__(self) -> None:
        self.num_sent = 0
        self.num_running = 0
        self.peak_running = 0
        self.num_ok = 0
        self.num_rejected = 0
        self.num_failed = 0
        self.num_cancelled = 0
        self.num_chunks = 0  # chunks with content, of all requests
        self.ok_tokens = 0
        self.ok_chunks = 0

    @property
    def num_done(self) -> int:
        """Requests that have ended, whichever way."""
        return self.num_ok + self.num_rejected + self.num_failed + self.num_cancelled

    @property
    def tokens_per_chunk(self) -> float:
        """Mean of the requests that succeeded so far; 1 before the first."""
        return self.ok_tokens / self.ok_chunks if self.ok_chunks else 1.0

    def counts(self) -> dict[str, int]:
        """Return all counts by name."""
        return dict(vars(self))

    def sent(self) -> None:
        """Count a request that starts."""
        self.num_sent += 1
        self.num_running += 1
        self.peak_running = max(self.peak_running, self.num_running)

    def ended(self, record: Record) -> None:
        """Count a request that has ended."""
        self.num_running -= 1
        if record.outcome is Outcome.OK:
            self.num_ok += 1
            self.ok_tokens += record.output_tokens
            self.ok_chunks += len(record.content_times_s)
        elif record.outcome is Outcome.REJECTED:
            self.num_rejected += 1
        elif record.outcome is Outcome.CANCELLED:
            self.num_cancelled += 1
        else:
            self.num_failed += 1
