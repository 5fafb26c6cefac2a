"""Records as curves over time; times in seconds after the start of the measured phase."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from loadtest.record import Outcome, Record

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y, equally long."""


def tokens_per_s(records: Iterable[Record], bin_s: float) -> Curve:
    """Output tokens per second in bins of ``bin_s``, each chunk worth its request's mean tokens per chunk."""
    times, weights = [], []
    for record in records:
        if record.content_times_s:
            times.append(np.asarray(record.content_times_s))
            weights.append(np.full(len(record.content_times_s), record.output_tokens / len(record.content_times_s)))
    if not times:
        return np.empty(0), np.empty(0)
    at_s, tokens = np.concatenate(times), np.concatenate(weights)
    edges = np.arange(0.0, float(at_s.max()) + bin_s, bin_s)
    edges = np.append(edges, edges[-1] + bin_s) if edges.size < 2 else edges
    counts, _ = np.histogram(at_s, edges, weights=tokens)
    return edges[:-1] + bin_s / 2, counts / bin_s


def running(records: Iterable[Record]) -> Curve:
    """Requests in flight, at every moment at which their number changes."""
    records = list(records)
    moments = np.array([r.sent_s for r in records] + [r.end_s for r in records])
    steps = np.array([1.0] * len(records) + [-1.0] * len(records))
    order = np.argsort(moments, kind="stable")
    return moments[order], np.cumsum(steps[order])


def ttfts(records: Iterable[Record]) -> Curve:
    """Time to first token (s) of successful requests by when they were sent."""
    points = [(r.sent_s, r.ttft_s) for r in records if r.outcome is Outcome.OK and r.ttft_s is not None]
    return _curve(points)


def gaps(records: Iterable[Record], most: int = 4000) -> Curve:
    """Gaps between chunks (s) of successful requests by when they ended; a fair sample of at most ``most``.

    The longest hundred are always in it, since they are what one looks for.
    """
    times, sizes = [], []
    for record in records:
        if record.outcome is Outcome.OK and len(record.content_times_s) > 1:
            at_s = np.asarray(record.content_times_s)
            times.append(at_s[1:])
            sizes.append(np.diff(at_s))
    if not times:
        return np.empty(0), np.empty(0)
    at_s, size_s = np.concatenate(times), np.concatenate(sizes)
    if at_s.size > most:
        kept = np.random.default_rng(0).choice(at_s.size, most - 100, replace=False)
        kept = np.union1d(kept, np.argsort(size_s)[-100:])
        at_s, size_s = at_s[kept], size_s[kept]
    return at_s, size_s


def cumulative(values: Sequence[float] | NDArray[np.float64], most: int = 1000) -> Curve:
    """Share of ``values`` up to each x, at no more than ``most`` points."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if ordered.size > most:
        ordered = np.quantile(ordered, np.linspace(0, 1, most))
    return ordered, np.arange(1, ordered.size + 1) / max(1, ordered.size)


def _curve(points: list[tuple[float, float]]) -> Curve:
    table = np.array(points, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
