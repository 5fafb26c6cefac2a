"""Copies between host and device that nobody waits for.

Only from page-locked memory does a copy run behind the work queued before it. Torch keeps such memory and reuses it
when the copies that read or write it are done, so each step takes fresh tensors and overwrites nothing in use.
"""

from __future__ import annotations

import functools

import numpy as np
import torch


def to_device(values: np.ndarray | torch.Tensor, target: torch.Tensor) -> None:
    """Queue a copy of host memory into `target`, of the same shape and dtype. `values` may be dropped at once."""
    source = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


def to_host(source: torch.Tensor) -> torch.Tensor:
    """Queue a copy for the host, which may read it once an event recorded afterwards has come."""
    if not source.is_cuda:
        return source.clone()
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=True).copy_(source, non_blocking=True)


def to_device_beside(values: np.ndarray, target: torch.Tensor) -> None:
    """Like `to_device`, beside the work queued before it rather than behind; what is queued from now on waits for it.

    Requires: nothing that reads or writes `target` is queued or runs.
    """
    if not target.is_cuda:
        to_device(values, target)
        return
    stream = _copy_stream(target.device)
    with torch.cuda.stream(stream):
        to_device(values, target)
    torch.cuda.current_stream(target.device).wait_stream(stream)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
