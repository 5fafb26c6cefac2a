"""What rows choose their tokens from: raw logits, edited ones in their place, and masks. Letters in `engine.kernels`.

Nothing is copied to make them float32: each reading widens them in registers, and puts the mask on.
"""
# ruff: noqa: N803

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from engine.kernels.jit import kernel, tiles


class RowLogits(NamedTuple):
    """The logits of R rows, as launchers take them.

    Attributes:
        raw: [R, V] of any floating type, columns contiguous.
        edited_rows: [R] int32, a row's row of `edited`, which it chooses from instead; -1 for none.
        edited: [Q, V] float32 contiguous.
        mask_rows: [R] int32, a row's row of `masks`; -1 may choose every token.
        masks: [C, ceil(V / 32)] int32 contiguous, bit `i % 32` of word `i // 32` allows id `i`.
    """

    raw: torch.Tensor
    edited_rows: torch.Tensor
    edited: torch.Tensor
    mask_rows: torch.Tensor
    masks: torch.Tensor

    @classmethod
    def plain(cls, raw: torch.Tensor) -> RowLogits:
        """Of rows without edits and masks."""
        nowhere = torch.full((raw.shape[0],), -1, dtype=torch.int32, device=raw.device)
        edited = torch.empty((1, raw.shape[1]), device=raw.device)
        masks = torch.empty((1, tiles(raw.shape[1], 32)), dtype=torch.int32, device=raw.device)
        return cls(raw, nowhere, edited, nowhere, masks)

    def check(self) -> None:
        """Raises: ValueError for shapes and layouts that the kernels do not read."""
        num_rows, vocab_size = self.raw.shape
        rows_fit = self.edited_rows.shape == self.mask_rows.shape == (num_rows,)
        columns_fit = self.edited.shape[1] == vocab_size and self.masks.shape[1] == tiles(vocab_size, 32)
        whole = self.raw.stride(1) == 1 and self.edited.is_contiguous() and self.masks.is_contiguous()
        types_fit = self.raw.is_floating_point() and self.edited.dtype is torch.float32
        if not (rows_fit and columns_fit and whole and types_fit):
            raise ValueError(f"cannot choose from {[f'{list(one.shape)} {one.dtype}' for one in self]}")


def row_logits_twin(logits: RowLogits) -> torch.Tensor:
    """What the rows choose from, `[R, V]` float32 new memory: the specification of `values_of`."""
    values = logits.raw.to(torch.float32, copy=True)
    vocab_size = values.shape[1]
    for row, (edited, mask) in enumerate(zip(logits.edited_rows.tolist(), logits.mask_rows.tolist(), strict=True)):
        if edited >= 0:
            values[row] = logits.edited[edited]
        if mask >= 0:
            bits = torch.arange(32, dtype=torch.int32, device=values.device)
            allowed = ((logits.masks[mask].unsqueeze(1) >> bits) & 1).flatten()[:vocab_size].bool()
            values[row].masked_fill_(~allowed, -torch.inf)
    return values


@kernel
def line_of(logits: tl.tuple, stride: tl.tensor, VOCAB: tl.constexpr) -> tl.tuple:
    """Where this program's row (axis 0) is read: its raw line, its edited one and whether, its mask and whether."""
    row = tl.program_id(0).to(tl.int64)
    edited_row, mask_row = tl.load(logits.edited_rows + row).to(tl.int64), tl.load(logits.mask_rows + row).to(tl.int64)
    words: tl.constexpr = (VOCAB + 31) // 32
    return (
        logits.raw + row * stride,
        logits.edited + tl.maximum(edited_row, 0) * VOCAB,
        edited_row >= 0,
        logits.masks + tl.maximum(mask_row, 0) * words,
        mask_row >= 0,
    )


@kernel
def values_of(line: tl.tuple, ids: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """Logits of some ids in float32; minus infinity where the mask forbids them, and past the end."""
    inside = ids < VOCAB
    if line[2]:
        values = tl.load(line[1] + ids, mask=inside, other=float("-inf"))
    else:
        values = tl.load(line[0] + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if line[4]:
        words = tl.load(line[3] + ids // 32, mask=inside, other=0)
        values = tl.where(((words >> (ids % 32)) & 1) != 0, values, float("-inf"))
    return values
