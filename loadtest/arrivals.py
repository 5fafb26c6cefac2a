"""When requests arrive in an open loop."""

import math
from collections.abc import Iterator

import numpy as np


def arrival_times(rate: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Yield arrival times without end, in seconds after the start, never decreasing.

    Gaps are gamma distributed with mean ``1 / rate`` seconds and shape ``burstiness``, so their coefficient
    of variation is ``1 / sqrt(burstiness)``: 1 gives a Poisson process, below 1 arrivals come in bursts,
    above 1 they even out, and ``inf`` spaces them exactly. The times depend on ``rng`` alone, never on how
    fast the server answers. Requires: ``rate > 0``, ``burstiness > 0``. Mutates: ``rng``.
    """
    if math.isinf(burstiness):
        number = 0
        while True:
            number += 1
            yield number / rate
    at_s = 0.0
    scale_s = 1.0 / (rate * burstiness)
    while True:
        at_s += float(rng.gamma(burstiness, scale_s))
        yield at_s
