"""Comparing with twins, pools with scattered page tables, whole models by kernels. Letters as in `engine.kernels`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from support.engine_driver import Driver

from engine.kernel_backend import KernelBackend

# One rounding of the dtype, relative; results of a sum in another order may differ by a few.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(what: str, actual: torch.Tensor, expected: torch.Tensor, *, roundings: float) -> None:
    """Equal to a number of roundings, relative to the larger of 1 and the value; prints the largest difference."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual.double() - expected.double()).abs()
    worst = float(difference.max()) if difference.numel() else 0.0
    print(f"{what}: largest difference {worst:.3g}")
    allowed = roundings * ROUNDING[actual.dtype] * expected.double().abs().clamp(min=1.0)
    assert bool((difference <= allowed).all()), f"{what}: {worst} apart"


def poisoned_pool(
    lengths: list[int],
    *,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    first_seen: list[int] | None = None,
    page_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer out of three with scattered pages, and page tables `[B, n]` int32.

    Slots of positions `[first_seen[row], lengths[row])` hold normal numbers, all others NaN; entries of a table past
    its row's pages point at a page of NaN.
    """
    per_row = [-(-length // page_size) for length in lengths]
    num_pages = sum(per_row) + 3
    order = torch.randperm(num_pages).tolist()
    poison = order.pop()
    pool = torch.full((num_pages, 3, 2, num_kv_heads, page_size, head_dim), torch.nan)
    tables = torch.full((len(lengths), max(*per_row, 1) + 2), poison, dtype=torch.int32)
    for row, length in enumerate(lengths):
        pages = [order.pop() for _ in range(per_row[row])]
        tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        first = first_seen[row] if first_seen else 0
        for position in range(first, length):
            pool[pages[position // page_size], :, :, :, position % page_size] = torch.randn(
                3, 2, num_kv_heads, head_dim
            )
    return pool.to(device, page_dtype or dtype)[:, 1], tables.to(device)


def with_kernels(directory: Path) -> Driver:
    """A driver whose model computes by kernels."""
    driver = Driver(directory)
    config = driver.model.config
    backend = KernelBackend(group=config.num_heads // config.num_kv_heads, device=driver.model.device)
    object.__setattr__(driver.model.transformer, "backend", backend)
    return driver


def eagerly(work: Callable[[], None]) -> Callable[[], None]:
    """What a graph's capture and replay do, without a graph."""
    work()
    return work
