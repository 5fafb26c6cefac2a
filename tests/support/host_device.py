"""Host memory in the place of a GPU's: the same face, handles that this process alone understands."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from kvtransfer.device_memory import HANDLE_BYTES, Run
from kvtransfer.errors import TransportUnavailable


class HostDevice:
    """Implements `kvtransfer.device_memory.DeviceMemory`; all instances share one device.

    Attributes:
        copies: runs of every `copy`, in order.
    """

    _allocations: dict[int, ctypes.Array[ctypes.c_char]] = {}  # noqa: RUF012  # the one device

    def __init__(self) -> None:
        self.copies: list[list[Run]] = []
        self.num_open = 0

    def allocate(self, num_bytes: int) -> int:
        buffer = ctypes.create_string_buffer(num_bytes)
        pointer = ctypes.addressof(buffer)
        self._allocations[pointer] = buffer
        return pointer

    def free(self, pointer: int) -> None:
        del self._allocations[pointer]

    def export(self, pointer: int) -> bytes:
        return pointer.to_bytes(HANDLE_BYTES, "little")

    def open(self, handle: bytes) -> int:
        pointer = int.from_bytes(handle, "little")
        if pointer not in self._allocations:
            raise TransportUnavailable("no such allocation")
        self.num_open += 1
        return pointer

    def close(self, pointer: int) -> None:
        del pointer
        self.num_open -= 1

    def copy(self, runs: Sequence[Run]) -> None:
        self.copies.append(list(runs))
        for target, source, num_bytes in runs:
            ctypes.memmove(target, source, num_bytes)

    def read(self, pointer: int, num_bytes: int) -> bytes:
        return ctypes.string_at(pointer, num_bytes)

    def write(self, pointer: int, data: memoryview) -> None:
        ctypes.memmove(pointer, bytes(data), len(data))
