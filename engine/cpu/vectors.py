"""The inner loops of attention as vector code, for any CPU.

Written as LLVM vectors, which the compiler lowers to what the CPU has (512 bits wide on those with AVX512). Sizes are
constants of the kernel that calls; addresses are int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16
_FAST = ("reassoc", "contract", "nsz", "arcp")
_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""Of exp on half a binary logarithm around 0: wrong by less than 1e-8 relative, beyond float32."""


@intrinsic(prefer_literal=True)
def score(_context: Any, queries: Any, key: Any, scores: Any, group: Any, head_dim: Any, page_size: Any) -> Any:
    """`scores[g * page_size] = sum(queries[g, :] * key[:])` for each g: float32 queries and scores, a bf16 key."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = _lanes(head_dim.literal_value)
        sums: list[Any] = [None] * group.literal_value
        _fetch(builder, arguments[1], 2 * page_size.literal_value * head_dim.literal_value, 2 * head_dim.literal_value)
        for begin in range(0, head_dim.literal_value, lanes):
            keys = _load_bf16(builder, arguments[1], begin, lanes)
            for g in range(len(sums)):
                ours = _load(builder, arguments[0], g * head_dim.literal_value + begin, lanes)
                product = builder.fmul(ours, keys, flags=_FAST)
                sums[g] = product if sums[g] is None else builder.fadd(sums[g], product, flags=_FAST)
        for g, total in enumerate(sums):
            place = _address(builder, arguments[2], 4 * g * page_size.literal_value, _FLOAT)
            builder.store(_sum(builder, total), place, align=4)
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(queries, key, scores, group, head_dim, page_size), emit


@intrinsic(prefer_literal=True)
def weigh(_context: Any, scores: Any, top: Any, page_size: Any) -> Any:
    """`scores[:] = exp(scores[:] - top)`, 1e-38 for what is far below; returns their sum. All float32."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = _lanes(page_size.literal_value)
        tops = _splat(builder, arguments[1], lanes)
        total = None
        for begin in range(0, page_size.literal_value, lanes):
            weights = _exp(builder, builder.fsub(_load(builder, arguments[0], begin, lanes), tops), lanes)
            builder.store(weights, _address(builder, arguments[0], 4 * begin, weights.type), align=4)
            total = weights if total is None else builder.fadd(total, weights, flags=_FAST)
        return _sum(builder, total)

    return types.float32(scores, top, page_size), emit


@intrinsic(prefer_literal=True)
def top_of(_context: Any, scores: Any, count: Any) -> Any:
    """The largest of `count` bf16 scores, as float32. No NaN."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = _lanes(count.literal_value)
        parts = [_load_bf16(builder, arguments[0], begin, lanes) for begin in range(0, count.literal_value, lanes)]
        return _reduce(builder, _fold(parts, lambda a, b: _larger(builder, a, b)), lambda a, b: _larger(builder, a, b))

    return types.float32(scores, count), emit


@intrinsic(prefer_literal=True)
def weigh_bf16(_context: Any, scores: Any, top: Any, count: Any) -> Any:
    """Like `weigh`, for `count` bf16 scores. `top` is float32."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = _lanes(count.literal_value)
        tops = _splat(builder, arguments[1], lanes)
        parts = []
        for begin in range(0, count.literal_value, lanes):
            weights = _exp(builder, builder.fsub(_load_bf16(builder, arguments[0], begin, lanes), tops), lanes)
            _store_bf16(builder, arguments[0], begin, weights)
            parts.append(weights)
        return _sum(builder, _fold(parts, lambda a, b: builder.fadd(a, b, flags=_FAST)))

    return types.float32(scores, top, count), emit


