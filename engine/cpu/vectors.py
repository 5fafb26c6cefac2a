"""Inner loops over rows as vector code, for any CPU.

Written as LLVM vectors, which the compiler lowers to what the CPU has (512 bits wide on those with AVX512). Sizes are
constants of the kernel that calls; addresses are int64.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from engine.cpu.jit import call
from engine.cpu.tiles import LANES, splat

_FAST = ("reassoc", "contract", "nsz", "arcp")
_WORD, _FLOAT = ir.IntType(32), ir.FloatType()
_EXP = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
"""Of exp on half a binary logarithm around 0: wrong by less than 1e-8 relative, beyond float32."""


@intrinsic(prefer_literal=True)
def gate(_context: Any, gates: Any, ups: Any, output: Any, count: Any) -> Any:
    """`output[:] = silu(gates[:]) * ups[:]` for `count` bf16 numbers, computed in float32."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lanes = _lanes(count.literal_value)
        one = ir.Constant(ir.VectorType(_FLOAT, lanes), [1.0] * lanes)
        for begin in range(0, count.literal_value, lanes):
            x, up = (_load_bf16(builder, base, begin, lanes) for base in arguments[:2])
            # Of exp only the side below 1 is computed: sigmoid(x) = e / (1 + e), where e = exp(-|x|) or its inverse.
            small = _exp(builder, builder.fneg(call(builder, f"llvm.fabs.v{lanes}f32", x.type, x)), lanes)
            positive = builder.fcmp_ordered(">", x, ir.Constant(x.type, [0.0] * lanes))
            share = builder.fdiv(builder.select(positive, one, small), builder.fadd(one, small))
            store_bf16(builder, arguments[2], begin, builder.fmul(builder.fmul(x, share), up))
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(gates, ups, output, count), emit


