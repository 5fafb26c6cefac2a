"""Products of a decoder's bfloat16 matrices by our own kernel: weights in panels, read once, each number in one order.

A matrix `[N, K]` is packed into panels of 32 outputs, in which the 32 pairs of each two inputs lie side by side: a
thread reads its panels from end to end. Up to 12 tokens are multiplied with a panel at a time; the next panel is
asked for meanwhile, so that few tokens cost what reading the weights costs, and many what the products cost.

Each number of the result is one float32 sum over all inputs in their order, kept in a register or put aside exactly. So
a token's result is the same to the last bit whatever tokens stand beside it, and whichever thread computes it.

Letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic
from torch.nn import functional

from engine.backend import Linear
from engine.cpu.jit import Team, kernel, narrow, num_threads, pointer, thread_num, widen
from engine.cpu.packed import Packed
from engine.cpu.tiles import LANES, PAIR_BYTES, SUMS, VECTOR_BYTES, has_pair_products, load, store, tile

PANEL = 32
"""Outputs of a panel: two vectors."""
_ROWS = 12
"""Tokens at a time: with two vectors, 24 sums in registers."""
_BLOCK_ROWS = 96
_BLOCK_PAIRS = 1024
"""What of the tokens, and of a panel, is worked on together: 384 KiB and 128, which a core's second cache holds."""
_ALIGNMENT = 64
PAIRS = "bf16 pairs"
"""The form of packed matrices: panels of bf16 pairs, nothing lost."""


class Products:
    """Makes products of packed matrices, on torch's own threads. Raises NoKernels where those cannot be had.

    Attributes:
        layout: names what `pack` makes of a matrix; equal layouts make the same arrays of it, in any version of ours.
    """

    layout = "panels 1"

    def __init__(self, *, native: bool | None = None) -> None:
        """`native`: see `engine.cpu.tiles.has_pair_products`, which None asks."""
        self._team = Team()
        self._kernel = panel_products(has_pair_products() if native is None else native)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """The product of a bf16 matrix `[N, K]`, copied; bf16 `[M, K]` -> `[M, N]`, rounded to nearest even."""
        return self.product(self.pack(weight), bias)

    def pack(self, weight: torch.Tensor) -> Packed:
        """A bf16 matrix `[N, K]` in panels, copied."""
        num_outputs, num_inputs = weight.shape
        return Packed(PAIRS, (num_outputs, num_inputs), {"panels": pack(weight)})

    def product(self, packed: Packed, bias: torch.Tensor | None) -> Linear:
        """The product of what `pack` made, here or in another process."""
        num_outputs, num_inputs = packed.shape
        panels = packed.arrays["panels"]
        num_pairs = panels.shape[1]

        def multiply(hidden: torch.Tensor) -> torch.Tensor:
            if num_inputs % 2:
                hidden = functional.pad(hidden, (0, 1))
            elif hidden.stride(1) != 1:
                hidden = hidden.contiguous()
            num_tokens = hidden.shape[0]
            out = torch.empty(num_tokens, num_outputs, dtype=hidden.dtype)
            words = (
                hidden.data_ptr(),
                panels.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                num_tokens,
                num_outputs,
                num_pairs,
                2 * hidden.stride(0),
            )
            # In the time of a simple operation: 16 weights are read, or multiplied with 16 tokens.
            numbers = num_inputs * num_outputs * (16 + num_tokens) // 256
            self._team.run(self._kernel, words, numbers)
            return out

        return multiply


