"""Products of a decoder's bfloat16 matrices by our own kernel: weights in panels, read once, each number in one order.

A thread reads its panels (`engine.cpu.panels`) from end to end. Up to 12 tokens are multiplied with a block of a panel
at a time (`engine.cpu.blocks`), so that few tokens cost what reading the weights costs, and many what the products do.

Each number of the result is one float32 sum over all inputs in their order, kept in a register or put aside exactly. So
a token's result is the same to the last bit whatever tokens stand beside it, and whichever thread computes it.

Letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch.nn import functional

from engine.backend import Linear
from engine.cpu.blocks import ROWS, add_block, expand_block
from engine.cpu.jit import Team, claim, kernel, narrow, num_threads, pointer, thread_num, widen
from engine.cpu.packed import Packed
from engine.cpu.panels import (
    BLOCK_RECORDS,
    EIGHT_BITS,
    PANEL,
    PLAIN,
    RECORD_BYTES,
    RECORD_WEIGHTS,
    TWELVE_BITS,
    pack,
    pack_int8,
)
from engine.cpu.tiles import PAIR_BYTES, has_pair_products

_BLOCK_ROWS = 96
_FEW_RECORDS = 32
"""Of a block for up to 12 tokens; two of them, and two of `BLOCK_RECORDS` for more, lie in a core's first cache."""
_FEW_AHEAD, _MANY_AHEAD = 96, 128
"""Records from those expanded to those asked for: memory answers within the time of so many."""
_CLAIMING_TOKENS = 64
"""From so many on threads claim panels as they go, so that one that loses its core for a while holds up nobody. Fewer
are over before it would come back, and each thread reads faster when all its panels lie side by side."""
_CLAIMED = 4
"""Panels at once: fewer, and neighbouring lines of the result are written by two cores, a tenth slower."""
_LINE = 64
_PLAIN_BYTES = RECORD_BYTES[PLAIN]
_TABLES = ("lowest", "exceptions", "starts", "scales")


class Products:
    """Makes products of packed matrices, on torch's own threads, one at a time: they share a counter.

    Raises NoKernels where those threads cannot be had.

    Attributes:
        layout: names what `pack` makes of a matrix; equal layouts make the same arrays of it, in any version of ours.
    """

    layout = "panels 2"

    def __init__(self, *, native: bool | None = None) -> None:
        """`native`: see `engine.cpu.tiles.has_pair_products`, which None asks."""
        self._team = Team()
        self._native = has_pair_products() if native is None else native
        self._counter = np.zeros(1, dtype=np.int64)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """The product of a bf16 matrix `[N, K]`, copied; bf16 `[M, K]` -> `[M, N]`, rounded to nearest even."""
        return self.product(self.pack(weight), bias)

    def pack(self, weight: torch.Tensor, *, rounded: bool = False) -> Packed:
        """A bf16 matrix `[N, K]` in panels, copied; `rounded` to 8 bits, or as it is."""
        return pack_int8(weight) if rounded else pack(weight, self._team)

    def product(self, packed: Packed, bias: torch.Tensor | None) -> Linear:
        """The product of what `pack` made, here or in another process."""
        num_outputs, num_inputs = packed.shape
        compiled = panel_products(packed.form, self._native)
        arrays = packed.arrays
        tables = [arrays[name].data_ptr() if name in arrays else 0 for name in _TABLES]

        def multiply(hidden: torch.Tensor) -> torch.Tensor:
            if num_inputs % 2:
                hidden = functional.pad(hidden, (0, 1))
            elif hidden.stride(1) != 1:
                hidden = hidden.contiguous()
            num_tokens = hidden.shape[0]
            out = torch.empty(num_tokens, num_outputs, dtype=hidden.dtype)
            words = (
                hidden.data_ptr(),
                arrays["panels"].data_ptr(),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                num_tokens,
                num_outputs,
                (num_inputs + 1) // 2,
                2 * hidden.stride(0),
                *tables,
                self._counter.ctypes.data,
            )
            self._counter[0] = 0
            # In the time of a simple operation: 16 weights are read, or multiplied with 16 tokens.
            numbers = num_inputs * num_outputs * (16 + num_tokens) // 256
            self._team.run(compiled, words, numbers)
            return out

        return multiply


@njit
def _add_bias(sums: Any, num_rows: int, bias: int, columns: int) -> None:
    """That at an address."""
    numbers = carray(pointer(bias), columns, np.uint16)
    for at in range(num_rows):
        for column in range(columns):
            sums[at, column] += widen(numbers[column])


@njit
def _scale(sums: Any, num_rows: int, scales: int, columns: int) -> None:
    """By those at an address."""
    numbers = carray(pointer(scales), columns, np.float32)
    for at in range(num_rows):
        for column in range(columns):
            sums[at, column] *= numbers[column]


@njit
def _end_sums(sums: Any, num_rows: int, out: int, num_outputs: int, columns: int) -> None:
    """Rounded, to the panel's columns of rows that begin at an address."""
    for at in range(num_rows):
        numbers = carray(pointer(out + 2 * at * num_outputs), columns, np.uint16)
        for column in range(columns):
            numbers[column] = narrow(sums[at, column])


@njit
def _put_exceptions(exceptions: Any, at: int, end: int, block: int, first_pair: int, pairs: int) -> int:
    """Into an expanded block, those that are its; returns where those of the next begin."""
    weights = carray(pointer(block), RECORD_WEIGHTS * pairs, np.uint16)
    while at < end:
        place = (exceptions[at] >> 16) - RECORD_WEIGHTS * first_pair
        if place >= RECORD_WEIGHTS * pairs:
            break
        weights[place] = exceptions[at] & 0xFFFF
        at += 1
    return at


