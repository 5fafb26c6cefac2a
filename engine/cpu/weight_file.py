"""A file of packed matrices that any number of processes map: how it is written, and how it is opened and believed.

    matrices, each beginning at a page | directory, in msgpack | footer

The footer tells where the directory lies and what it hashes to, so a file that was cut, or never finished, has none. Of
each matrix the directory tells a digest of the sums of its pages, which costs one reading from memory. So nothing has
to be forced to the disk before the file may be used: what a power cut tears is found when it is next opened.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import struct
import warnings
from hashlib import blake2b
from typing import Final

import msgspec
import torch

from engine.cpu.packed import Packed
from engine.errors import WeightFileRefused

FORMAT: Final = "baton-weights-1"
_PAGE: Final = 4096
_LINE: Final = 64
_FOOTER: Final = struct.Struct("<16sQQ32s")  # format, place and length of the directory, its digest
_ROOM: Final = 64 * 2**20
_DTYPES: Final = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32)
}


class _Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One array: its dtype as torch spells it, and where it begins in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Matrix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One packed matrix: its arrays by name, the whole pages that hold them, and the digest of those."""

    form: str
    shape: tuple[int, int]
    arrays: dict[str, _Array]
    offset: int
    num_bytes: int
    digest: bytes


class _Directory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the file holds. `identity` is what its reader must ask for."""

    identity: str
    matrices: dict[str, _Matrix]


class WeightFileWriter:
    """Appends matrices to an open, empty file and hands them back as they lie in it."""

    def __init__(self, descriptor: int, identity: str, num_bytes: int) -> None:
        """Reserve room on the disk for `num_bytes` of matrices. Raises OSError, ENOSPC where there is none."""
        self._descriptor = descriptor
        self._identity = identity
        self._end = 0
        self._matrices: dict[str, _Matrix] = {}
        os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
        # Mapped once for all that may come, though it ends long before: addresses cost nothing until they are read.
        self._size = 2 * num_bytes + _ROOM
        os.ftruncate(descriptor, self._size)
        self._bytes = _map(descriptor, self._size)

    def add(self, name: str, packed: Packed) -> Packed:
        """Write a matrix; the same one in the mapped file. Raises OSError, and what was added before stays usable."""
        arrays, at = {}, self._end
        for key, array in packed.arrays.items():
            arrays[key] = _Array(str(array.dtype).removeprefix("torch."), tuple(array.shape), at)
            at = _rounded(at + array.nbytes, _LINE)
        end = _rounded(at, _PAGE)
        if end > self._size:
            raise OSError(errno.EFBIG, "packed matrices are larger than room was made for")
        os.posix_fallocate(self._descriptor, self._end, max(end - self._end, 1))
        for key, array in packed.arrays.items():
            _write(self._descriptor, array.reshape(-1).view(torch.uint8).numpy().data, arrays[key].offset)
        digest = _digest(self._bytes[self._end : end])
        matrix = _Matrix(packed.form, packed.shape, arrays, self._end, end - self._end, digest)
        self._matrices[name], self._end = matrix, end
        return _packed(matrix, self._bytes)

    def finish(self) -> None:
        """Write directory and footer, after which the file can be opened. Raises OSError."""
        directory = msgspec.msgpack.encode(_Directory(self._identity, self._matrices))
        hashed = blake2b(directory, digest_size=32).digest()
        tail = directory + _FOOTER.pack(FORMAT.encode(), self._end, len(directory), hashed)
        _write(self._descriptor, memoryview(tail), self._end)
        os.ftruncate(self._descriptor, self._end + len(tail))


def open_weight_file(descriptor: int, identity: str) -> dict[str, Packed]:
    """Map a finished file; its matrices by name, in memory that nobody can write to.

    The mapping, and with it the lock on `descriptor`, lasts as long as any of them.

    Raises:
        WeightFileRefused: it is not ours, not whole, or holds something else.
        OSError: it cannot be read.
    """
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o022:
        raise WeightFileRefused("it is not a file that only this user can write to")
    if about.st_size < _FOOTER.size:
        raise WeightFileRefused("it is cut short")
    footer = os.pread(descriptor, _FOOTER.size, about.st_size - _FOOTER.size)
    name, offset, length, hashed = _FOOTER.unpack(footer)
    if name.rstrip(b"\0") != FORMAT.encode() or offset + length + _FOOTER.size != about.st_size:
        raise WeightFileRefused("it is cut short, or of another format")
    content = os.pread(descriptor, length, offset)
    if blake2b(content, digest_size=32).digest() != hashed:
        raise WeightFileRefused("its directory is damaged")
    directory = msgspec.msgpack.decode(content, type=_Directory)  # as this format's writer wrote it, says the digest
    if directory.identity != identity:
        raise WeightFileRefused("it holds other weights")
    mapped = _map(descriptor, about.st_size)
    for key, matrix in directory.matrices.items():
        if _digest(mapped[matrix.offset : matrix.offset + matrix.num_bytes]) != matrix.digest:
            raise WeightFileRefused(f"its matrix {key} is damaged")
    return {key: _packed(matrix, mapped) for key, matrix in directory.matrices.items()}


def _packed(matrix: _Matrix, mapped: torch.Tensor) -> Packed:
    arrays = {}
    for key, array in matrix.arrays.items():
        dtype = _DTYPES[array.dtype]
        num_bytes = math.prod(array.shape) * dtype.itemsize
        arrays[key] = mapped[array.offset : array.offset + num_bytes].view(dtype).view(array.shape)
    return Packed(matrix.form, matrix.shape, arrays)


def _digest(pages: torch.Tensor) -> bytes:
    """Of the sums of whole pages, [bytes] uint8: a reading costs no more, and each page counts in its place."""
    words = pages.view(torch.int64)
    sums = words.view(len(words) * 8 // _PAGE, _PAGE // 8).sum(1)
    return blake2b(sums.numpy().data, digest_size=16).digest()


def _map(descriptor: int, size: int) -> torch.Tensor:
    """The file as bytes, [size] uint8, that cannot be written to. Raises OSError, ValueError."""
    mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nor will it be written to
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    """All of it; one call writes 2 GiB at most."""
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
