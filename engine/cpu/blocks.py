"""Blocks of a panel: multiplied with up to 12 tokens, while the next one is expanded and the one after it asked for.

To expand takes no time of its own: a few simple instructions a record, between those of the products.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.cpu.panels import EIGHT_BITS, PANEL, PLAIN, RECORD_BYTES, RECORD_WEIGHTS
from engine.cpu.tiles import LANES, SUMS, VECTOR_BYTES, WORDS, fetch, load, splat, store, tile
from engine.cpu.vectors import store_bf16

ROWS = 12
"""Tokens at a time: with two vectors of outputs, 24 sums in registers."""

_WORD, _HALF = (ir.IntType(bits) for bits in (64, 16))
_BYTES, _HALVES = (ir.VectorType(ir.IntType(bits), PANEL) for bits in (8, 16))


@intrinsic(prefer_literal=True)
def add_block(
    _context: Any, count: Any, row: Any, row_bytes: Any, block: Any, num_pairs: Any, sums: Any, begins: Any, out: Any,
    out_bytes: Any, source: Any, lowest: Any, target: Any, line: Any, other_line: Any, form: Any, first: Any,
    native: Any,
) -> Any:  # fmt: skip
    """Add to the sums of some rows their products with a block of plain records.

    Sums pass from block to block through memory, but neither into the first nor out of the last one.

    Args:
        _context: numba's.
        count: of rows, 1 to 12; later passes are for 6 and more.
        row: address of the first row's first pair.
        row_bytes: from row to row.
        block: address of the records.
        num_pairs: records of the block.
        sums: address of the rows' sums, `[count, 32]` float32.
        begins: not 0 where they begin, at 0, whatever lies there.
        out: address of the first row's place in the result, where the rows' sums end and go to it, rounded to nearest
            even; 0 where they are kept.
        out_bytes: from row to row of the result.
        source: address of as many records that come next, which the first pass expands if they are not plain.
        lowest: their lowest exponent, where in 12 bits.
        target: address to expand them to, exceptions aside.
        line: address of a line that is asked for meanwhile, and of so many, a record of the form apart.
        other_line: likewise.
        form: of the matrix; literal.
        first: whether this is the block's first pass; literal.
        native: see `tile`; literal.
    """
    kind, is_first, instruction = (argument.literal_value for argument in (form, first, native))

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (
            count, row, row_bytes, block, num_pairs, sums, begins, out, out_bytes, source, lowest, target, line,
            other_line, *_,
        ) = arguments  # fmt: skip
        exponent = _spread_exponent(builder, lowest)

        def meanwhile(builder: Any, pair: Any) -> None:
            offset = builder.mul(pair, _WORD(RECORD_BYTES[kind]))
            for place in (line, other_line):
                fetch(builder, builder.add(place, offset))
            if is_first and kind != PLAIN:
                expanded = builder.add(target, builder.mul(pair, _WORD(RECORD_BYTES[PLAIN])))
                _expand(builder, kind, builder.add(source, offset), exponent, expanded)

        end = builder.function.append_basic_block("added")
        choice = builder.switch(count, end)
        offsets = range(0, PANEL // LANES * VECTOR_BYTES, VECTOR_BYTES)
        for size in range(1 if is_first else ROWS // 2, ROWS + 1):
            case = builder.function.append_basic_block(f"rows_{size}")
            choice.add_case(_WORD(size), case)
            builder.position_at_end(case)
            places = [
                [builder.add(sums, _WORD(at * len(offsets) * VECTOR_BYTES + offset)) for offset in offsets]
                for at in range(size)
            ]
            results = tile(
                builder,
                [builder.add(row, builder.mul(row_bytes, _WORD(at))) for at in range(size)],
                [builder.add(block, _WORD(offset)) for offset in offsets],
                _WORD(len(offsets) * VECTOR_BYTES),
                num_pairs,
                _begun(builder, begins, places),
                meanwhile=meanwhile,
                native=bool(instruction),
            )
            _put(builder, results, places, out, out_bytes)
            builder.branch(end)
        builder.position_at_end(end)
        return _WORD(0)

    integers = (
        count, row, row_bytes, block, num_pairs, sums, begins, out, out_bytes, source, lowest, target, line, other_line,
    )  # fmt: skip
    return types.int64(*integers, form, first, native), emit


@intrinsic(prefer_literal=True)
def expand_block(_context: Any, source: Any, num_pairs: Any, lowest: Any, target: Any, form: Any) -> Any:
    """Expand at least one record of a form, exceptions aside, with no products meanwhile."""
    kind = form.literal_value

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        source, num_pairs, lowest, target, _ = arguments
        exponent = _spread_exponent(builder, lowest)
        before = builder.block
        loop, after = (builder.function.append_basic_block(name) for name in ("record", "expanded"))
        builder.branch(loop)
        builder.position_at_end(loop)
        pair = builder.phi(_WORD)
        pair.add_incoming(_WORD(0), before)
        record, out = (
            builder.add(base, builder.mul(pair, _WORD(RECORD_BYTES[own])))
            for base, own in ((source, kind), (target, PLAIN))
        )
        _expand(builder, kind, record, exponent, out)
        following = builder.add(pair, _WORD(1))
        pair.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, num_pairs), loop, after)
        builder.position_at_end(after)
        return _WORD(0)

    return types.int64(source, num_pairs, lowest, target, form), emit


def _begun(builder: Any, begins: Any, places: list[list[Any]]) -> list[list[Any]]:
    """Emit what sums begin with: 0 where they begin, else what lies at their places."""
    fresh, go_on, tile_of = (builder.function.append_basic_block(name) for name in ("fresh", "go_on", "tile"))
    builder.cbranch(builder.icmp_signed("!=", begins, _WORD(0)), fresh, go_on)
    builder.position_at_end(fresh)
    builder.branch(tile_of)
    builder.position_at_end(go_on)
    loaded = [[load(builder, place, SUMS) for place in own] for own in places]
    builder.branch(tile_of)
    builder.position_at_end(tile_of)
    zero = ir.Constant(SUMS, [0.0] * LANES)
    found: list[list[Any]] = []
    for own in loaded:
        found.append([])
        for value in own:
            entry = builder.phi(SUMS)
            entry.add_incoming(zero, fresh)
            entry.add_incoming(value, go_on)
            found[-1].append(entry)
    return found


def _put(builder: Any, results: list[list[Any]], places: list[list[Any]], out: Any, out_bytes: Any) -> None:
    """Emit what puts sums back to their places, or at their end, rounded, to the result's rows from `out` on."""
    keep, finish, after = (builder.function.append_basic_block(name) for name in ("keep", "finish", "put"))
    builder.cbranch(builder.icmp_signed("!=", out, _WORD(0)), finish, keep)
    builder.position_at_end(keep)
    for own, mine in zip(places, results, strict=True):
        for place, result in zip(own, mine, strict=True):
            store(builder, result, place)
    builder.branch(after)
    builder.position_at_end(finish)
    for at, mine in enumerate(results):
        top = builder.add(out, builder.mul(out_bytes, _WORD(at)))
        for vector, result in enumerate(mine):
            store_bf16(builder, top, LANES * vector, result)
    builder.branch(after)
    builder.position_at_end(after)


