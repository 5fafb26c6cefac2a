"""Choosing tokens on a CPU: the compiled kernel beside its torch specification, by turns in one run.

    python bench/sampling.py [--vocabularies 3072,151936] [--rows 1,32] [--threads 1] [--rounds 15]

Microseconds per step, medians; random logits of standard deviation 3. Both must say the same tokens. The limit is one
reading of the logits at the rate that memory is read at here; small vocabularies lie in the caches and beat it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from machine_limits import read_gb_s

from engine.choice import ChoiceRows, Choose, choose_in_torch
from engine.cpu.choice import TokenChoice

ROWS: dict[str, Callable[[int], ChoiceRows]] = {
    "greedy": lambda count: rows_of(count, temperature=0),
    "temperature 1": lambda count: rows_of(count, temperature=1),
    "top-p 0.9": lambda count: rows_of(count, temperature=0.7, top_p=0.9),
    "top-k 20, top-p 0.95": lambda count: rows_of(count, temperature=0.8, top_k=20, top_p=0.95),
}


def rows_of(count: int, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> ChoiceRows:
    """So many rows of these parameters, each with a seed of its own."""
    return ChoiceRows(
        np.full(count, temperature, dtype=np.float32),
        np.full(count, top_k, dtype=np.int64),
        np.full(count, top_p, dtype=np.float32),
        np.zeros(count, dtype=np.float32),
        np.arange(count, dtype=np.int64),
        np.arange(count, dtype=np.int64),
    )


def timed_us(choose: Choose, logits: torch.Tensor, rows: ChoiceRows) -> tuple[float, list[int]]:
    """One call, on logits of its own."""
    own = logits.clone()
    began_s = time.perf_counter()
    chosen = choose(own, rows)
    return (time.perf_counter() - began_s) * 1e6, chosen


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", default="3072,151936")
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compiled, rate = TokenChoice(), read_gb_s()
    print(f"{options.threads} thread(s), reading {rate:.1f} GB/s; microseconds")
    print("| vocabulary | rows | parameters | specification | compiled | ratio | limit |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for vocab_size in map(int, options.vocabularies.split(",")):
        for count in map(int, options.rows.split(",")):
            logits = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(count)) * 3
            for name, make in ROWS.items():
                rows = make(count)
                pairs = []
                for _ in range(options.rounds):
                    slow_us, expected = timed_us(choose_in_torch, logits, rows)
                    fast_us, chosen = timed_us(compiled, logits, rows)
                    if chosen != expected:
                        raise SystemExit(f"{name}: the kernel said {chosen}, its specification {expected}")
                    pairs.append((slow_us, fast_us))
                slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
                figures = f"{slow:,.0f} | {fast:,.0f} | {slow / fast:.1f} | {logits.nbytes / rate / 1e3:,.0f}"
                print(f"| {vocab_size:,} | {count} | {name} | {figures} |")


if __name__ == "__main__":
    main()
