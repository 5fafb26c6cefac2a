"""The arithmetic of the report, against records made by hand."""

from array import array
from typing import Any

import pytest

from loadtest.health import find_problems
from loadtest.metrics import Distribution, Targets, distribution, is_good, summarise
from loadtest.record import Outcome, Record, TokenCount
from loadtest.settings import ItlRule


def record(times: list[float], *, sent_s: float = 0.0, **fields: Any) -> Record:
    values: dict[str, Any] = {
        "index": 0,
        "scheduled_s": sent_s,
        "sent_s": sent_s,
        "end_s": times[-1] if times else sent_s,
        "asked_prompt_tokens": 10,
        "asked_output_tokens": len(times),
        "prompt_tokens": 10,
        "output_tokens": len(times),
        "content_times_s": array("d", times),
    }
    return Record(**values | fields)


def test_percentiles_interpolate_between_ranks() -> None:
    figures = distribution(float(value) for value in range(1, 101))
    assert figures is not None
    assert (figures.count, figures.mean, figures.max) == (100, 50.5, 100.0)
    percentiles = [figures.p50, figures.p90, figures.p95, figures.p99]
    assert percentiles == pytest.approx([50.5, 90.1, 95.05, 99.01])
    assert distribution([]) is None


def test_latencies_of_one_record() -> None:
    one = record([1.5, 1.6, 1.9], sent_s=1.0, end_s=2.0)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.gaps_s == pytest.approx([0.1, 0.3])
    assert one.tpot_s == pytest.approx(0.2)
    assert one.e2e_s == pytest.approx(1.0)


def test_tpot_counts_tokens_and_itl_counts_chunks() -> None:
    # Nine tokens in three chunks: a reader waits 0.4 s twice, the server makes a token each 0.1 s.
    packed = record([1.0, 1.4, 1.8], output_tokens=9)
    assert packed.gaps_s == pytest.approx([0.4, 0.4])
    assert packed.tpot_s == pytest.approx(0.1)
    assert summarise([packed], Targets()).tokens_per_chunk == pytest.approx(3.0)


def test_short_answers_have_no_tpot() -> None:
    assert record([1.0]).tpot_s is None
    assert record([]).tpot_s is None
    assert record([]).ttft_s is None


@pytest.mark.parametrize(
    ("one", "rule", "good"),
    [
        (record([0.2, 0.3, 0.4]), ItlRule.MEAN, True),
        (record([0.6, 0.7, 0.8]), ItlRule.MEAN, False),  # late first token
        (record([0.2, 0.5, 0.8]), ItlRule.MEAN, False),  # slow tokens
        (record([0.2, *(0.3 + place / 100 for place in range(20)), 0.9]), ItlRule.MEAN, True),
        (record([0.2, *(0.3 + place / 100 for place in range(20)), 0.9]), ItlRule.MAX, False),  # one pause
        (record([0.2, *(0.3 + place / 100 for place in range(20)), 0.9]), ItlRule.P99, False),
        (record([0.2, *(0.3 + place / 100 for place in range(40)), 1.2]), ItlRule.P95, True),
        (record([0.2]), ItlRule.MAX, True),  # no gap to be late
        (record([]), ItlRule.MEAN, False),  # no first token
        (record([0.2, 0.3], outcome=Outcome.STREAM_ERROR), ItlRule.MEAN, False),
    ],
)
def test_goodput_of_one_request(one: Record, rule: ItlRule, good: bool) -> None:
    assert is_good(one, Targets(0.5, 0.1 + 1e-9, rule)) is good


def test_one_target_alone_counts_alone() -> None:
    slow_start, slow_flow = record([2.0, 2.01]), record([0.1, 1.0])
    assert is_good(slow_start, Targets(itl_s=0.1))
    assert not is_good(slow_start, Targets(ttft_s=0.5))
    assert is_good(slow_flow, Targets(ttft_s=0.5))
    assert not is_good(slow_flow, Targets(itl_s=0.1))


def test_summary_of_a_mixed_run() -> None:
    records = [
        record([0.5, 0.6], sent_s=0.0, end_s=1.0, prompt_tokens=11),
        record([3.5, 3.7], sent_s=2.0, end_s=4.0, asked_output_tokens=5, token_count=TokenCount.CHUNKS),
        record([], sent_s=1.0, outcome=Outcome.REJECTED, status=429, retry_after_s=2.0),
        record([], sent_s=1.0, outcome=Outcome.HTTP_ERROR, status=503),
        record([], sent_s=1.0, outcome=Outcome.HTTP_ERROR, status=503),
        record([2.5], sent_s=1.0, outcome=Outcome.TIMEOUT, end_s=5.0),
        record([2.5], sent_s=1.0, outcome=Outcome.CANCELLED),
    ]
    summary = summarise(records, Targets(ttft_s=1.0, itl_s=0.15))
    assert summary.duration_s == 5.0
    assert (summary.num_sent, summary.num_ok, summary.num_rejected) == (7, 2, 1)
    assert (summary.num_failed, summary.num_cancelled) == (3, 1)
    assert summary.errors == {"http 503": 2, "timeout": 1}
    assert summary.requests_per_s == pytest.approx(0.4)
    assert (summary.input_tokens, summary.output_tokens) == (21, 4)
    assert summary.output_tokens_per_s == pytest.approx(0.8)
    assert (summary.num_short_outputs, summary.num_without_usage) == (1, 1)
    assert summary.ttft_s is not None
    assert summary.ttft_s.count == 2  # failed requests have no latency
    assert summary.itl_s is not None
    assert summary.itl_s.mean == pytest.approx(0.15)
    assert summary.retry_after_s is not None
    assert summary.retry_after_s.max == 2.0
    assert summary.goodput is not None
    assert summary.goodput.count == 1
    assert summary.goodput.requests_per_s == pytest.approx(0.2)
    assert summary.goodput.share == pytest.approx(1 / 7)
    assert "TTFT <= 1000 ms" in summary.goodput.definition


def test_nothing_sent_is_no_division_by_zero() -> None:
    summary = summarise([], Targets())
    assert (summary.num_sent, summary.requests_per_s, summary.goodput) == (0, 0.0, None)


def test_a_late_client_is_told_so() -> None:
    def at_p99(seconds: float) -> Distribution:
        return Distribution(9, 0, 0, 0, 0, seconds, seconds)

    assert find_problems(at_p99(0.004), at_p99(0.009), 0.5, 0.02) == []
    assert find_problems(at_p99(0.006), None, 0.5, 0.100) == []  # a tenth of the ITL is allowed
    assert len(find_problems(at_p99(0.006), None, 0.5, 0.02)) == 1
    assert len(find_problems(at_p99(0.1), at_p99(0.02), 0.99, 0.02)) == 3
