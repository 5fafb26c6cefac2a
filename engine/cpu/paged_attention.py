"""Paged attention of single tokens and chunks alike, straight from pages that hold pairs side by side.

Work is dealt out in runs: one key head, and up to some `RUN_ROWS` rows of consecutive tokens of one sequence, which go
over the tiles of the pages together, so that keys and values come from memory once for all of them. A single token is a
run of its own. Threads claim runs one after another, the longest first; who computes what changes no bit
(`engine.cpu.attention_tile`).

Letters: T tokens, Hq query heads, Hkv key/value heads, G query heads per key head, D head_dim, P page_size, N pages.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from engine.cpu.attention_runs import RUN_WORDS, UNLIMITED, PagedRows
from engine.cpu.attention_tile import (
    DESK_WORDS,
    END_GROUP,
    FIRST_GROUP,
    GROUPS,
    KEYS,
    KEYS_AHEAD,
    LOWEST,
    ROWS,
    SLOTS,
    START,
    VALUES,
    WEIGHTS,
    attend_tile,
)
from engine.cpu.jit import Team, claim, kernel, narrow, pointer, thread_num
from engine.cpu.tiles import LANES, VECTOR_BYTES, has_pair_products

RUN_ROWS = 384
"""Rows that share one reading of keys and values: enough to hide it behind the products, few for a second cache."""
_RUNS_PER_THREAD = 4
"""Fewer would leave threads idle at the end; then runs get shorter, down to a quarter."""

_MOST = max(ROWS)
_STATE_BYTES = VECTOR_BYTES * (1 + _MOST)


@functools.cache
def _offsets(group: int, head_dim: int) -> tuple[int, ...]:
    """Where in a thread's memory: desk, query addresses, bounds, weights, states, sums, values at edges; its size."""
    num_rows = max(RUN_ROWS, group) + _MOST
    sizes = (
        8 * DESK_WORDS,
        8 * num_rows,
        8 * num_rows,
        2 * _MOST * SLOTS,
        _STATE_BYTES * (num_rows // _MOST + len(ROWS)),
        4 * num_rows * head_dim,
        2 * 2 * LANES * head_dim,
    )
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + -(-size // VECTOR_BYTES) * VECTOR_BYTES)
    return tuple(ends)


@njit
def _locate(
    places: Any, run: Any, head: int, num_heads: int, tile: int, window: int, layer: int, page_stride: int,
    head_dim: int, page_size: int,
) -> None:  # fmt: skip
    """Put the addresses of a tile's groups to `places`; of groups that no row sees, those of the nearest seen one."""
    table = carray(pointer(run[3]), UNLIMITED, np.int64)
    first, last = max(0, run[2] + 1 - window) // LANES, (run[2] + run[1] - 1) // LANES
    head_bytes = 2 * page_size * head_dim
    for at in range(GROUPS):
        position = LANES * min(max(tile * GROUPS + at, first), last)
        page = layer + 2 * table[position // page_size] * page_stride
        slot = position % page_size
        places[KEYS + at] = page + head * head_bytes + 4 * slot
        places[VALUES + at] = page + (num_heads + head) * head_bytes + 2 * head_dim * slot


@njit
def _rows_at_once(num_left: int) -> int:
    """Of `ROWS`; 3 or 5 rows are computed as 4 or 6, the last of them again."""
    return 6 if num_left > 4 else 4 if num_left > 2 else num_left


@functools.cache
def paged_attention(group: int, head_dim: int, page_size: int, native: int) -> Any:  # noqa: C901, PLR0915 - as below
    """The kernel for one shape; P and D are multiples of 16.

    Words: addresses of queries `[T, Hq, D]` bf16 (tokens strided), of output `[T, Hq, D]` bf16, of the layer's first
    page; numbers from token to token of queries and from page to page; Hkv; window; address of runs `[n, RUN_WORDS]`
    int64; n; addresses of a counter that is 0 and of the threads' memory; bytes of it per thread.
    """
    _, to_queries, to_bounds, to_weights, to_states, to_sums, to_values, _ = _offsets(group, head_dim)

    def run(words: Any) -> None:  # noqa: C901, PLR0912, PLR0915 - one function, or numba could not keep it on disk
        layer, query_stride, page_stride, num_heads, window = words[2], words[3], words[4], words[5], words[6]
        num_items = words[8] * num_heads
        memory = words[10] + thread_num() * words[11]
        desk = carray(pointer(memory), DESK_WORDS, np.int64)
        ahead = desk[KEYS_AHEAD:]
        queries, bounds = memory + to_queries, memory + to_bounds
        states, sums = memory + to_states, memory + to_sums
        desk[WEIGHTS] = memory + to_weights
        runs = carray(pointer(words[7]), (words[8], RUN_WORDS), np.int64)
        item = claim(words[9])
        if item < num_items:
            one = runs[item // num_heads]
            tile = max(0, one[2] + 1 - window) // SLOTS
            _locate(ahead, one, item % num_heads, num_heads, tile, window, layer, page_stride, head_dim, page_size)
        while item < num_items:
            following = claim(words[9])
            one, head = runs[item // num_heads], item % num_heads
            token, count, position = one[0], one[1], one[2]
            num_rows = count * group
            first, end = max(0, position + 1 - window), position + count
            query_at = carray(pointer(queries), num_rows + _MOST, np.int64)
            sights = carray(pointer(bounds), (num_rows + _MOST, 2), np.int32)
            for at in range(num_rows + _MOST):
                row = min(at, num_rows - 1)
                seen = position + row // group + 1
                query_at[at] = words[0] + 2 * (
                    (token + row // group) * query_stride + (head * group + row % group) * head_dim
                )
                sights[at, 0] = max(0, seen - window)
                sights[at, 1] = seen
            num_states = num_rows // _MOST + len(ROWS)
            state = carray(pointer(states), (num_states, 1 + _MOST, LANES), np.float32)
            for at in range(num_states):
                state[at, 0] = LOWEST
                state[at, 1:] = 0
            totals = carray(pointer(sums), (num_rows + _MOST, head_dim), np.float32)
            totals[:] = 0
            for tile in range(first // SLOTS, (end + SLOTS - 1) // SLOTS):
                for at in range(2 * GROUPS):
                    desk[at] = ahead[at]
                if (tile + 1) * SLOTS < end:
                    _locate(
                        ahead, one, head, num_heads, tile + 1, window, layer, page_stride, head_dim, page_size
                    )  # fmt: skip
                elif following < num_items:
                    other = runs[following // num_heads]
                    _locate(
                        ahead, other, following % num_heads, num_heads, max(0, other[2] + 1 - window) // SLOTS, window,
                        layer, page_stride, head_dim, page_size,
                    )  # fmt: skip
                start = tile * SLOTS
                desk[START] = start
                desk[FIRST_GROUP] = max(0, first - start) // LANES
                desk[END_GROUP] = min(GROUPS, (end - start + LANES - 1) // LANES)
                for at in range(desk[FIRST_GROUP], desk[END_GROUP]):
                    slot = start + at * LANES
                    if slot < first or slot + LANES > end:  # hidden values may be NaN, which no weight of 0 undoes
                        place = memory + to_values + (0 if slot < first else 2 * LANES * head_dim)
                        values = carray(pointer(desk[VALUES + at]), (LANES // 2, head_dim), np.uint32)
                        kept = carray(pointer(place), (LANES // 2, head_dim), np.uint32)
                        for pair in range(LANES // 2):
                            place_of_pair = slot + 2 * pair
                            keep = np.uint32(0xFFFF if first <= place_of_pair < end else 0) | np.uint32(
                                0xFFFF0000 if first <= place_of_pair + 1 < end else 0
                            )
                            for d in range(head_dim):
                                kept[pair, d] = values[pair, d] & keep
                        desk[VALUES + at] = place
                at = num_done = 0
                while at < num_rows:
                    size = _rows_at_once(num_rows - at)
                    high_first = position + at // group + 1
                    high_last = position + min(at + size - 1, num_rows - 1) // group + 1
                    if high_last > start and high_first - window < start + SLOTS:
                        edge = 1 if high_first < start + SLOTS or high_last - window > start else 0
                        query, bound = queries + 8 * at, bounds + 8 * at
                        mine, total = states + num_done * _STATE_BYTES, sums + 4 * at * head_dim
                        if size == 6:
                            if at == 0:
                                attend_tile(memory, query, bound, mine, total, edge, 6, head_dim, page_size, native, 1)
                            else:
                                attend_tile(memory, query, bound, mine, total, edge, 6, head_dim, page_size, native, 0)
                        elif size == 4:
                            attend_tile(memory, query, bound, mine, total, edge, 4, head_dim, page_size, native, 1)
                        elif size == 2:
                            attend_tile(memory, query, bound, mine, total, edge, 2, head_dim, page_size, native, 1)
                        else:
                            attend_tile(memory, query, bound, mine, total, edge, 1, head_dim, page_size, native, 1)
                    at += size
                    num_done += 1
            at = num_done = 0
            while at < num_rows:
                size = _rows_at_once(num_rows - at)
                for row in range(at, min(at + size, num_rows)):
                    mass = np.float32(0)
                    for lane in range(LANES):
                        mass += state[num_done, 1 + row - at, lane]
                    share = np.float32(1) / mass
                    target_head = (token + row // group) * num_heads * group + head * group + row % group
                    target = carray(pointer(words[1] + 2 * target_head * head_dim), head_dim, np.uint16)
                    for d in range(head_dim):
                        target[d] = narrow(totals[row, d] * share + np.float32(0))  # no sign of 0 from hidden slots
                at += size
                num_done += 1
            item = following

    return kernel(run, exact=True)


class PagedAttention:
    """Launches the kernel on torch's own threads. One step at a time: it keeps the threads' memory.

    Attributes:
        native: whether the processor has products of pairs.
    """

    def __init__(self, team: Team) -> None:
        self._team = team
        self.native = has_pair_products()
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._counter = np.zeros(1, dtype=np.int64)

    def compile(self, group: int, head_dim: int, page_size: int) -> None:
        """Have the kernel for this shape ready."""
        paged_attention(group, head_dim, page_size, int(self.native))

    def attend(self, queries: torch.Tensor, layer: torch.Tensor, rows: PagedRows) -> torch.Tensor:
        """Causal attention of all the step's tokens.

        Args:
            queries: [T, Hq, D] bf16, rotated, each token's heads end to end.
            layer: [N, 2, Hkv, P, D] bf16 by its size, one layer of a pool of order `page-major-pairs-1`; what no row
                sees may be anything, NaN included.
            rows: that the T tokens are.

        Returns:
            [T, Hq * D], new memory. A token's bits depend on its own sequence up to it alone.
        """
        num_tokens, num_heads, head_dim = queries.shape
        num_kv_heads, page_size = layer.shape[2:4]
        group, threads = num_heads // num_kv_heads, torch.get_num_threads()
        if queries.stride(1) != head_dim or queries.stride(2) != 1:
            queries = queries.contiguous()
        output = torch.empty(num_tokens, num_heads * head_dim, dtype=queries.dtype)
        run_rows = min(RUN_ROWS, max(RUN_ROWS // 4, num_tokens * num_heads // (_RUNS_PER_THREAD * threads)))
        runs = rows.runs(max(1, run_rows // group))
        size = _offsets(group, head_dim)[-1]
        if self._memory.numel() < threads * size + VECTOR_BYTES:
            self._memory = torch.empty(threads * size + VECTOR_BYTES, dtype=torch.uint8)
        self._counter[0] = 0
        words = (
            queries.data_ptr(),
            output.data_ptr(),
            layer.data_ptr(),
            queries.stride(0),
            layer.stride(0),
            num_kv_heads,
            rows.window or UNLIMITED,
            runs.ctypes.data,
            len(runs),
            self._counter.ctypes.data,
            -(-self._memory.data_ptr() // VECTOR_BYTES) * VECTOR_BYTES,
            size,
        )
        self._team.run(paged_attention(group, head_dim, page_size, int(self.native)), words)
        return output
