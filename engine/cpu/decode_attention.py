"""Paged attention of single new tokens, straight from the pages: keys and values are read once and copied nowhere.

A thread takes a share of the key heads of every row, so rows of any length weigh alike on all threads; only where
threads outnumber heads are rows dealt out too. It walks a row's pages in order with an online softmax (arXiv
1805.02867) in float32: in a page its heads lie end to end, and all G query heads of a key head are served by one
reading.

Letters: B rows, Hkv key/value heads, G query heads per key head, D head_dim, P page_size, N pages, L layers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import carray

from engine.cpu.jit import kernel, narrow, num_threads, pointer, thread_num, widen
from engine.cpu.vectors import mix, score, weigh

FOLD = 4
"""Slots whose values are added to the sums in one reading of these."""

WORDS = 12
"""Of the argument array, in order: addresses of queries, page tables, starts, firsts, ends, tokens, output and of the
layer's first page; B; Hkv; bytes from page to page over 2; bytes from token to token of queries over 2."""


@functools.cache
def decode_attention(group: int, head_dim: int, page_size: int) -> Any:  # noqa: C901, PLR0915 - as below
    """The kernel for one shape.

    Reads queries `[T, Hq, D]` bf16 (tokens strided), the layer's pages `[N, 2, Hkv, P, D]` bf16 (pages strided), flat
    page tables int64, and of each row: where its table starts, its first visible slot, the end of its slots, its token
    among T (all int64 `[B]`). Writes `[T, Hq, D]` bf16 for those tokens.
    """
    scale = np.float32(1 / math.sqrt(head_dim))
    slot_bytes = 2 * head_dim
    run_bytes = page_size * slot_bytes  # of one head's keys in one page
    head_bytes = 4 * group * head_dim  # of one key head's queries

    def run(words: Any) -> None:  # noqa: C901, PLR0912, PLR0915 - one function, or numba could not keep it on disk
        num_rows, num_heads, page_stride, query_stride = words[8], words[9], words[10], words[11]
        tables = carray(pointer(words[1]), 1 << 40, np.int64)
        starts = carray(pointer(words[2]), num_rows, np.int64)
        firsts = carray(pointer(words[3]), num_rows, np.int64)
        ends = carray(pointer(words[4]), num_rows, np.int64)
        tokens = carray(pointer(words[5]), num_rows, np.int64)
        members, member = num_threads(), thread_num()
        head_parts = min(members, num_heads)
        row_parts = members // head_parts
        head_part, row_part = member % head_parts, member // head_parts
        first_head, end_head = num_heads * head_part // head_parts, num_heads * (head_part + 1) // head_parts
        num_mine = end_head - first_head
        queries = np.empty((num_mine, group, head_dim), np.float32)
        sums = np.empty((num_mine, group, head_dim), np.float32)
        best = np.empty((num_mine, group), np.float32)
        mass = np.empty((num_mine, group), np.float32)
        scores = np.empty((group, page_size), np.float32)
        query_at, total_at = np.int64(queries.ctypes.data), np.int64(sums.ctypes.data)
        score_at = np.int64(scores.ctypes.data)
        shape = (num_mine, group, head_dim)
        for row in range(row_part, num_rows if row_part < row_parts else 0, row_parts):
            first, end, start, token = firsts[row], ends[row], starts[row], tokens[row]
            before = first_head * group * head_dim  # of the token's other heads
            source = carray(pointer(words[0] + 2 * (token * query_stride + before)), shape, np.uint16)
            target = carray(pointer(words[6] + 2 * (token * num_heads * group * head_dim + before)), shape, np.uint16)
            for head in range(num_mine):
                for g in range(group):
                    best[head, g] = -np.inf
                    mass[head, g] = 0
                    for d in range(head_dim):
                        queries[head, g, d] = widen(source[head, g, d]) * scale
                        sums[head, g, d] = 0
            for at in range((end + page_size - 1) // page_size):
                page = words[7] + 2 * tables[start + at] * page_stride + first_head * run_bytes
                low, high = max(0, first - at * page_size), min(page_size, end - at * page_size)
                for head in range(num_mine):
                    if high - low < page_size:
                        scores[:] = -np.inf
                    key = page + head * run_bytes
                    for slot in range(low, high):
                        score(
                            query_at + head * head_bytes, key + slot * slot_bytes, score_at + 4 * slot,
                            group, head_dim, page_size,
                        )  # fmt: skip
                    for g in range(group):
                        top = best[head, g]
                        for slot in range(low, high):
                            top = max(top, scores[g, slot])
                        if top > best[head, g]:
                            shrink = np.float32(math.exp(best[head, g] - top))
                            best[head, g] = top
                            mass[head, g] *= shrink
                            for d in range(head_dim):
                                sums[head, g, d] *= shrink
                        mass[head, g] += weigh(score_at + 4 * g * page_size, top, page_size)
                    sum_at, value = total_at + head * head_bytes, page + (num_heads + head) * run_bytes
                    slot = low
                    while slot + FOLD <= high:
                        mix(sum_at, value + slot * slot_bytes, score_at + 4 * slot, group, head_dim, page_size, FOLD)
                        slot += FOLD
                    while slot < high:
                        mix(sum_at, value + slot * slot_bytes, score_at + 4 * slot, group, head_dim, page_size, 1)
                        slot += 1
            for head in range(num_mine):
                for g in range(group):
                    share = np.float32(1) / mass[head, g]
                    for d in range(head_dim):
                        target[head, g, d] = narrow(sums[head, g, d] * share)

    return kernel(run)