@intrinsic(prefer_literal=True)
def gate(_context: Any, gates: Any, ups: Any, output: Any, count: Any) -> Any:
    """`output[:] = silu(gates[:]) * ups[:]` for `count` bf16 numbers, computed in float32."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = _lanes(count.literal_value)
        one = ir.Constant(ir.VectorType(_FLOAT, lanes), [1.0] * lanes)
        for begin in range(0, count.literal_value, lanes):
            x, up = (_load_bf16(builder, base, begin, lanes) for base in arguments[:2])
            # Of exp only the side below 1 is computed: sigmoid(x) = e / (1 + e), where e = exp(-|x|) or its inverse.
            small = _exp(builder, builder.fneg(_call(builder, f"llvm.fabs.v{lanes}f32", x.type, x)), lanes)
            positive = builder.fcmp_ordered(">", x, ir.Constant(x.type, [0.0] * lanes))
            share = builder.fdiv(builder.select(positive, one, small), builder.fadd(one, small))
            _store_bf16(builder, arguments[2], begin, builder.fmul(builder.fmul(x, share), up))
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(gates, ups, output, count), emit


@intrinsic(prefer_literal=True)
def mix(
    _context: Any, sums: Any, values: Any, weights: Any, group: Any, head_dim: Any, page_size: Any, num_slots: Any
) -> Any:
    """`sums[g, :] += weights[g * page_size + n] * values[n, :]` for each g and the next `num_slots` n.

    Float32 sums and weights, bf16 values.
    """

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        size, count = head_dim.literal_value, num_slots.literal_value
        lanes = _lanes(size)
        shares = [
            [
                _splat(builder, _load(builder, arguments[2], g * page_size.literal_value + slot, 0), lanes)
                for slot in range(count)
            ]
            for g in range(group.literal_value)
        ]
        _fetch(builder, arguments[1], 2 * page_size.literal_value * size, 2 * count * size)
        for begin in range(0, size, lanes):
            read = [_load_bf16(builder, arguments[1], slot * size + begin, lanes) for slot in range(count)]
            for g, mine in enumerate(shares):
                total = _load(builder, arguments[0], g * size + begin, lanes)
                for share, numbers in zip(mine, read, strict=True):
                    total = builder.fadd(total, builder.fmul(share, numbers, flags=_FAST), flags=_FAST)
                place = _address(builder, arguments[0], 4 * (g * size + begin), total.type)
                builder.store(total, place, align=4)
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(sums, values, weights, group, head_dim, page_size, num_slots), emit


def _lanes(size: int) -> int:
    return math.gcd(size, LANES)


def _address(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    moved = builder.add(base, ir.Constant(ir.IntType(64), offset))
    return builder.inttoptr(moved, kind.as_pointer())


def _load(builder: Any, base: Any, place: int, lanes: int) -> Any:
    """Float32 from the `place`-th number on; a single one for 0 lanes."""
    kind = ir.VectorType(_FLOAT, lanes) if lanes else _FLOAT
    return builder.load(_address(builder, base, 4 * place, kind), align=4)


def _load_bf16(builder: Any, base: Any, place: int, lanes: int) -> Any:
    """Bfloat16 from the `place`-th number on, widened to float32."""
    halves = builder.load(_address(builder, base, 2 * place, ir.VectorType(ir.IntType(16), lanes)), align=2)
    words = builder.zext(halves, ir.VectorType(_WORD, lanes))
    shifted = builder.shl(words, ir.Constant(words.type, [16] * lanes))
    return builder.bitcast(shifted, ir.VectorType(_FLOAT, lanes))


def _fetch(builder: Any, base: Any, begin: int, num_bytes: int) -> None:
    """Ask for bytes ahead, which the CPU's own prefetching does not reach: it stops at borders of 4 KiB."""
    number = ir.IntType(32)
    pointer = ir.IntType(8).as_pointer()
    for offset in range(begin, begin + num_bytes, 64):
        place = _address(builder, base, offset, ir.IntType(8))
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
            function = ir.Function(builder.module, kind, name)
        builder.call(function, [place, number(0), number(3), number(1)])


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(value.type, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(
        single, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_WORD, lanes), [0] * lanes)
    )


def _call(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    """An LLVM intrinsic on vectors, result of type `kind`."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(kind, [argument.type for argument in arguments]), name)
    return builder.call(function, arguments)


def _store_bf16(builder: Any, base: Any, place: int, vector: Any) -> None:
    """Float32 rounded as `engine.cpu.jit.narrow` does."""
    lanes = vector.type.count
    words, halves = ir.VectorType(_WORD, lanes), ir.VectorType(ir.IntType(16), lanes)
    bits = builder.bitcast(vector, words)
    shift, one, most = (ir.Constant(words, [number] * lanes) for number in (16, 1, 0x7FFF))
    odd = builder.and_(builder.lshr(bits, shift), one)
    rounded = builder.lshr(builder.add(bits, builder.add(odd, most)), shift)
    builder.store(builder.trunc(rounded, halves), _address(builder, base, 2 * place, halves), align=2)


def _larger(builder: Any, first: Any, second: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", first, second), first, second)


def _fold(parts: list[Any], join: Callable[[Any, Any], Any]) -> Any:
    """All of them, in pairs, so that no chain of waits gets long."""
    while len(parts) > 1:
        parts = [join(*parts[at : at + 2]) if at + 1 < len(parts) else parts[at] for at in range(0, len(parts), 2)]
    return parts[0]


def _sum(builder: Any, vector: Any) -> Any:
    return _reduce(builder, vector, lambda a, b: builder.fadd(a, b, flags=_FAST))


def _reduce(builder: Any, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    """Of all lanes, by halves; lanes are a power of two."""
    lanes = vector.type.count
    while lanes > 1 and lanes % 2 == 0:
        lanes //= 2
        parts = [
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_WORD, lanes), list(range(begin, begin + lanes)))
            )
            for begin in (0, lanes)
        ]
        vector = join(*parts)
    return builder.extract_element(vector, ir.Constant(_WORD, 0))


def _exp(builder: Any, vector: Any, lanes: int) -> Any:
    """As 2 to a whole number, made of exponent bits, times a polynomial in what is left. For arguments of at most 0."""
    kind = vector.type

    def constant(value: float) -> Any:
        return ir.Constant(kind, [value] * lanes)

    floor = constant(-87.0)
    vector = builder.select(builder.fcmp_ordered(">", vector, floor), vector, floor)
    scaled = builder.fmul(vector, constant(math.log2(math.e)))
    whole = _call(builder, f"llvm.roundeven.v{lanes}f32", kind, scaled)
    rest = builder.fmul(builder.fsub(scaled, whole), constant(math.log(2)))
    result = constant(_EXP[0])
    for factor in _EXP[1:]:
        result = builder.fadd(builder.fmul(result, rest, flags=_FAST), constant(factor), flags=_FAST)
    words = ir.VectorType(_WORD, lanes)
    exponent = builder.add(builder.fptosi(whole, words), ir.Constant(words, [127] * lanes))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(words, [23] * lanes)), kind)
    return builder.fmul(result, power)