def _expand(builder: Any, form: str, record: Any, exponent: Any, target: Any) -> None:
    """Emit what makes a plain record at `target` of the one of a form at an address."""
    if form == EIGHT_BITS:
        _expand_bytes(builder, record, target)
        return
    codes = builder.zext(load(builder, builder.add(record, _WORD(RECORD_WEIGHTS)), _BYTES), _HALVES)
    low = builder.shl(builder.and_(codes, _all(15)), _all(7))
    high = builder.and_(builder.shl(codes, _all(3)), _all(15 << 7))
    for offset, code in ((0, low), (PANEL, high)):
        spread = builder.sext(load(builder, builder.add(record, _WORD(offset)), _BYTES), _HALVES)
        rest = builder.and_(spread, _all(0x807F))
        weights = builder.add(builder.or_(rest, code), exponent)
        store(builder, weights, builder.add(target, _WORD(2 * offset)))


def _expand_bytes(builder: Any, record: Any, target: Any) -> None:
    """A whole number of 8 bits is a bfloat16: the upper half of the float32, whose lower half is 0."""
    shift, mask = (ir.Constant(WORDS, [number] * LANES) for number in (16, 0xFFFF0000))
    for vector in range(PANEL // LANES):
        halves = []
        for half in range(2):
            place = builder.add(record, _WORD((2 * vector + half) * LANES))
            numbers = load(builder, place, ir.VectorType(ir.IntType(8), LANES))
            halves.append(builder.bitcast(builder.sitofp(builder.sext(numbers, WORDS), SUMS), WORDS))
        pairs = builder.or_(builder.lshr(halves[0], shift), builder.and_(halves[1], mask))
        store(builder, pairs, builder.add(target, _WORD(vector * VECTOR_BYTES)))


def _spread_exponent(builder: Any, exponent: Any) -> Any:
    """Emit an exponent in its place in every half of a vector."""
    return splat(builder, builder.shl(builder.trunc(exponent, _HALF), _HALF(7)), PANEL)


def _all(number: int) -> Any:
    return ir.Constant(_HALVES, [number] * PANEL)
