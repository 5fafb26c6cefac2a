"""What a hand-off needs of a GPU's memory, as a narrow face: the tests put host memory in its place.

`CudaMemory` is the one place where cupy is imported. Pointers are plain integers, as the CUDA runtime has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from kvtransfer.errors import TransportUnavailable

HANDLE_BYTES = 64
"""Size of a CUDA IPC memory handle (cudaIpcMemHandle_t)."""

Run = tuple[int, int, int]
"""Destination, source, number of bytes."""


class DeviceMemory(Protocol):
    """One device's memory, its handles for other processes, and copies on a stream of their own."""

    def allocate(self, num_bytes: int) -> int:
        """Reserve memory in an allocation of its own, so that its handle names nothing else."""

    def free(self, pointer: int) -> None:
        """Give memory of `allocate` back."""

    def export(self, pointer: int) -> bytes:
        """A handle of `HANDLE_BYTES` by which another process on this host can open the allocation."""

    def open(self, handle: bytes) -> int:
        """Map another process's allocation. Raises: TransportUnavailable where the driver refuses."""

    def close(self, pointer: int) -> None:
        """Unmap what `open` returned."""

    def copy(self, runs: Sequence[Run]) -> None:
        """Copy within or between allocations on this object's own stream; on return all bytes are there."""

    def read(self, pointer: int, num_bytes: int) -> bytes:
        """Bytes of the device, on the host."""

    def write(self, pointer: int, data: memoryview) -> None:
        """Bytes of the host, onto the device; on return they are there."""


class DeviceArray:
    """Device bytes in the form that torch takes without a copy (`__cuda_array_interface__`, version 3)."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class CudaMemory:
    """`DeviceMemory` by the CUDA runtime, through cupy.

    Args:
        device: index of the device as this process sees it.

    Raises:
        TransportUnavailable: cupy is missing or finds no such device.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            import cupy
        except ImportError as error:
            raise TransportUnavailable("the cuda_ipc transport needs cupy: pip install 'baton-serve[gpu]'") from error
        self._cupy: Any = cupy
        self._runtime: Any = cupy.cuda.runtime
        self._device: Any = cupy.cuda.Device(device)
        try:
            with self._device:
                self._stream: Any = cupy.cuda.Stream(non_blocking=True)
                self._written: Any = cupy.cuda.Event(block=True, disable_timing=True)
        except self._runtime.CUDARuntimeError as error:
            raise TransportUnavailable(f"cuda_ipc: no CUDA device {device}: {error}") from error

    def allocate(self, num_bytes: int) -> int:
        """By `cudaMalloc`, around cupy's pool and torch's, which share out parts of larger allocations."""
        with self._device:
            return int(self._runtime.malloc(num_bytes))

    def free(self, pointer: int) -> None:
        """By `cudaFree`."""
        with self._device:
            self._runtime.free(pointer)

    def export(self, pointer: int) -> bytes:
        """By `cudaIpcGetMemHandle`."""
        with self._device:
            return bytes(self._runtime.ipcGetMemHandle(pointer))

    def open(self, handle: bytes) -> int:
        """By `cudaIpcOpenMemHandle`, with peer access where the other device is another one."""
        with self._device:
            try:
                return int(self._runtime.ipcOpenMemHandle(handle))
            except self._runtime.CUDARuntimeError as error:
                raise TransportUnavailable(f"cuda_ipc: the peer's pool cannot be opened: {error}") from error

    def close(self, pointer: int) -> None:
        """By `cudaIpcCloseMemHandle`."""
        with self._device:
            self._runtime.ipcCloseMemHandle(pointer)

    def copy(self, runs: Sequence[Run]) -> None:
        """Asynchronous copies, then an event that is waited for without spinning and without the interpreter lock."""
        kind = self._runtime.memcpyDeviceToDevice
        with self._device:
            for target, source, num_bytes in runs:
                self._runtime.memcpyAsync(target, source, num_bytes, kind, self._stream.ptr)
            self._written.record(self._stream)
            self._written.synchronize()

    def read(self, pointer: int, num_bytes: int) -> bytes:
        """Synchronous copy."""
        data = bytearray(num_bytes)
        with self._device:
            self._runtime.memcpy(_address(data), pointer, num_bytes, self._runtime.memcpyDeviceToHost)
        return bytes(data)

    def write(self, pointer: int, data: memoryview) -> None:
        """Synchronous copy."""
        source = bytearray(data)
        with self._device:
            self._runtime.memcpy(pointer, _address(source), len(source), self._runtime.memcpyHostToDevice)


def _address(data: bytearray) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)
