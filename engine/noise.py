"""Counter-based noise: a uniform number is a pure function of (seed, index).

SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) advances its state by a
constant per draw, so draw `index` of the stream that begins at `s` is `mix(s + (index + 1) * GAMMA)`. Streams of
neighbouring seeds are pulled apart by beginning at `mix(seed)` instead of `seed`. All arithmetic is on int64 modulo
2**64, which every torch device does alike.
"""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_BITS = 48  # of the 64 that a draw has: plenty for one token, and products with a float64 sum stay below the sum


def uniforms(seeds: torch.Tensor, indexes: torch.Tensor) -> torch.Tensor:
    """One number in the open interval (0, 1) per row.

    Args:
        seeds: [R] int64, any value.
        indexes: [R] int64, the draw: here the index of the output token.

    Returns:
        [R] float64, odd multiples of 2**-49.
    """
    state = _mix(seeds) + (indexes + 1) * as_int64(_GAMMA)
    high = _shift_right(_mix(state), 64 - _BITS)
    return (high.to(torch.float64) + 0.5) * 2.0**-_BITS


def as_int64(value: int) -> int:
    """Any whole number folded into the range of int64, modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, a bijection of 64-bit words."""
    bits = (bits ^ _shift_right(bits, 30)) * as_int64(_MULTIPLIER_1)
    bits = (bits ^ _shift_right(bits, 27)) * as_int64(_MULTIPLIER_2)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift: torch's own repeats the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
