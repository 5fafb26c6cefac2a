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
from engine.cpu.tiles import LANES

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
