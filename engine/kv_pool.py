"""The tensor of all pages: its shape, its size, and how it is laid over memory that somebody else owns.

One page is one contiguous run of bytes, and so is one head of one layer in it. The tensor has the shape of
`fleet.types.PAGE_MAJOR` whatever the order of axes; the backend, which chooses that, knows what is where.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from engine.model_config import ModelConfig


def page_shape(config: ModelConfig, page_size: int) -> tuple[int, int, int, int, int]:
    """`(layers, 2, kv_heads, page_size, head_dim)`."""
    return (config.num_layers, 2, config.num_kv_heads, page_size, config.head_dim)


def kv_page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page."""
    return math.prod(page_shape(config, page_size)) * dtype.itemsize


def pool_over(buffer: Any, *, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype) -> torch.Tensor:
    """The pool tensor over a caller's memory (shared memory, an `mmap`, a GPU's), which must outlive it.

    Args:
        buffer: anything with a writable buffer of at least `num_pages * kv_page_bytes(...)` bytes, or as many bytes
            on a CUDA device (`__cuda_array_interface__`).
        config: of the model.
        num_pages: in the pool.
        page_size: tokens per page.
        dtype: of keys and values.

    Raises:
        ValueError: the buffer is too small or read-only.
    """
    shape = (num_pages, *page_shape(config, page_size))
    if hasattr(buffer, "__cuda_array_interface__"):
        # Torch takes the pointer as it is; which device it belongs to is in the pointer itself.
        return torch.as_tensor(buffer, device="cuda").view(dtype)[: math.prod(shape)].view(shape)
    view = memoryview(buffer)
    if view.readonly:
        raise ValueError("the pool's memory is read-only")
    return torch.frombuffer(view, dtype=dtype, count=math.prod(shape)).view(shape)


def allocate_pool(
    *, config: ModelConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A pool in memory of its own, uninitialised: a slot is always written before it is read."""
    return torch.empty((num_pages, *page_shape(config, page_size)), dtype=dtype, device=device)