@functools.cache
def panel_products(form: str, native: bool) -> Any:  # noqa: C901, PLR0915 - as below
    """The kernel for matrices of a form.

    Words: addresses of tokens `[M, K]` bf16, of panels, of a bias `[N]` bf16 or 0, of the result `[M, N]` bf16; M; N;
    pairs of K; bytes from token to token; addresses of `lowest`, `exceptions`, `starts` and `scales`, or 0 (see
    `engine.cpu.panels`); address of a counter that is 0.
    """
    instruction = int(native)
    compact, whole = form == TWELVE_BITS, form == EIGHT_BITS
    expands = form != PLAIN
    record_bytes = RECORD_BYTES[form]

    def run(words: Any) -> None:  # noqa: C901, PLR0915 - one function: what it hands on from block to block is all it knows
        num_tokens, num_outputs, num_pairs, row_bytes = words[4], words[5], words[6], words[7]
        num_panels = (num_outputs + PANEL - 1) // PANEL
        num_row_blocks = (num_tokens + _BLOCK_ROWS - 1) // _BLOCK_ROWS
        num_items = num_panels * num_row_blocks
        few = num_tokens <= ROWS
        block_pairs = min(num_pairs, _FEW_RECORDS if few else BLOCK_RECORDS)
        to_ahead = record_bytes * (_FEW_AHEAD if few else _MANY_AHEAD)
        lowest = carray(pointer(words[8]), num_panels, np.int64)
        starts = carray(pointer(words[10]), num_panels + 1, np.int64)
        exceptions = carray(pointer(words[9]), starts[num_panels] if compact else 0, np.int64)
        sums = np.empty((_BLOCK_ROWS, PANEL), np.float32)
        scratch = np.empty(2 * block_pairs * RECORD_WEIGHTS + _LINE if expands else 1, np.uint16)
        block = (np.int64(scratch.ctypes.data) + _LINE - 1) // _LINE * _LINE
        other = block + _PLAIN_BYTES * block_pairs
        members, member = num_threads(), thread_num()
        is_dealt = num_tokens >= _CLAIMING_TOKENS
        item = _CLAIMED * claim(words[12]) if is_dealt else num_items * member // members
        end = num_items if is_dealt else num_items * (member + 1) // members
        if expands and item < end:
            panel = item % num_panels
            exponent = lowest[panel] if compact else 0
            expand_block(words[1] + record_bytes * num_pairs * panel, block_pairs, exponent, block, form)
        while item < end:
            following = item + 1
            if is_dealt and following % _CLAIMED == 0:
                following = _CLAIMED * claim(words[12])
            row_block, panel = item // num_panels, item % num_panels
            next_panel = following % num_panels if following < end else panel
            first = num_tokens * row_block // num_row_blocks
            num_rows = num_tokens * (row_block + 1) // num_row_blocks - first
            passes = (num_rows + ROWS - 1) // ROWS
            columns = min(PANEL, num_outputs - panel * PANEL)
            out = words[3] + 2 * (first * num_outputs + panel * PANEL)
            is_biased = words[2] != 0 and not whole
            is_direct = columns == PANEL and not whole
            if is_biased:
                sums[:num_rows] = 0
                _add_bias(sums, num_rows, words[2] + 2 * panel * PANEL, columns)
            exception = starts[panel] if compact else 0
            for first_pair in range(0, num_pairs, block_pairs):
                pairs = min(block_pairs, num_pairs - first_pair)
                last = first_pair + pairs == num_pairs
                next_pair = num_pairs * (next_panel if last else panel) + (0 if last else first_pair + pairs)
                source = words[1] + record_bytes * next_pair
                exponent = 0
                if compact:
                    exponent = lowest[next_panel if last else panel]
                    exception = _put_exceptions(exceptions, exception, starts[panel + 1], block, first_pair, pairs)
                if not expands:
                    block = words[1] + record_bytes * (num_pairs * panel + first_pair)
                for turn in range(passes):
                    top = num_rows * turn // passes
                    count = num_rows * (turn + 1) // passes - top
                    row = words[0] + (first + top) * row_bytes + PAIR_BYTES * first_pair
                    mine = np.int64(sums.ctypes.data) + 4 * PANEL * top
                    begins = np.int64(first_pair == 0 and not is_biased)
                    place = out + 2 * top * num_outputs if last and is_direct else 0
                    # One pass asks for all of what follows, the first two of several for every other line each.
                    line = source + to_ahead + _LINE * (turn % 2)
                    more = line + _LINE if passes == 1 else line
                    if turn == 0:
                        add_block(
                            count, row, row_bytes, block, pairs, mine, begins, place, 2 * num_outputs, source, exponent,
                            other, line, more, form, 1, instruction,
                        )  # fmt: skip
                    else:
                        add_block(
                            count, row, row_bytes, block, pairs, mine, begins, place, 2 * num_outputs, source, exponent,
                            other, line, more, form, 0, instruction,
                        )  # fmt: skip
                if expands:
                    if last and pairs < block_pairs:  # it has not seen to all of the next panel's first block
                        rest, target = source + record_bytes * pairs, other + _PLAIN_BYTES * pairs
                        expand_block(rest, block_pairs - pairs, exponent, target, form)
                    block, other = other, block
            if whole:
                _scale(sums, num_rows, words[11] + 4 * panel * PANEL, columns)
                if words[2]:
                    _add_bias(sums, num_rows, words[2] + 2 * panel * PANEL, columns)
            if not is_direct:
                _end_sums(sums, num_rows, out, num_outputs, columns)
            item = following

    return kernel(run)
