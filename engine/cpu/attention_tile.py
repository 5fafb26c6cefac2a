"""Attention of a few rows to one tile of slots, in registers: scores, weights and the values' sums.

A row is one query head of one token. It goes over its tiles in order with an online softmax (arXiv 1805.02867) in
float32, to base 2; weights are rounded to bfloat16 for the product with the values. Tiles begin at multiples of `SLOTS`
positions, whatever the step's rows, and each number is computed alone in one order, so that a row's bits depend neither
on how many rows are computed with it nor on where its chunk began. A tile of which a row sees nothing leaves it as it
is.

Pages hold pairs side by side (`page-major-pairs-1`): keys `[D / 2, P, 2]`, values `[P / 2, D, 2]`. So 16 slots of keys,
or 16 dimensions of a pair of values, are one vector, and nothing is gathered, packed or summed across lanes.

Letters: R rows, D head_dim, P page_size.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.cpu.jit import call
from engine.cpu.tiles import LANES, SUMS, VECTOR_BYTES, WORDS, load, splat, store, tile
from engine.cpu.vectors import narrowed

GROUPS = 4
"""Vectors of slots in a tile."""
SLOTS = GROUPS * LANES
ROWS = (6, 4, 2, 1)
"""How many rows there may be; the first keeps the processor's product units busy, others waste less at an end."""

KEYS, VALUES, KEYS_AHEAD, VALUES_AHEAD, FIRST_GROUP, END_GROUP, START, WEIGHTS, DESK_WORDS = (
    0,
    4,
    8,
    12,
    16,
    17,
    18,
    19,
    20,
)
"""Places on the desk: of each group of 16 slots the address of its keys, and of its values; of those to be asked for
ahead; the groups whose values count (those of others are not read); position of the first slot; room for `[R, 64]` bf16
weights."""

LOWEST = -1e30
"""The largest score of a row that has seen nothing yet; finite, so that no difference is NaN."""

_WORD, _ADDRESS = ir.IntType(32), ir.IntType(64)
_POWER = (0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1.0)
"""Of 2 to a power in [-1/2, 1/2], the highest first: wrong by less than 2e-7 relative, and right at 0."""
_LEAST_POWER = -127.0
_ROUNDER = 1.5 * 2.0**23 + 127
"""Added to a float32, it rounds it to a whole number and leaves that number's exponent bits in the low ones."""


