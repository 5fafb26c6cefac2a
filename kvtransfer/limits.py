"""Times and sizes of hand-offs, decided once at start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOffLimits:
    """Attributes say what each bounds.

    Attributes:
        liveness_s: a peer silent for so long is lost. Measures liveness, never queue length.
        window_bytes: page bytes that one giver may have under way over carried transports, all hand-offs together
            (at least one page moves).
        write_bytes: page bytes per write of a direct transport, or per message of a carried one.
        backoff_s, max_backoff_s: pause after every target was full, first and longest; doubles, with jitter.
        memory_s: how long cancels, epochs and settled hand-offs are remembered.
        memory_entries: how many of each are remembered at most.
        full_retry_ms: hint to a giver that found this taker full.
    """

    liveness_s: float = 3.0
    window_bytes: int = 16 * 1024 * 1024
    write_bytes: int = 4 * 1024 * 1024
    backoff_s: float = 0.02
    max_backoff_s: float = 1.0
    memory_s: float = 120.0
    memory_entries: int = 65_536
    full_retry_ms: int = 20

    @property
    def beat_s(self) -> float:
        """Between two Alive messages, and between repetitions of an unanswered one."""
        return self.liveness_s / 4
