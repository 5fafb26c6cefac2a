"""What this machine can do at best: the limits that every figure of `bench/` is printed beside.

    python bench/machine_limits.py [--threads 2]

Memory: the best rate at which a plain sum reads far more bytes than the caches hold. Matrices: the best rate of
bfloat16 products of M tokens with one packed matrix that stays in the caches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

READ_BYTES = 2**30
MATRIX = (6144, 1024)  # [out, in], the largest of Qwen3-0.6B's layers


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured in this run.

    Attributes:
        threads: that computed.
        read_gb_s: bytes read from memory, 1e9 per second.
        gflop_s: bfloat16 operations, 1e9 per second, on one matrix in the caches.
    """

    threads: int
    read_gb_s: float
    gflop_s: float


def best_s(work: Callable[[], object], rounds: int) -> float:
    """The best of several calls, after a warm-up: what disturbs a run only ever adds."""
    work()
    times = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - began_s)
    return min(times)


def read_gb_s(num_bytes: int = READ_BYTES) -> float:
    """Memory bandwidth of reading, 1e9 bytes per second, with torch's present number of threads."""
    flat = torch.ones(num_bytes // 8, dtype=torch.int64)
    return num_bytes / best_s(flat.sum, 5) / 1e9


def matrix_gflop_s(num_tokens: int) -> float:
    """Rate of bfloat16 products of `num_tokens` rows with one packed matrix, 1e9 operations per second."""
    from engine.packed_backend import PackedBackend

    product = PackedBackend().linear(torch.randn(MATRIX, dtype=torch.bfloat16), None)
    hidden = torch.randn(num_tokens, MATRIX[1], dtype=torch.bfloat16)
    repeats = max(1, 4096 // num_tokens)

    def work() -> None:
        for _ in range(repeats):
            product(hidden)

    return 2 * repeats * num_tokens * MATRIX[0] * MATRIX[1] / best_s(work, 5) / 1e9


def measure(threads: int) -> Limits:
    """Both limits with so many threads; the number stays set."""
    torch.set_num_threads(threads)
    return Limits(threads, read_gb_s(), max(matrix_gflop_s(size) for size in (128, 256, 512)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    most = parser.parse_args().threads
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        rates = ", ".join(f"M={size}: {matrix_gflop_s(size):.0f}" for size in (1, 8, 32, 128, 512))
        print(f"{threads} threads: reads {read_gb_s():.1f} GB/s; bfloat16 GFLOP/s in the caches at {rates}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
