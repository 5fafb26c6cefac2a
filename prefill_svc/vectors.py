"""Vectors in the making: the shares of a prompt's chunks are added up here and become one vector of length 1."""

from __future__ import annotations

import numpy as np

from engine.plan import Pooled
from engine.sequence import Sequence


class Vectors:
    """Sums by request and epoch, in float64, so that a long prompt's mean does not lose its small parts."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], np.ndarray] = {}

    def add(self, sequence: Sequence, share: Pooled) -> None:
        """Count what one row gave. With last-token pooling there is one such row."""
        values = np.frombuffer(share.values, dtype=np.float32).astype(np.float64)
        key = (sequence.request_id, sequence.epoch)
        self._sums[key] = self._sums[key] + values if key in self._sums else values

    def take(self, sequence: Sequence) -> bytes | None:
        """The finished vector, little-endian float32; None if the model gave no finite one.

        A mean and a sum differ by a factor alone, which the division by the length takes out.
        """
        total = self._sums.pop((sequence.request_id, sequence.epoch), None)
        if total is None:
            return None
        length = float(np.linalg.norm(total))
        if not np.isfinite(length) or length == 0:
            return None
        return (total / length).astype("<f4").tobytes()

    def drop(self, sequence: Sequence) -> None:
        """Forget a request that is over or gone. Idempotent."""
        self._sums.pop((sequence.request_id, sequence.epoch), None)
