"""What a CUDA device can do at best: the rates of a copy and of large products, beside which kernels are printed.

    python bench/device_limits.py        # one line of JSON

Needs torch and a GPU, and nothing of this project.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

COPY_BYTES = 2 * 2**30
FLUSH_BYTES = 2**30
"""Outlasts caches and a launch."""
SIZE = 8192
"""Of square matrices."""


@dataclass(frozen=True)
class DeviceLimits:
    """Measured in this run.

    Attributes:
        copy_bytes_per_s: read and written. flops, fp8_flops: of products; 0 where there are no FP8 numbers.
    """

    copy_bytes_per_s: float
    flops: float
    fp8_flops: float

    @classmethod
    def measure(cls, timer: Timer) -> DeviceLimits:
        """Takes 6 GB of the device for a moment."""
        copy_s = _copy_s(timer)
        left, right = (torch.randn(SIZE, SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product_s = timer.median_s(lambda: left @ right)
        fp8_s = _fp8_product_s(timer, left, right) if torch.cuda.get_device_capability() >= (8, 9) else float("inf")
        return cls(2 * COPY_BYTES / copy_s, 2 * SIZE**3 / product_s, 2 * SIZE**3 / fp8_s)


class Timer:
    """Times calls on the device by events, its caches flushed before each."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def median_s(self, work: Callable[[], object], *, rounds: int = 20) -> float:
        """Median of some calls, after three to warm up."""
        for _ in range(3):
            work()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            for _ in range(rounds)
        ]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times_ms: list[float] = sorted(begin.elapsed_time(end) for begin, end in events)
        return times_ms[rounds // 2] / 1e3


def _copy_s(timer: Timer) -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.int8, device="cuda").random_()  # zeros may cost less than data
    target = torch.empty_like(source)
    return timer.median_s(lambda: target.copy_(source))


def _fp8_product_s(timer: Timer, left: torch.Tensor, right: torch.Tensor) -> float:
    """With one scale per matrix, the plainest kind there is."""
    first, second = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    return timer.median_s(
        lambda: torch._scaled_mm(  # noqa: SLF001 - no public name
            first, second, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )


if __name__ == "__main__":
    print(json.dumps(asdict(DeviceLimits.measure(Timer())) if torch.cuda.is_available() else None))
