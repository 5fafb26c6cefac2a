"""Row by row: the root-mean-square norm; norm, rotation and page write in one; activation.

In plain torch these are a dozen passes over the step's tokens, each with a launch of its own. Here everything is
computed in float32 between one reading and one writing. Threads share out the tokens.

Letters: T tokens, S numbers of a row, Hq query heads, Hkv key/value heads, D head_dim, R = D / 2, P page_size.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import carray

from engine.cpu.jit import kernel, narrow, num_threads, pointer, thread_num, widen
from engine.cpu.vectors import gate, spread, turn

WIDE = 64
"""Numbers at a time."""


@functools.cache
def rms_norm_rows(size: int, eps: float, *, adds: bool) -> Any:
    """The kernel for rows of S numbers; where it adds, of the sums with as many others, which become the sums.

    Words: addresses of rows `[T, S]` bf16, weight `[S]` bf16 and output `[T, S]` bf16; T; numbers from row to row;
    address of the others `[T, S]` bf16.
    """
    epsilon = np.float32(eps)

    def run(words: Any) -> None:
        num_rows, stride = words[3], words[4]
        weight = carray(pointer(words[1]), size, np.uint16)
        members, member = num_threads(), thread_num()
        for row in range(num_rows * member // members, num_rows * (member + 1) // members):
            source = carray(pointer(words[0] + 2 * row * stride), size, np.uint16)
            target = carray(pointer(words[2] + 2 * row * size), size, np.uint16)
            if adds:
                others = carray(pointer(words[5] + 2 * row * size), size, np.uint16)
                for at in range(size):
                    others[at] = narrow(widen(others[at]) + widen(source[at]))
                source = others
            total = np.float32(0)
            for at in range(size):
                total += widen(source[at]) * widen(source[at])
            scale = np.float32(1) / np.float32(math.sqrt(total / np.float32(size) + epsilon))
            for at in range(size):
                target[at] = narrow(widen(source[at]) * scale * widen(weight[at]))

    return kernel(run)


@functools.cache
def rotate_rows(head_dim: int, page_size: int, eps: float | None) -> Any:
    """The kernel for one shape; heads are normed before they turn, unless `eps` is None.

    Words: addresses of qkv `[T, (Hq + 2 * Hkv) * D]` bf16, of cosines and sines `[T, R]` float32, of the norms' weights
    `[D]` bf16 (queries', then keys'), of page ids and offsets `[T]` int64 and of the layer's first page; T; Hq; Hkv;
    numbers from token to token of qkv; numbers from page to page. Queries and keys turn in place; keys and values are
    also written to their slots, in pages of order `page-major-pairs-1`.
    """
    half, head_bytes = head_dim // 2, 2 * page_size * head_dim
    normed, epsilon = int(eps is not None), np.float32(eps or 0.0)

    def run(words: Any) -> None:
        num_tokens, num_heads, num_kv_heads, stride, page_stride = words[8], words[9], words[10], words[11], words[12]
        page_ids = carray(pointer(words[5]), num_tokens, np.int64)
        offsets = carray(pointer(words[6]), num_tokens, np.int64)
        members, member = num_threads(), thread_num()
        for token in range(num_tokens * member // members, num_tokens * (member + 1) // members):
            cosines, sines = words[1] + 4 * token * half, words[2] + 4 * token * half
            page, offset = words[7] + 2 * page_ids[token] * page_stride, offsets[token]
            for head in range(num_heads + num_kv_heads):
                place = words[0] + 2 * (token * stride + head * head_dim)
                turn(place, words[3] if head < num_heads else words[4], cosines, sines, head_dim, epsilon, normed)
                if head >= num_heads:
                    pairs = carray(pointer(place), half, np.uint32)
                    keys = carray(pointer(page + (head - num_heads) * head_bytes), (half, page_size), np.uint32)
                    for pair in range(half):
                        keys[pair, offset] = pairs[pair]
            for head in range(num_kv_heads):
                place = words[0] + 2 * (token * stride + (num_heads + num_kv_heads + head) * head_dim)
                pair = page + (num_kv_heads + head) * head_bytes + 4 * (offset // 2) * head_dim
                spread(place, pair, head_dim, offset % 2)

    return kernel(run)


@functools.cache
def gated_silu_rows(size: int) -> Any:
    """The kernel for rows of 2 * S numbers, gates first.

    Words: addresses of rows `[T, 2 * S]` bf16, contiguous, and of output `[T, S]` bf16; T.
    """
    run_size = math.gcd(size, WIDE)

    def run(words: Any) -> None:
        members, member = num_threads(), thread_num()
        for row in range(words[2] * member // members, words[2] * (member + 1) // members):
            source, target = words[0] + 4 * row * size, words[1] + 2 * row * size
            for at in range(0, size, run_size):
                gate(source + 2 * at, source + 2 * (size + at), target + 2 * at, run_size)

    return kernel(run)
