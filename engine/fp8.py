"""FP8 e4m3 numbers (arXiv 2209.05433) in plain torch: rounding to them, and matrices of them with their scales.

`value = quantised * scale`. Rounding is to nearest even and saturates at 448, the largest finite number. A scale is the
largest magnitude that it covers over 448, or 1 where all are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0
_DEQUANTISED_ROWS = 1024  # at once, or as many as whole tiles make: the float32 copy stays small


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Saturate and round, any float dtype; NaN stays NaN."""
    return values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(E4M3)


def quantise(values: torch.Tensor, *, tile_rows: int, tile_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per tile: `[M, K]` e4m3 and `[ceil(M / tile_rows), ceil(K / tile_columns)]` float32.

    Args:
        values: [M, K], finite, any float dtype; the last tiles may be cut short.
        tile_rows: of a tile, as `tile_columns` of any size.
        tile_columns: likewise.
    """
    num_rows, num_columns = values.shape
    down, across = -(-num_rows // tile_rows), -(-num_columns // tile_columns)
    padded = torch.zeros(down * tile_rows, across * tile_columns, dtype=torch.float32, device=values.device)
    padded[:num_rows, :num_columns] = values
    tiled = padded.view(down, tile_rows, across, tile_columns)
    largest = tiled.abs().amax(dim=(1, 3))
    scales = torch.where(largest > 0, largest / E4M3_LARGEST, 1.0)
    scaled = to_e4m3(tiled / scales[:, None, :, None])
    return scaled.view(padded.shape)[:num_rows, :num_columns].contiguous(), scales


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix `[out, in]` as the product reads it.

    Attributes:
        values: [out, in] e4m3, contiguous.
        scales: [out] float32, one per output channel; or [ceil(out / rows), ceil(in / columns)], one per tile.
        tile: (rows, columns) of a tile, None for scales per channel.
        input_scale: one scale for all inputs, measured when the checkpoint was made; None: each input its own.
    """

    values: torch.Tensor
    scales: torch.Tensor
    tile: tuple[int, int] | None = None
    input_scale: float | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """`[out, in]` in new memory, each product made in float32 and rounded once."""
        num_rows, num_columns = self.values.shape
        result = torch.empty((num_rows, num_columns), dtype=dtype, device=self.values.device)
        rows = _DEQUANTISED_ROWS if self.tile is None else -(-_DEQUANTISED_ROWS // self.tile[0]) * self.tile[0]
        for begin in range(0, num_rows, rows):
            part = self.values[begin : begin + rows].to(torch.float32)
            result[begin : begin + rows] = part.mul_(self._spread(begin, part.shape[0]))
        return result

    def _spread(self, begin: int, count: int) -> torch.Tensor:
        """Scales of rows `[begin, begin + count)`, shaped to multiply them."""
        if self.tile is None:
            return self.scales[begin : begin + count, None]
        rows, columns = self.tile
        first = begin // rows
        scales = self.scales[first : first - (-count // rows)]
        spread = scales.repeat_interleave(rows, dim=0)[:count]
        return spread.repeat_interleave(columns, dim=1)[:, : self.values.shape[1]]


def quantise_channels(weight: torch.Tensor) -> Fp8Matrix:
    """A matrix `[out, in]` with one scale per output channel."""
    values, scales = quantise(weight, tile_rows=1, tile_columns=weight.shape[1])
    return Fp8Matrix(values, scales.view(-1))


def product_twin(hidden: torch.Tensor, matrix: Fp8Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """Specification of an FP8 product, `[T, in]` to `[T, out]`: inputs are quantised too, then all is dequantised.

    Inputs have one scale per row, or per row of a tile where weights have scales per tile.
    """
    columns = hidden.shape[1] if matrix.tile is None else matrix.tile[1]
    if matrix.input_scale is None:
        quantised, scales = quantise(hidden, tile_rows=1, tile_columns=columns)
    else:
        scales = torch.full((hidden.shape[0], 1), matrix.input_scale, device=hidden.device)
        quantised = to_e4m3(hidden.to(torch.float32) / scales)
    inputs = Fp8Matrix(quantised, scales, tile=(1, columns)).dequantised(torch.float32)
    out = (inputs @ matrix.dequantised(torch.float32).T).to(hidden.dtype)
    return out if bias is None else out + bias
