"""From records to the figures of the report. Pure functions; times in seconds."""

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from loadtest.record import Outcome, Record, TokenCount
from loadtest.settings import ItlRule

_QUANTILES = (50.0, 90.0, 95.0, 99.0)


class Distribution(msgspec.Struct, frozen=True):
    """Figures of a sample, in the sample's unit. Percentiles interpolate linearly between ranks."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Targets(msgspec.Struct, frozen=True):
    """What a request must meet to count for goodput; a target of None is always met."""

    ttft_s: float | None = None
    itl_s: float | None = None
    itl_rule: ItlRule = ItlRule.MEAN

    @property
    def given(self) -> bool:
        """Whether there is any target."""
        return self.ttft_s is not None or self.itl_s is not None

    def describe(self) -> str:
        """Say what this run's goodput counts."""
        parts = []
        if self.ttft_s is not None:
            parts.append(f"TTFT <= {self.ttft_s * 1e3:g} ms")
        if self.itl_s is not None:
            figure = "mean ITL (TPOT)" if self.itl_rule is ItlRule.MEAN else f"{self.itl_rule} of its ITL"
            parts.append(f"{figure} <= {self.itl_s * 1e3:g} ms")
        return "successful requests with " + " and ".join(parts) + ", per second"


class Goodput(msgspec.Struct, frozen=True):
    """Requests that met every target, their rate, their share of all requests sent, and the definition."""

    count: int
    requests_per_s: float
    share: float
    definition: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in figures.

    ``duration_s`` is from the first request sent to the last one ended, and divides every rate. Tokens and
    latencies are those of successful requests. ``errors`` counts the failed ones by kind, HTTP errors by
    status. ``tokens_per_chunk`` above 1 means that a gap of ``itl_s`` spans several tokens.
    """

    duration_s: float
    num_sent: int
    num_ok: int
    num_rejected: int
    num_failed: int
    num_cancelled: int
    errors: dict[str, int]
    retry_after_s: Distribution | None
    requests_per_s: float
    input_tokens: int
    output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    asked_input_tokens: int
    num_short_outputs: int
    num_without_usage: int
    tokens_per_chunk: float | None
    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    goodput: Goodput | None


def distribution(values: Iterable[float]) -> Distribution | None:
    """Return the figures of ``values``, None for an empty sample."""
    sample = np.fromiter(values, dtype=np.float64)
    if sample.size == 0:
        return None
    p50, p90, p95, p99 = (float(value) for value in np.percentile(sample, _QUANTILES))
    return Distribution(sample.size, float(sample.mean()), p50, p90, p95, p99, float(sample.max()))


def is_good(record: Record, targets: Targets) -> bool:
    """Whether a request counts for goodput.

    It must have succeeded and met each target. Without a first token it misses a TTFT target. With fewer
    than two tokens (or chunks, for the percentile rules) there is no gap, so the ITL target is met.
    """
    if record.outcome is not Outcome.OK:
        return False
    if targets.ttft_s is not None and (record.ttft_s is None or record.ttft_s > targets.ttft_s):
        return False
    itl_s = _itl_figure(record, targets.itl_rule)
    return targets.itl_s is None or itl_s is None or itl_s <= targets.itl_s


def summarise(records: Sequence[Record], targets: Targets) -> Summary:
    """Compute the figures of a run from all its records, in any order."""
    ok = [record for record in records if record.outcome is Outcome.OK]
    outcomes = Counter(record.outcome for record in records)
    num_rejected, num_cancelled = outcomes[Outcome.REJECTED], outcomes[Outcome.CANCELLED]
    duration_s = 0.0
    if records:
        duration_s = max(record.end_s for record in records) - min(record.sent_s for record in records)
    input_tokens = sum(record.prompt_tokens for record in ok)
    output_tokens = sum(record.output_tokens for record in ok)
    chunks = sum(len(record.content_times_s) for record in ok)
    return Summary(
        duration_s=duration_s,
        num_sent=len(records),
        num_ok=len(ok),
        num_rejected=num_rejected,
        num_failed=len(records) - len(ok) - num_rejected - num_cancelled,
        num_cancelled=num_cancelled,
        errors=_errors(records),
        retry_after_s=distribution(r.retry_after_s for r in records if r.retry_after_s is not None),
        requests_per_s=_rate(len(ok), duration_s),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_tokens_per_s=_rate(input_tokens, duration_s),
        output_tokens_per_s=_rate(output_tokens, duration_s),
        asked_input_tokens=sum(record.asked_prompt_tokens for record in ok),
        num_short_outputs=sum(record.output_tokens < record.asked_output_tokens for record in ok),
        num_without_usage=sum(record.token_count is TokenCount.CHUNKS for record in ok),
        tokens_per_chunk=output_tokens / chunks if chunks else None,
        ttft_s=distribution(r.ttft_s for r in ok if r.ttft_s is not None),
        itl_s=distribution(gap for r in ok for gap in r.gaps_s),
        tpot_s=distribution(r.tpot_s for r in ok if r.tpot_s is not None),
        e2e_s=distribution(r.e2e_s for r in ok),
        goodput=_goodput(records, targets, duration_s) if targets.given else None,
    )


def _itl_figure(record: Record, rule: ItlRule) -> float | None:
    if rule is ItlRule.MEAN:
        return record.tpot_s
    gaps = distribution(record.gaps_s)
    if gaps is None:
        return None
    return {ItlRule.P95: gaps.p95, ItlRule.P99: gaps.p99, ItlRule.MAX: gaps.max}[rule]


def _goodput(records: Sequence[Record], targets: Targets, duration_s: float) -> Goodput:
    count = sum(is_good(record, targets) for record in records)
    share = count / len(records) if records else 0.0
    return Goodput(count, _rate(count, duration_s), share, targets.describe())


def _errors(records: Iterable[Record]) -> dict[str, int]:
    fine = {Outcome.OK, Outcome.REJECTED, Outcome.CANCELLED}
    kinds = Counter(
        f"http {record.status}" if record.outcome is Outcome.HTTP_ERROR else str(record.outcome)
        for record in records
        if record.outcome not in fine
    )
    return dict(kinds.most_common())


def _rate(amount: float, duration_s: float) -> float:
    return amount / duration_s if duration_s > 0 else 0.0
