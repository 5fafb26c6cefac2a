"""Quantisation to FP8 e4m3 with one scale per tensor, per row or per tile; `engine.fp8` says what a scale is.

Inputs are finite. Per row serves activations (a row is a token) and
weights `[out, in]` (a row is an output channel); tiles of 1 x 128 for activations and 128 x 128 for weights are those
of DeepSeek-V3 (arXiv 2412.19437, 3.3). Letters in `engine.kernels`.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.fp8 import E4M3_LARGEST, quantise, to_e4m3
from engine.kernels.jit import kernel, power_of_two, tiles

_LARGEST = tl.constexpr(E4M3_LARGEST)
_MOST_COLUMNS = 2048


def quantise_tensor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for all: `[M, K]` e4m3 and `[1]` float32. Two launches, graph-safe.

    Args:
        values: [M, K] float32, bfloat16 or float16, columns contiguous.
    """
    num_rows, num_columns = _checked(values)
    largest = torch.zeros(1, dtype=torch.float32, device=values.device)
    quantised = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    scale = torch.ones(1, dtype=torch.float32, device=values.device)
    if values.numel():
        tile = min(_MOST_COLUMNS, power_of_two(num_columns))
        grid = (num_rows, tiles(num_columns, tile))
        _largest_magnitude[grid](values, largest, values.stride(0), COLUMNS=num_columns, TILE=tile)
        _quantise_by[grid](values, largest, quantised, scale, values.stride(0), COLUMNS=num_columns, TILE=tile)
    return quantised, scale


def quantise_rows(values: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per row: `[M, K]` e4m3 and `[M]` float32. Graph-safe.

    Args:
        values: as `quantise_tensor`.
        scale: of all rows, known before: numbers beyond 448 times it saturate. None: each row its own.
    """
    num_rows, num_columns = _checked(values)
    quantised = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    scales = torch.ones(num_rows, dtype=torch.float32, device=values.device)
    if values.numel():
        tile = min(_MOST_COLUMNS, power_of_two(num_columns))
        _quantise_rows[(num_rows,)](
            values,
            quantised,
            scales,
            scale or 0.0,
            values.stride(0),
            COLUMNS=num_columns,
            TILE=tile,
            MEASURES=scale is None,
        )
    return quantised, scales


def quantise_tiles(
    values: torch.Tensor, *, tile_rows: int = 128, tile_columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale per tile: `[M, K]` e4m3 and `[ceil(M / tile_rows), ceil(K / tile_columns)]` float32. Graph-safe.

    Args:
        values: as `quantise_tensor`; the last tiles may be cut short.
        tile_rows: a power of two.
        tile_columns: a power of two.
    """
    num_rows, num_columns = _checked(values)
    if power_of_two(tile_rows) != tile_rows or power_of_two(tile_columns) != tile_columns:
        raise ValueError(f"tiles of {tile_rows} x {tile_columns} are no powers of two")
    quantised = torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device)
    grid = (tiles(num_rows, tile_rows), tiles(num_columns, tile_columns))
    scales = torch.ones(grid, dtype=torch.float32, device=values.device)
    if values.numel():
        _quantise_tiles[grid](
            values,
            quantised,
            scales,
            values.stride(0),
            num_rows,
            COLUMNS=num_columns,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            num_warps=8 if tile_rows * tile_columns > 4096 else 4,
        )
    return quantised, scales


