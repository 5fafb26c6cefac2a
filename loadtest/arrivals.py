"""When requests arrive in an open loop."""

import heapq
import itertools
import math
from collections.abc import Iterator

import msgspec
import numpy as np

from loadtest.errors import BadArgument

_Point = tuple[float, float]
_Piece = tuple[_Point, _Point | None]


class RateProfile(msgspec.Struct, frozen=True):
    """A rate that changes: straight lines through ``points`` (seconds, requests per second), level after the last."""

    points: tuple[tuple[float, float], ...]

    @property
    def end_s(self) -> float:
        """Time of the last point."""
        return self.points[-1][0]

    def __str__(self) -> str:
        return ",".join(f"{at_s:g}:{rate:g}" for at_s, rate in self.points)

    def times_of(self, counts: Iterator[float]) -> Iterator[float]:
        """Yield when the expected number of arrivals since 0 reaches each of ``counts``, which must not decrease.

        Ends where the profile ends at rate 0 and a count is never reached.
        """
        reached = 0.0  # expected arrivals up to the start of the current piece
        pieces: Iterator[_Piece] = itertools.chain(itertools.pairwise(self.points), [(self.points[-1], None)])
        (start_s, low), stop = next(pieces)
        for count in counts:
            while stop is not None:
                area = (stop[0] - start_s) * (low + stop[1]) / 2
                if reached + area >= count:
                    break
                reached += area
                (start_s, low), stop = next(pieces)
            slope = 0.0 if stop is None else (stop[1] - low) / (stop[0] - start_s)
            rest = count - reached
            if stop is None and low == 0:
                return
            # The smaller root of slope/2 t^2 + low t = rest, in the form that is safe for slope near 0.
            yield start_s + 2 * rest / (low + math.sqrt(max(0.0, low * low + 2 * slope * rest)))


class Burst(msgspec.Struct, frozen=True):
    """``size`` arrivals at the same moment, every ``every_s`` seconds, the first after that long."""

    size: int
    every_s: float

    def times(self) -> Iterator[float]:
        """Yield their arrival times without end."""
        for number in itertools.count(1):
            yield from itertools.repeat(number * self.every_s, self.size)


def parse_profile(text: str) -> RateProfile:
    """Read ``T:R,T:R,...``, times rising from 0. Raises: BadArgument."""
    try:
        points = tuple((float(at), float(rate)) for at, rate in (pair.split(":") for pair in text.split(",")))
    except ValueError as error:
        raise BadArgument("--rate-profile", f"cannot read {text!r}; give seconds:rate pairs, 0:2,30:8") from error
    rises = all(sooner < later for (sooner, _), (later, _) in itertools.pairwise(points))
    if points[0][0] != 0 or not rises or not all(0 <= rate < math.inf for _, rate in points):
        raise BadArgument("--rate-profile", f"{text!r} needs times that rise from 0 and rates of 0 or more")
    if not any(rate > 0 for _, rate in points):
        raise BadArgument("--rate-profile", f"{text!r} never sends anything")
    return RateProfile(points)


def parse_burst(text: str) -> Burst:
    """Read ``N:EVERY_S``. Raises: BadArgument."""
    try:
        size, every = text.split(":")
        burst = Burst(int(size), float(every))
    except ValueError as error:
        raise BadArgument("--burst", f"cannot read {text!r}; give a number and seconds, 50:10") from error
    if burst.size < 1 or not 0 < burst.every_s < math.inf:
        raise BadArgument("--burst", f"{text!r} needs a number of at least 1 and seconds above 0")
    return burst


def arrival_times(rate: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Yield arrival times without end, in seconds after the start, never decreasing.

    Gaps are gamma distributed with mean ``1 / rate`` seconds and shape ``burstiness``, so their coefficient
    of variation is ``1 / sqrt(burstiness)``: 1 gives a Poisson process, below 1 arrivals come in bursts,
    above 1 they even out, and ``inf`` spaces them exactly. The times depend on ``rng`` alone, never on how
    fast the server answers. Requires: ``rate > 0``, ``burstiness > 0``. Mutates: ``rng``.
    """
    return (count / rate for count in _unit_times(burstiness, rng))


def profile_times(profile: RateProfile, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Yield arrival times whose rate follows ``profile``; gaps are shaped as in :func:`arrival_times`."""
    return profile.times_of(_unit_times(burstiness, rng))


def merged(*streams: Iterator[float]) -> Iterator[float]:
    """Yield the arrivals of several streams in order."""
    return heapq.merge(*streams)


def _unit_times(burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Yield arrivals of a renewal process with a mean gap of 1."""
    if math.isinf(burstiness):
        yield from map(float, itertools.count(1))
    at = 0.0
    while True:
        at += float(rng.gamma(burstiness, 1.0 / burstiness))
        yield at
