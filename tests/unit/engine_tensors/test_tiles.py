"""Tiles against the same product in float64, with and without the processor's own instruction."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.cpu.jit import kernel
from engine.cpu.tiles import LANES, VECTOR_BYTES, has_pair_products, tile

NATIVE = [False, pytest.param(True, marks=pytest.mark.skipif(not has_pair_products(), reason="no AVX512-BF16"))]


def product(rows: torch.Tensor, columns: torch.Tensor, *, native: bool) -> torch.Tensor:
    """`[M, K] @ [K, N]` by one tile, N a multiple of 16."""
    num_rows, num_pairs, num_vectors = rows.shape[0], rows.shape[1] // 2, columns.shape[1] // LANES

    @intrinsic
    def whole(_context: Any, left: Any, right: Any, out: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            word = ir.IntType(64)
            left, right, out = arguments
            sums = tile(
                builder,
                [builder.add(left, word(4 * num_pairs * row)) for row in range(num_rows)],
                [builder.add(right, word(VECTOR_BYTES * vector)) for vector in range(num_vectors)],
                word(VECTOR_BYTES * num_vectors),
                word(num_pairs),
                native=native,
            )
            for at, value in enumerate(value for own in sums for value in own):
                place = builder.inttoptr(builder.add(out, word(VECTOR_BYTES * at)), value.type.as_pointer())
                builder.store(value, place, align=4)
            return word(0)

        return types.int64(left, right, out), emit

    def run(words: Any) -> None:
        whole(words[0], words[1], words[2])

    packed = columns.view(num_pairs, 2, -1).transpose(1, 2).contiguous()
    out = torch.empty(num_rows, num_vectors * LANES)
    words = np.array([rows.data_ptr(), packed.data_ptr(), out.data_ptr()], dtype=np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel(run, cached=False).address)(words.ctypes.data)
    return out


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("num_rows", "num_vectors"), [(1, 1), (5, 4), (12, 2)])
def test_a_tile_is_a_product(num_rows: int, num_vectors: int, native: bool) -> None:
    torch.manual_seed(num_rows)
    rows = torch.randn(num_rows, 70).bfloat16()
    columns = torch.randn(70, num_vectors * LANES).bfloat16()
    actual = product(rows, columns, native=native)
    torch.testing.assert_close(actual.double(), rows.double() @ columns.double(), rtol=1e-5, atol=1e-4)
    alone = product(rows[-1:].contiguous(), columns, native=native)
    assert torch.equal(alone, actual[-1:])  # whatever other rows there are