def quantise_tensor_twin(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `quantise_tensor`."""
    quantised, scales = quantise_tiles_twin(
        values, tile_rows=max(1, values.shape[0]), tile_columns=max(1, values.shape[1])
    )
    return quantised, scales.view(-1) if scales.numel() else torch.ones(1)


def quantise_rows_twin(values: torch.Tensor, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `quantise_rows`."""
    if scale is not None:
        scales = torch.full((values.shape[0],), scale, dtype=torch.float32, device=values.device)
        return to_e4m3(values.to(torch.float32) / scales[:, None]), scales
    quantised, scales = quantise_tiles_twin(values, tile_rows=1, tile_columns=max(1, values.shape[1]))
    return quantised, scales.view(-1)


def quantise_tiles_twin(
    values: torch.Tensor, *, tile_rows: int = 128, tile_columns: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `quantise_tiles`; here tiles may be of any size."""
    return quantise(values, tile_rows=tile_rows, tile_columns=tile_columns)


def _checked(values: torch.Tensor) -> tuple[int, int]:
    if values.dim() != 2 or values.stride(1) != 1:
        raise ValueError(f"cannot quantise shape {list(values.shape)}, strides {list(values.stride())}")
    return values.shape[0], values.shape[1]


@kernel
def _scale_of(largest: tl.tensor) -> tl.tensor:
    """What the largest magnitudes are divided by; exact division, so that a CPU finds the same bits."""
    return tl.where(largest > 0, tl.math.div_rn(largest, tl.full(largest.shape, _LARGEST, tl.float32)), 1.0)


@kernel
def _to_e4m3(values: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """Divide, saturate, round. Both arguments of one shape."""
    return saturate(tl.math.div_rn(values, scale))


@kernel
def saturate(values: tl.tensor) -> tl.tensor:
    """Float32 to e4m3, as `engine.fp8.to_e4m3`."""
    return tl.clamp(values, -_LARGEST, _LARGEST, tl.PropagateNan.ALL).to(tl.float8e4nv)


@kernel
def _largest_magnitude(
    values: tl.tensor, largest: tl.tensor, row_stride: tl.tensor, COLUMNS: tl.constexpr, TILE: tl.constexpr
) -> None:
    """One program: TILE columns of one row, into one number. A maximum is the same in whatever order it is taken."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    loaded = tl.load(values + row * row_stride + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    tl.atomic_max(largest, tl.max(tl.abs(loaded), axis=0))


@kernel
def _quantise_by(
    values: tl.tensor,
    largest: tl.tensor,
    quantised: tl.tensor,
    scales: tl.tensor,
    row_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program: TILE columns of one row, by the scale of the whole tensor."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < COLUMNS
    scale = _scale_of(tl.load(largest + tl.zeros((1,), tl.int32)))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(scales + tl.arange(0, 1), scale)
    loaded = tl.load(values + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    result = _to_e4m3(loaded, tl.broadcast_to(scale, (TILE,)))
    tl.store(quantised + row * COLUMNS + columns, result, mask=inside)


@kernel
def _quantise_rows(
    values: tl.tensor,
    quantised: tl.tensor,
    scales: tl.tensor,
    given: tl.tensor,
    row_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    MEASURES: tl.constexpr,
) -> None:
    """One program: one row, read twice unless its scale is given; the second time from a cache."""
    row = tl.program_id(0).to(tl.int64)
    source = values + row * row_stride
    if MEASURES:
        largest = tl.zeros((TILE,), tl.float32)
        for begin in tl.range(0, COLUMNS, TILE):
            columns = begin + tl.arange(0, TILE)
            loaded = tl.load(source + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(loaded))
        scale = _scale_of(tl.max(largest, axis=0, keep_dims=True))
    else:
        scale = tl.zeros((1,), tl.float32) + given
    tl.store(scales + row + tl.arange(0, 1), scale)
    for begin in tl.range(0, COLUMNS, TILE):
        columns = begin + tl.arange(0, TILE)
        inside = columns < COLUMNS
        loaded = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
        result = _to_e4m3(loaded, tl.broadcast_to(scale, (TILE,)))
        tl.store(quantised + row * COLUMNS + columns, result, mask=inside)


@kernel
def _quantise_tiles(
    values: tl.tensor,
    quantised: tl.tensor,
    scales: tl.tensor,
    row_stride: tl.tensor,
    num_rows: tl.tensor,
    COLUMNS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """One program: one tile, read once."""
    rows = (tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (rows < num_rows) & (columns < COLUMNS)
    loaded = tl.load(values + rows * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    by_row = tl.max(tl.abs(loaded), axis=1, keep_dims=True)
    scale = _scale_of(tl.max(by_row, axis=0, keep_dims=True))
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scales + place + tl.zeros((1, 1), tl.int32), scale)
    result = _to_e4m3(loaded, tl.broadcast_to(scale, (TILE_ROWS, TILE_COLUMNS)))
    tl.store(quantised + rows * COLUMNS + columns, result, mask=inside)