@intrinsic(prefer_literal=True)
def turn(_context: Any, head: Any, weight: Any, cosines: Any, sines: Any, size: Any, eps: Any, normed: Any) -> Any:
    """Rotate a head of `size` bf16 numbers in place, computed in float32; normed before by a weight if `normed`.

    Args:
        _context: numba's.
        head: address of the numbers; the first of a pair lie in the first half, the second in the second.
        weight: address of as many bf16 numbers, for the norm.
        cosines: address of `size / 2` float32 numbers.
        sines: likewise.
        size: literal.
        eps: added to the mean square, float32.
        normed: literal, 0 or 1.
    """
    half, norms = size.literal_value // 2, bool(normed.literal_value)

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        head, weight, cosines, sines, _, eps, _ = arguments
        lanes = _lanes(half)
        places = range(0, 2 * half, lanes)
        numbers = [_load_bf16(builder, head, at, lanes) for at in places]
        if norms:
            squares = builder.fmul(numbers[0], numbers[0])
            for vector in numbers[1:]:
                squares = builder.fadd(squares, builder.fmul(vector, vector, flags=_FAST), flags=_FAST)
            total = call(builder, f"llvm.vector.reduce.fadd.v{lanes}f32", _FLOAT, _FLOAT(0.0), squares, flags=_FAST)
            mean = builder.fadd(builder.fmul(total, _FLOAT(1 / (2 * half))), eps)
            scale = builder.fdiv(_FLOAT(1.0), call(builder, "llvm.sqrt.f32", _FLOAT, mean))
            everywhere = splat(builder, scale, lanes)
            factors = [builder.fmul(everywhere, _load_bf16(builder, weight, at, lanes)) for at in places]
            numbers = [builder.fmul(*both) for both in zip(numbers, factors, strict=True)]
        kind = numbers[0].type
        for at, first, second in zip(places, numbers, numbers[len(numbers) // 2 :], strict=False):
            cos, sin = (builder.load(_address(builder, base, 4 * at, kind), align=4) for base in (cosines, sines))
            negative = builder.fneg(second)
            turned = builder.fadd(builder.fmul(first, cos), builder.fmul(negative, sin, flags=_FAST), flags=_FAST)
            store_bf16(builder, head, at, turned)
            turned = builder.fadd(builder.fmul(second, cos), builder.fmul(first, sin, flags=_FAST), flags=_FAST)
            store_bf16(builder, head, half + at, turned)
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(head, weight, cosines, sines, size, eps, normed), emit


@intrinsic(prefer_literal=True)
def spread(_context: Any, source: Any, target: Any, size: Any, odd: Any) -> Any:
    """Copy `size` bf16 numbers to every second place, the odd ones if `odd`; what lies between stays untouched."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        source, target, _, odd = arguments
        lanes = _lanes(size.literal_value)
        half = ir.IntType(16)
        flag = builder.icmp_signed("!=", odd, ir.Constant(odd.type, 0))
        masks = [ir.Constant(ir.VectorType(ir.IntType(1), 2 * lanes), [1 - by, by] * lanes) for by in (0, 1)]
        mask = builder.select(flag, masks[1], masks[0])
        twice = ir.Constant(ir.VectorType(_WORD, 2 * lanes), [at // 2 for at in range(2 * lanes)])
        for at in range(0, size.literal_value, lanes):
            numbers = builder.load(_address(builder, source, 2 * at, ir.VectorType(half, lanes)), align=2)
            doubled = builder.shuffle_vector(numbers, ir.Constant(numbers.type, ir.Undefined), twice)
            place = _address(builder, target, 4 * at, doubled.type)
            call(builder, f"llvm.masked.store.v{2 * lanes}i16.p0", ir.VoidType(), doubled, place, _WORD(4), mask)
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(source, target, size, odd), emit


def _lanes(size: int) -> int:
    return math.gcd(size, LANES)


def _address(builder: Any, base: Any, offset: int, kind: Any) -> Any:
    moved = builder.add(base, ir.Constant(ir.IntType(64), offset))
    return builder.inttoptr(moved, kind.as_pointer())


def _load_bf16(builder: Any, base: Any, place: int, lanes: int) -> Any:
    """Bfloat16 from the `place`-th number on, widened to float32."""
    halves = builder.load(_address(builder, base, 2 * place, ir.VectorType(ir.IntType(16), lanes)), align=2)
    words = builder.zext(halves, ir.VectorType(_WORD, lanes))
    shifted = builder.shl(words, ir.Constant(words.type, [16] * lanes))
    return builder.bitcast(shifted, ir.VectorType(_FLOAT, lanes))


def store_bf16(builder: Any, base: Any, place: int, vector: Any) -> None:
    """A vector of float32, rounded to bfloat16, from the `place`-th number on."""
    halves = narrowed(builder, vector)
    builder.store(halves, _address(builder, base, 2 * place, halves.type), align=2)


def narrowed(builder: Any, vector: Any) -> Any:
    """The bits of the bfloat16 numbers nearest to a vector of float32, as `engine.cpu.jit.narrow` has them."""
    lanes = vector.type.count
    words, halves = ir.VectorType(_WORD, lanes), ir.VectorType(ir.IntType(16), lanes)
    bits = builder.bitcast(vector, words)
    shift, one, most = (ir.Constant(words, [number] * lanes) for number in (16, 1, 0x7FFF))
    odd = builder.and_(builder.lshr(bits, shift), one)
    return builder.trunc(builder.lshr(builder.add(bits, builder.add(odd, most)), shift), halves)


def _exp(builder: Any, vector: Any, lanes: int) -> Any:
    """As 2 to a whole number, made of exponent bits, times a polynomial in what is left. For arguments of at most 0."""
    kind = vector.type

    def constant(value: float) -> Any:
        return ir.Constant(kind, [value] * lanes)

    floor = constant(-87.0)
    vector = builder.select(builder.fcmp_ordered(">", vector, floor), vector, floor)
    scaled = builder.fmul(vector, constant(math.log2(math.e)))
    whole = call(builder, f"llvm.roundeven.v{lanes}f32", kind, scaled)
    rest = builder.fmul(builder.fsub(scaled, whole), constant(math.log(2)))
    result = constant(_EXP[0])
    for factor in _EXP[1:]:
        result = builder.fadd(builder.fmul(result, rest, flags=_FAST), constant(factor), flags=_FAST)
    words = ir.VectorType(_WORD, lanes)
    exponent = builder.add(builder.fptosi(whole, words), ir.Constant(words, [127] * lanes))
    power = builder.bitcast(builder.shl(exponent, ir.Constant(words, [23] * lanes)), kind)
    return builder.fmul(result, power)
