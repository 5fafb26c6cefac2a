"""`triton.jit` with a type, and the sizes that every launcher needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function with Triton at its first launch, or interpret it where `TRITON_INTERPRET=1` was set.

    Which of both is decided here, when the module is imported. Triton has no type stubs, so the result is `Any`:
    launched as `function[grid](...)` or called from another kernel.
    """
    return triton.jit(function)


def varying(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """A `kernel` of whose integer arguments these change from launch to launch: it is not compiled anew for 1 or 16."""
    return lambda function: triton.jit(function, do_not_specialize=names)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`: what a tile's extent must be."""
    return 1 << max(size - 1, 0).bit_length()


def tiles(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def layer_strides(layer: torch.Tensor) -> tuple[int, int, int]:
    """Elements between pages, between keys and values, and between heads of a `layer`.

    Raises:
        ValueError: `layer` is not `[N, 2, Hkv, P, D]` with contiguous heads.
    """
    if layer.dim() != 5 or layer.shape[1] != 2 or layer.stride(4) != 1 or layer.stride(3) != layer.shape[4]:
        raise ValueError(f"not a layer of the pool: shape {list(layer.shape)}, strides {list(layer.stride())}")
    return layer.stride(0), layer.stride(1), layer.stride(2)
