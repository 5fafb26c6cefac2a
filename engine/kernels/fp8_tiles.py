"""How an FP8 product is cut into programs: decided by counting bytes and operations, as tuning at start costs minutes.

A product of few rows is bound by reading its weights once: all processors must take part and have enough of them under
way. One of many rows is bound by the matrix units: tiles must be large. `tiles_for` takes, of the tiles that are
compiled ahead, the one with the least time by this count for an H100; an H200 differs in its memory alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

_PROCESSORS = 132
_MEMORY = 3.35e12 / _PROCESSORS  # bytes a second for each of them: its share of the memory,
_CACHE = 5.5e12 / _PROCESSORS  # of the L2 cache, through which each tile's inputs come again,
_RATE = 1.5e15 / _PROCESSORS  # and operations, of instructions for 64 rows and more
_LATENCY_S = 0.8e-6  # of a read from memory
_OVERHEAD_S = 0.4e-6  # of a program: its first loads and its stores, as far as nothing hides them
_SHARED_BYTES = 227 * 1024
SCALED = 128
"""Columns of K that share a scale, and that a program multiplies at once."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """What one program computes, and how.

    Attributes:
        rows, outs: of the output; `outs` divides SCALED, so that a program's columns share their scales.
        warps: of a program.
        stages: blocks of SCALED columns that are in shared memory at once, all but one still on their way.
    """

    rows: int
    outs: int
    warps: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Of the inputs on their way."""
        return self.stages * (self.rows + self.outs) * SCALED


ALL_TILES = (
    Tiles(16, 16, 4, 8),
    Tiles(16, 32, 4, 6),
    Tiles(16, 64, 4, 6),
    Tiles(32, 32, 4, 6),
    Tiles(32, 64, 4, 5),
    Tiles(64, 32, 4, 5),
    Tiles(64, 64, 4, 5),
    Tiles(64, 128, 4, 4),
    Tiles(128, 64, 4, 4),
    Tiles(128, 128, 8, 3),
)


@lru_cache(maxsize=4096)
def tiles_for(num_rows: int, width: int, out: int) -> Tiles:
    """The tiles of `[num_rows, width]` times `[out, width]`; among equals the lowest and widest ones."""
    fitting = [one for one in ALL_TILES if one.rows < 2 * max(num_rows, ALL_TILES[0].rows)]
    return min(fitting, key=lambda one: (round(_time_s(one, num_rows, width, out) * 1e7), one.rows, -one.outs))


def _time_s(tiles: Tiles, num_rows: int, width: int, out: int) -> float:
    programs = -(-num_rows // tiles.rows) * -(-out // tiles.outs)
    each = -(-programs // _PROCESSORS)  # of the busiest processor
    together = min(each, _SHARED_BYTES // tiles.shared_bytes)
    on_the_way = together * (tiles.stages - 1) * tiles.outs * SCALED  # bytes of weights
    inputs = each * (tiles.outs + min(tiles.rows, num_rows)) * width
    weights = each * tiles.outs * width
    rate = _RATE if tiles.rows >= 64 else _RATE / 2
    return max(
        out * width / (_MEMORY * _PROCESSORS),
        inputs / _CACHE,
        weights * _LATENCY_S / on_the_way if num_rows <= tiles.rows else 0.0,
        each * 2 * tiles.rows * tiles.outs * width / rate,
    ) + _OVERHEAD_S * each / together  # fmt: skip