@intrinsic(prefer_literal=True)
def attend_tile(
    _context: Any, desk: Any, queries: Any, bounds: Any, state: Any, sums: Any, edge: Any,
    num_rows: Any, head_dim: Any, page_size: Any, native: Any, ahead: Any,
) -> Any:  # fmt: skip
    """Bring R rows forward by one tile.

    Args:
        desk: address of `DESK_WORDS` int64.
        queries: address of the addresses of R queries, `[D]` bf16 each.
        bounds: address of `[R, 2]` int32: a row sees positions `[low, high)`. Read where `edge` is not 0.
        state: address of `[1 + R, 16]` float32, mutated: the rows' largest scores so far, then of each row its
            weights' sums by lane.
        sums: address of `[R, D]` float32, mutated: weights times values.
        edge: 0 where all rows see the whole tile.
        num_rows: R, a constant like all that follow.
        head_dim: D.
        page_size: P.
        native: 1 where the processor has products of pairs.
        ahead: 1 to ask for what lies at `KEYS_AHEAD` and `VALUES_AHEAD` meanwhile.
    """
    shape = tuple(kind.literal_value for kind in (num_rows, head_dim, page_size, native, ahead))

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        name = "attend_tile_" + "_".join(map(str, shape))
        function = builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [_ADDRESS] * 6)
            function = ir.Function(builder.module, kind, name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            _Tile(function, *shape).emit()
        builder.call(function, arguments[:6])
        return _ADDRESS(0)

    integers = (desk, queries, bounds, state, sums, edge, num_rows, head_dim, page_size, native, ahead)
    return types.int64(*integers), emit


class _Tile:
    """Writes the function for one shape."""

    def __init__(self, function: Any, num_rows: int, head_dim: int, page_size: int, native: int, ahead: int) -> None:
        self._builder = ir.IRBuilder(function.append_basic_block("entry"))
        self._desk, self._queries, self._bounds, self._state, self._sums, self._edge = function.args
        self._num_rows, self._head_dim, self._page_size = num_rows, head_dim, page_size
        self._native, self._ahead = bool(native), bool(ahead)

    def emit(self) -> None:
        scores = self._masked(self._scores())
        scales = self._weigh(scores)
        num_vectors = self._head_dim // LANES
        num_parts = -(-num_vectors // GROUPS)
        for part in range(num_parts):
            self._mix(scales, range(num_vectors * part // num_parts, num_vectors * (part + 1) // num_parts))
        self._builder.ret_void()

    def _scores(self) -> list[list[Any]]:
        """Of each row, `GROUPS` vectors."""
        return tile(
            self._builder,
            [load(self._builder, self._at(self._queries, 8 * row), _ADDRESS) for row in range(self._num_rows)],
            self._on_desk(KEYS),
            _ADDRESS(self._page_size * VECTOR_BYTES // LANES),
            _ADDRESS(self._head_dim // 2),
            ahead=self._on_desk(KEYS_AHEAD) if self._ahead else (),
            native=self._native,
        )

    def _masked(self, scores: list[list[Any]]) -> list[list[Any]]:
        """Where there is an edge, what a row does not see becomes minus infinity, whatever it was."""
        builder = self._builder
        before = builder.block
        hide, go_on = (builder.append_basic_block(name) for name in ("hide", "weigh"))
        builder.cbranch(builder.icmp_signed("!=", self._edge, _ADDRESS(0)), hide, go_on)
        builder.position_at_end(hide)
        start = builder.trunc(load(builder, self._at(self._desk, 8 * START), _ADDRESS), _WORD)
        nothing = _constant(-math.inf)
        hidden: list[list[Any]] = []
        for row, own in enumerate(scores):
            low, high = (
                splat(builder, builder.sub(load(builder, self._at(self._bounds, 8 * row + side), _WORD), start))
                for side in (0, 4)
            )
            hidden.append([])
            for at, vector in enumerate(own):
                slots = ir.Constant(WORDS, list(range(at * LANES, (at + 1) * LANES)))
                seen = builder.and_(builder.icmp_signed(">=", slots, low), builder.icmp_signed("<", slots, high))
                hidden[-1].append(builder.select(seen, vector, nothing))
        builder.branch(go_on)
        builder.position_at_end(go_on)
        return [
            [self._either(before, one, hide, other) for one, other in zip(*pair, strict=True)]
            for pair in zip(scores, hidden, strict=True)
        ]

    def _either(self, first: Any, one: Any, second: Any, other: Any) -> Any:
        phi = self._builder.phi(one.type)
        phi.add_incoming(one, first)
        phi.add_incoming(other, second)
        return phi

    def _weigh(self, scores: list[list[Any]]) -> list[Any]:
        """Store weights, bring the state forward; of each row what its sums so far shrink by, in all lanes."""
        builder = self._builder
        to_powers = _constant(math.log2(math.e) / math.sqrt(self._head_dim))
        largest: Any = _constant(LOWEST)
        for row, own in enumerate(scores):
            largest = builder.insert_element(largest, self._largest(own), _WORD(row))
        old = load(builder, self._state, SUMS)
        new = _larger(builder, old, builder.fmul(largest, to_powers))
        store(builder, new, self._state)
        shrinks = self._power(builder.fsub(old, new))
        weights = load(builder, self._at(self._desk, 8 * WEIGHTS), _ADDRESS)
        scales = []
        for row, own in enumerate(scores):
            top = builder.fneg(_lane(builder, new, row))
            scales.append(_lane(builder, shrinks, row))
            parts = []
            for at, vector in enumerate(own):
                weight = self._power(_fused(builder, vector, to_powers, top))
                place = self._at(weights, 2 * (row * SLOTS + at * LANES))
                store(builder, narrowed(builder, weight), place)
                parts.append(weight)
            place = self._at(self._state, VECTOR_BYTES * (1 + row))
            total = builder.fadd(builder.fadd(parts[0], parts[1]), builder.fadd(parts[2], parts[3]))
            store(builder, _fused(builder, load(builder, place, SUMS), scales[row], total), place)
        return scales

    def _largest(self, own: list[Any]) -> Any:
        """Of all lanes of all vectors."""
        builder = self._builder
        vector = _larger(builder, _larger(builder, own[0], own[1]), _larger(builder, own[2], own[3]))
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            halves = [
                builder.shuffle_vector(vector, vector, _lanes(range(begin, begin + lanes))) for begin in (0, lanes)
            ]
            vector = _larger(builder, *halves)
        return builder.extract_element(vector, _WORD(0))

    def _power(self, exponents: Any) -> Any:
        """2 to each, 0 from -127 down; none is above 0 but by rounding."""
        builder = self._builder
        least = _constant(_LEAST_POWER)
        exponents = builder.select(builder.fcmp_ordered("<", exponents, least), least, exponents)  # NaN stays
        rounded = builder.fadd(exponents, _constant(_ROUNDER))
        rest = builder.fsub(exponents, builder.fsub(rounded, _constant(_ROUNDER)))
        whole = builder.shl(builder.bitcast(rounded, WORDS), ir.Constant(WORDS, [23] * LANES))
        result = _constant(_POWER[0])
        for factor in _POWER[1:]:
            result = _fused(builder, result, rest, _constant(factor))
        return builder.fmul(result, builder.bitcast(whole, SUMS))

    def _mix(self, scales: list[Any], vectors: range) -> None:
        """Add the tile's values, weighed, to these vectors of the sums."""
        builder = self._builder
        places = [
            [self._at(self._sums, 4 * (row * self._head_dim + at * LANES)) for at in vectors]
            for row in range(self._num_rows)
        ]
        start = [
            [builder.fmul(load(builder, place, SUMS), scale) for place in own]
            for own, scale in zip(places, scales, strict=True)
        ]
        weights = load(builder, self._at(self._desk, 8 * WEIGHTS), _ADDRESS)
        first, end = (load(builder, self._at(self._desk, 8 * at), _ADDRESS) for at in (FIRST_GROUP, END_GROUP))
        before = builder.block
        loop, after = (builder.append_basic_block(name) for name in ("group", "mixed"))
        builder.branch(loop)
        builder.position_at_end(loop)
        group = builder.phi(_ADDRESS)
        group.add_incoming(first, before)
        sums = [[builder.phi(SUMS) for _ in own] for own in start]
        place = builder.add(self._desk, builder.mul(group, _ADDRESS(8)))
        weights = builder.add(weights, builder.mul(group, _ADDRESS(2 * LANES)))
        bases = [load(builder, self._at(place, 8 * side), _ADDRESS) for side in (VALUES, VALUES_AHEAD)]
        columns, ahead = ([self._at(base, VECTOR_BYTES * at) for at in vectors] for base in bases)
        results = tile(
            builder,
            [self._at(weights, 2 * SLOTS * row) for row in range(self._num_rows)],
            columns,
            _ADDRESS(4 * self._head_dim),
            _ADDRESS(LANES // 2),
            sums,
            ahead=ahead if self._ahead else (),
            native=self._native,
        )
        following = builder.add(group, _ADDRESS(1))
        group.add_incoming(following, builder.block)
        for entries, ours, news in zip(sums, start, results, strict=True):
            for entry, our, new in zip(entries, ours, news, strict=True):
                entry.add_incoming(our, before)
                entry.add_incoming(new, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        builder.position_at_end(after)
        for targets, news in zip(places, results, strict=True):
            for target, new in zip(targets, news, strict=True):
                store(builder, new, target)

    def _on_desk(self, first: int) -> list[Any]:
        return [load(self._builder, self._at(self._desk, 8 * (first + at)), _ADDRESS) for at in range(GROUPS)]

    def _at(self, base: Any, offset: int) -> Any:
        return self._builder.add(base, _ADDRESS(offset))


def _constant(number: float) -> Any:
    return ir.Constant(SUMS, [number] * LANES)


def _lanes(numbers: range | list[int]) -> Any:
    return ir.Constant(ir.VectorType(_WORD, len(numbers)), list(numbers))


def _lane(builder: Any, vector: Any, lane: int) -> Any:
    """One lane of a vector in all."""
    return builder.shuffle_vector(vector, vector, _lanes([lane] * LANES))


def _larger(builder: Any, first: Any, second: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", first, second), first, second)


def _fused(builder: Any, left: Any, right: Any, more: Any) -> Any:
    """`left * right + more`, rounded once on every processor."""
    return call(builder, f"llvm.fma.v{LANES}f32", SUMS, left, right, more)
