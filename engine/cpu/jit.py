"""Machine code for CPUs without a compiler on the machine, run by the threads that torch already has.

numba compiles the kernels (about two seconds at the first start of a shape, then from its cache on disk). Its own
thread pools would fight torch's for the cores: an OpenMP thread spins for a while after each product, waiting for the
next one. So a kernel is a plain C function, and the OpenMP runtime that torch loaded runs it on the very team that
computes the products. `omp_get_thread_num` tells each member its share.

A kernel takes one array of 64-bit words: addresses of tensors, sizes, and the like, in an order of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from engine.errors import NoKernels

SIGNATURE = types.void(types.CPointer(types.int64))
_FAST_MATH = {"contract", "reassoc", "nsz", "arcp"}  # not nnan, ninf: scores may be infinite


def kernel(function: Callable[[Any], None], *, exact: bool = False, cached: bool = True) -> Any:
    """Compile a kernel; numba keeps the result on disk beside the source, or in the user's cache (NUMBA_CACHE_DIR).

    Of several processes that want it at the same time one compiles it, and the others load what that one has kept.

    Args:
        function: in the part of Python that numba knows.
        exact: every product and sum is rounded as written, on every processor; else they may be fused and reordered.
        cached: False where what the function closes over cannot be told from its source and plain values.
    """
    options = {"fastmath": False if exact else _FAST_MATH, "error_model": "numpy"}
    compiled: Any = CFunc(function, (SIGNATURE.args, SIGNATURE.return_type), locals={}, options=options)
    with contextlib.ExitStack() as alone:
        if cached:
            with contextlib.suppress(RuntimeError):  # neither place can be written: compiled anew at every start
                cache = _Cache(function)
                alone.enter_context(cache.alone())
                compiled._cache = cache  # noqa: SLF001 - as `CFunc.enable_caching` does with numba's own
        compiled.compile()
    return compiled


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's own asks whether a function's file has changed; a kernel is made of other files' code too."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        super().__init__(function)
        stamp = (self._impl.locator.get_source_stamp(), source_digest())
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, stamp)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process, be it killed, is amid loading, compiling or keeping any kernel of this function.

        numba takes the first free number for a file and then writes the index: two processes that keep different
        kernels of one function at once would take the same, and find the wrong machine code there ever after.
        """
        with Path(self._cache_path, f"{self._impl.filename_base}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@functools.cache
def source_digest(package: Path = Path(__file__).parent) -> str:
    """Of the kernels' sources, and of the modules beside the package whose constants they take."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(package.glob("*.py")), package.parent / "candidates.py", package.parent / "choice.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_GRAIN = 2**15
"""Numbers for which one more thread pays."""


class Team:
    """The OpenMP threads of torch.

    Raises:
        NoKernels: this build of torch brings no GNU OpenMP.
    """

    def __init__(self) -> None:
        found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
        if not found:
            raise NoKernels("this build of torch brings no GNU OpenMP runtime")
        runtime = ctypes.CDLL(str(found[0]))
        self._parallel = runtime.GOMP_parallel
        self._parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._parallel.restype = None

    def run(self, compiled: Any, words: Sequence[int], numbers: int | None = None) -> None:
        """Run a kernel on as many threads as torch uses; returns when all have ended.

        Args:
            compiled: what `kernel` returned.
            words: its array of 64-bit words; what they point to must stay alive meanwhile.
            numbers: that it computes, where they may be too few for so many threads: to wait for another one takes
                longer than a few thousand, and far longer when other processes want the cores too.
        """
        threads = torch.get_num_threads()
        if numbers is not None:
            threads = min(threads, 1 + numbers // _GRAIN)
        array = np.array(words, dtype=np.int64)
        self._parallel(compiled.address, array.ctypes.data, threads, 0)


@intrinsic
def thread_num(_context: Any) -> Any:
    """Which member of the team runs this, from 0."""
    return _call_int32("omp_get_thread_num")


@intrinsic
def num_threads(_context: Any) -> Any:
    """How many members the team has."""
    return _call_int32("omp_get_num_threads")


def _call_int32(name: str) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        return builder.sext(call(builder, name, ir.IntType(32)), ir.IntType(64))

    return types.int64(), emit


def call(builder: Any, name: str, kind: Any, *arguments: Any, flags: Sequence[str] = ()) -> Any:
    """Emit a call of an LLVM intrinsic, or of a function that the process has, with a result of type `kind`."""
    module = builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(kind, [argument.type for argument in arguments]), name)
    return builder.call(function, arguments, fastmath=flags)


@intrinsic
def claim(_context: Any, _counter: Any) -> Any:
    """Add 1 to the int64 at an address, for all threads at once; what it was."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], word.as_pointer()), word(1), "monotonic")

    return types.int64(types.int64), emit


@intrinsic
def pointer(_context: Any, _address: Any) -> Any:
    """An address as something that `carray` takes."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), emit


@intrinsic
def widen(_context: Any, _bits: Any) -> Any:
    """The float32 that equals a bfloat16, given by its bits."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(types.uint16), emit


@intrinsic
def narrow(_context: Any, _value: Any) -> Any:
    """The bits of the bfloat16 nearest to a float32, ties to even as everywhere. Not for NaN."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, word(16)), ir.IntType(16))

    return types.uint16(types.float32), emit


@intrinsic
def bits_of(_context: Any, _value: Any) -> Any:
    """The bits of a float32 as a signed word."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.sext(builder.bitcast(arguments[0], ir.IntType(32)), ir.IntType(64))

    return types.int64(types.float32), emit


@intrinsic
def float_of(_context: Any, _bits: Any) -> Any:
    """The float32 with these bits, the low 32 of a word."""

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.trunc(arguments[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), emit
