"""How the contexts of a decode step are shared out among the programs of an attention kernel. Plain integers.

A long context is cut into parts that are attended to on their own and merged (flash-decoding,
https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Where the cuts fall depends on a row's own length alone, never
on its company, so the same sequence gives the same bits in any batch. Only who works on which part depends on the
batch: parts are dealt out in order, by their number of tiles, so a program has at most one part more than its share.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

_NOWHERE = -1


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The work of one decode step for one window. Letters in `engine.kernels`; all tensors int32, one allocation.

    Attributes:
        items: [C, 4]: row, first position, position after the last, and where the part's result goes among partial
            results; -1 there means that the part is its row's only one and goes to the output.
        program_items: [W + 1], program w works on items `[program_items[w], program_items[w + 1])`.
        row_parts: [B, 2], first partial result of each row and how many there are; 0 for an empty row, 1 for a
            row of one part, which has no partial result.
        num_partials: room for partial results that a launch needs.
        tile_tokens: keys that a kernel reads at once.
    """

    items: torch.Tensor
    program_items: torch.Tensor
    row_parts: torch.Tensor
    num_partials: int
    tile_tokens: int


def plan_decode(
    lengths: Many[int],
    *,
    window: int | None,
    num_programs: int,
    device: torch.device,
    tile_tokens: int = 64,
    min_part_tokens: int = 256,
    max_parts: int = 32,
    capacity: int | None = None,
) -> DecodePlan:
    """Cut and share out.

    Args:
        lengths: B context lengths, the new token included; 0 is an empty row.
        window: how many latest tokens a row sees, None for all.
        num_programs: W; per key head, as each program works on one.
        device: for the tensors; copied there at once.
        tile_tokens: a power of two.
        min_part_tokens: a shorter context stays whole; a multiple of `tile_tokens`.
        max_parts: of one row.
        capacity: C to pad to, for a CUDA graph whose shapes and workspace must not change; None is what is needed.

    Raises:
        ValueError: the work needs more than `capacity` items.
    """
    if min_part_tokens % tile_tokens:
        raise ValueError(f"parts of {min_part_tokens} tokens are not whole tiles of {tile_tokens}")
    ends = np.asarray(lengths, dtype=np.int64).reshape(-1)
    firsts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    bases = firsts // tile_tokens * tile_tokens
    spans = ends - bases
    part_tiles = -(-spans // (max_parts * tile_tokens))
    part_tokens = np.maximum(min_part_tokens, part_tiles * tile_tokens)
    counts = -(-spans // part_tokens)

    num_items = int(counts.sum())
    size = num_items if capacity is None else capacity
    if num_items > size:
        raise ValueError(f"{num_items} parts do not fit a plan of {size}")
    rows = np.repeat(np.arange(len(ends)), counts)
    order = np.arange(num_items) - np.repeat(np.cumsum(counts) - counts, counts)  # of each part within its row
    begins = bases[rows] + order * part_tokens[rows]
    stops = np.minimum(begins + part_tokens[rows], ends[rows])
    split = counts[rows] > 1
    places = np.where(split, np.cumsum(split) - 1, _NOWHERE)
    partials = np.where(counts > 1, counts, 0)

    # A part goes to the program in whose share of all tiles it begins.
    part_cost = -(-(stops - begins) // tile_tokens)
    begun = np.cumsum(part_cost) - part_cost
    share = max(1, -(-int(part_cost.sum()) // num_programs))
    program_items = np.searchsorted(begun, np.arange(num_programs + 1) * share)

    flat = np.zeros(4 * size + num_programs + 1 + 2 * len(ends), dtype=np.int32)
    flat[: 4 * num_items] = np.stack((rows, np.maximum(begins, firsts[rows]), stops, places), axis=1).reshape(-1)
    flat[4 * size : 4 * size + num_programs + 1] = program_items
    flat[4 * size + num_programs + 1 :] = np.stack((np.cumsum(partials) - partials, counts), axis=1).reshape(-1)
    packed = torch.from_numpy(flat).to(device)
    items, programs, parts = packed.tensor_split([4 * size, 4 * size + num_programs + 1])
    return DecodePlan(
        items=items.view(size, 4),
        program_items=programs,
        row_parts=parts.view(len(ends), 2),
        num_partials=int(partials.sum()) if capacity is None else capacity,
        tile_tokens=tile_tokens,
    )
