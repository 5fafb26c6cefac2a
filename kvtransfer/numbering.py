"""Numbers for offers and grants that no other process life uses: the incarnation's bits above, a counter below."""

from __future__ import annotations

from typing import Final

_COUNTER_BITS: Final = 32
_LIFE_MASK: Final = 0x7FFF_FFFF


def first_number(incarnation: int) -> int:
    """The first number of a process life; it counts up from here. Never 0, and below 2**63."""
    return (incarnation & _LIFE_MASK) << _COUNTER_BITS | 1


def belongs_to(number: int, incarnation: int) -> bool:
    """Whether this process life gave the number out."""
    return number >> _COUNTER_BITS == incarnation & _LIFE_MASK