def pack(weight: torch.Tensor) -> torch.Tensor:
    """`[N, K]` bf16 -> `[N / 32, K / 2, 32]` pairs (int32), rounded up with zeros, aligned to a line of the caches."""
    num_outputs, num_inputs = weight.shape
    padded = functional.pad(weight, (0, num_inputs % 2, 0, -num_outputs % PANEL)).contiguous()
    num_panels, num_pairs = padded.shape[0] // PANEL, padded.shape[1] // 2
    memory = torch.empty(num_panels * num_pairs * PANEL + _ALIGNMENT // PAIR_BYTES, dtype=torch.int32)
    skipped = -memory.data_ptr() % _ALIGNMENT // PAIR_BYTES
    panels = memory[skipped:][: num_panels * num_pairs * PANEL].view(num_panels, num_pairs, PANEL)
    panels.copy_(padded.view(torch.int32).view(num_panels, PANEL, num_pairs).transpose(1, 2))
    return panels


@intrinsic(prefer_literal=True)
def add_panel(
    _context: Any,
    count: Any,
    row: Any,
    row_bytes: Any,
    panel: Any,
    num_pairs: Any,
    sums: Any,
    ahead: Any,
    more: Any,
    native: Any,
) -> Any:
    """Add to the sums of 1 to 12 rows their products with a part of a panel, asking for two lines a pair."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count, row, row_bytes, panel, num_pairs, target, *ahead, _ = arguments
        word = ir.IntType(64)
        end = builder.function.append_basic_block("added")
        choice = builder.switch(count, end)
        offsets = range(0, PANEL // LANES * VECTOR_BYTES, VECTOR_BYTES)
        for size in range(1, _ROWS + 1):
            case = builder.function.append_basic_block(f"rows_{size}")
            choice.add_case(word(size), case)
            builder.position_at_end(case)
            places = [
                [builder.add(target, word(at * len(offsets) * VECTOR_BYTES + offset)) for offset in offsets]
                for at in range(size)
            ]
            results = tile(
                builder,
                [builder.add(row, builder.mul(row_bytes, word(at))) for at in range(size)],
                [builder.add(panel, word(offset)) for offset in offsets],
                word(len(offsets) * VECTOR_BYTES),
                num_pairs,
                [[load(builder, place, SUMS) for place in own] for own in places],
                ahead=ahead,
                native=bool(native.literal_value),
            )
            for own, mine in zip(places, results, strict=True):
                for place, result in zip(own, mine, strict=True):
                    store(builder, result, place)
            builder.branch(end)
        builder.position_at_end(end)
        return word(0)

    return types.int64(count, row, row_bytes, panel, num_pairs, sums, ahead, more, native), emit


@functools.cache
def panel_products(native: bool) -> Any:
    """The kernel.

    Words: addresses of tokens `[M, K]` bf16, of panels, of a bias `[N]` bf16 or 0, of the result `[M, N]` bf16; M; N;
    pairs of K; bytes from token to token.
    """
    instruction = int(native)

    def run(words: Any) -> None:
        num_tokens, num_outputs, num_pairs, row_bytes = words[4], words[5], words[6], words[7]
        num_panels = (num_outputs + PANEL - 1) // PANEL
        num_blocks = (num_tokens + _BLOCK_ROWS - 1) // _BLOCK_ROWS
        num_items = num_panels * num_blocks
        members, member = num_threads(), thread_num()
        sums = np.empty((_BLOCK_ROWS, PANEL), np.float32)
        sums_at = np.int64(sums.ctypes.data)
        for item in range(num_items * member // members, num_items * (member + 1) // members):
            block, panel = item // num_panels, item % num_panels
            first = num_tokens * block // num_blocks
            num_rows = num_tokens * (block + 1) // num_blocks - first
            columns = min(PANEL, num_outputs - panel * PANEL)
            if words[2]:
                bias = carray(pointer(words[2] + 2 * panel * PANEL), columns, np.uint16)
                for at in range(num_rows):
                    for column in range(columns):
                        sums[at, column] = widen(bias[column])
            else:
                sums[:num_rows] = 0
            passes = (num_rows + _ROWS - 1) // _ROWS
            for begin in range(0, num_pairs, _BLOCK_PAIRS):
                pairs = min(_BLOCK_PAIRS, num_pairs - begin)
                place = words[1] + PAIR_BYTES * PANEL * (panel * num_pairs + begin)
                following = place + PAIR_BYTES * PANEL * pairs
                for turn in range(passes):
                    top = num_rows * turn // passes
                    row = words[0] + (first + top) * row_bytes + PAIR_BYTES * begin
                    # One pass asks for all of what follows, the first two of several for every other line each.
                    line = following + VECTOR_BYTES * (turn % 2)
                    other = line + VECTOR_BYTES if passes == 1 else line
                    count = num_rows * (turn + 1) // passes - top
                    add_panel(count, row, row_bytes, place, pairs, sums_at + 4 * PANEL * top, line, other, instruction)
            for at in range(num_rows):
                target = words[3] + 2 * ((first + at) * num_outputs + panel * PANEL)
                out = carray(pointer(target), columns, np.uint16)
                for column in range(columns):
                    out[column] = narrow(sums[at, column])

    return kernel(run)
