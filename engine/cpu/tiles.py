"""Tiles of matrix products that stay in registers: pairs of bfloat16 numbers in, float32 sums out.

The step is that of AVX512-BF16: of two vectors of 16 pairs, each lane adds both products of its pair to a float32 sum.
One side is a pair of a row, the same for all lanes; the other is a vector of 16 columns, whose pairs must lie side by
side in memory: packed weights and pages of keys and values are laid out so. A sum runs over its pairs in order, one at
a time, so that a number's result does not depend on how many rows a tile has, nor on its neighbours.

On processors without the instruction the same step is made of float32 products, several times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from llvmlite import ir

from engine.cpu.jit import call

LANES = 16
PAIR_BYTES = 4
VECTOR_BYTES = LANES * PAIR_BYTES
_NEAR = 2  # of LLVM's localities: into the second cache

_ADDRESS, _WORD, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
WORDS = ir.VectorType(_WORD, LANES)
"""16 pairs of bfloat16 by their bits, the first of each pair in the low half."""
SUMS = ir.VectorType(_FLOAT, LANES)


class _BFloat(ir.types._BaseFloatType):  # type: ignore[misc]  # noqa: SLF001 - llvmlite names every float type of LLVM but this one
    """LLVM's bfloat, which llvmlite does not name."""

    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()  # noqa: SLF001
_PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


@cache
def has_pair_products() -> bool:
    """Whether this processor has the instruction."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def add_products(builder: Any, sums: Any, left: Any, right: Any, *, native: bool) -> Any:
    """`sums[i] + left[2 i] * right[2 i] + left[2 i + 1] * right[2 i + 1]`, with operands of type `WORDS`."""
    if native:
        pairs = [builder.bitcast(words, _PAIRS) for words in (left, right)]
        return call(builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", SUMS, sums, *pairs)
    shift, mask = (ir.Constant(WORDS, [number] * LANES) for number in (16, 0xFFFF0000))
    low = [builder.shl(words, shift) for words in (left, right)]
    high = [builder.and_(words, mask) for words in (left, right)]
    for halves in (low, high):
        factors = [builder.bitcast(words, SUMS) for words in halves]
        sums = builder.fadd(sums, builder.fmul(*factors, flags=("contract",)), flags=("contract",))
    return sums


def tile(
    builder: Any,
    rows: Sequence[Any],
    columns: Sequence[Any],
    step: Any,
    num_pairs: Any,
    start: Sequence[Sequence[Any]] | None = None,
    *,
    ahead: Sequence[Any] = (),
    meanwhile: Callable[[Any, Any], None] | None = None,
    native: bool,
) -> list[list[Any]]:
    """Emit the loop over `num_pairs` pairs; returns the sums `[row][vector]`, of type `SUMS`.

    At most about 26 sums stay in the 32 registers: 6 rows of 4 vectors and 12 of 2 reach the processor's full rate.

    Args:
        builder: where to; afterwards it stands behind the loop.
        rows: addresses (int64) of each row's first pair, the others follow it.
        columns: addresses of the first pair's vectors of 16 columns.
        step: bytes from a pair's vector to the next pair's, an int64 value.
        num_pairs: at least 1, an int64 value.
        start: what the sums begin with, 0 where None.
        ahead: addresses of what will be read after this; asked for meanwhile, 64 bytes and a `step` on with each pair.
        meanwhile: emits what else is done with each pair, given builder and the pair's number.
        native: see `has_pair_products`.
    """
    zero = ir.Constant(SUMS, [0.0] * LANES)
    before = builder.block
    loop, after = (builder.function.append_basic_block(name) for name in ("pair", "summed"))
    builder.branch(loop)
    builder.position_at_end(loop)
    pair = builder.phi(_ADDRESS)
    pair.add_incoming(ir.Constant(_ADDRESS, 0), before)
    sums = [[builder.phi(SUMS) for _ in columns] for _ in rows]
    for r, own in enumerate(sums):
        for c, entry in enumerate(own):
            entry.add_incoming(zero if start is None else start[r][c], before)
    row_offset = builder.mul(pair, ir.Constant(_ADDRESS, PAIR_BYTES))
    column_offset = builder.mul(pair, step)
    vectors = [load(builder, builder.add(base, column_offset), WORDS) for base in columns]
    for base in ahead:
        fetch(builder, builder.add(base, column_offset))
    if meanwhile is not None:
        meanwhile(builder, pair)
    results = []
    for base, own in zip(rows, sums, strict=True):
        shared = splat(builder, load(builder, builder.add(base, row_offset), _WORD))
        results.append(
            [add_products(builder, s, shared, vector, native=native) for s, vector in zip(own, vectors, strict=True)]
        )
    following = builder.add(pair, ir.Constant(_ADDRESS, 1))
    pair.add_incoming(following, loop)
    for own, new in zip(sums, results, strict=True):
        for entry, result in zip(own, new, strict=True):
            entry.add_incoming(result, loop)
    builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
    builder.position_at_end(after)
    return results


def load(builder: Any, address: Any, kind: Any) -> Any:
    """What lies at an address."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def store(builder: Any, value: Any, address: Any) -> None:
    """Put a value at an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """A number in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    single = builder.insert_element(undefined, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(_WORD, lanes), [0] * lanes))


def fetch(builder: Any, address: Any) -> None:
    """Ask for a line of memory, which the processor's own prefetching may not reach: it stops at borders of 4 KiB."""
    place = builder.inttoptr(address, ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), place, _WORD(0), _WORD(_NEAR), _WORD(1))
