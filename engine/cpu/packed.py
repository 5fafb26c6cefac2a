"""A matrix in the layout of the kernel that multiplies it: arrays that only that kernel understands."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Packed:
    """What `engine.cpu.products.Products.pack` makes of a matrix and `Products.product` multiplies.

    Attributes:
        form: how the numbers are written, as the packer calls it.
        shape: outputs and inputs of the matrix, [N, K].
        arrays: contiguous, each beginning at a line of the caches (64 bytes); never written to once they are made, so
            that they may lie in a file that several processes read.
    """

    form: str
    shape: tuple[int, int]
    arrays: dict[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())
