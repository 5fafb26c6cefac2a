"""Products of FP8 inputs and FP8 weights: with scales per tile, and with scales per row and channel for few rows.

Scales per tile are DeepSeek-V3's (arXiv 2412.19437, 3.3): they change every 128 columns of K, so each 128 columns' sum
is scaled before it is added up, in float32. Without them those sums are still added up in float32, since the matrix
units' own sums of FP8 products are shorter. Letters in `engine.kernels`.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.kernels.fp8_tiles import SCALED, tiles_for
from engine.kernels.jit import tiles, varying

FEW_ROWS = 64
"""Up to here a product is bound by reading its weights, which many small programs read fastest."""


def fp8_tile_product(
    values: torch.Tensor, value_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """`values @ weight.T`. Graph-safe.

    Args:
        values: [M, K] e4m3 contiguous, as `fp8.quantise_tiles(..., tile_rows=1)` makes them.
        value_scales: [M, ceil(K / 128)] float32 contiguous.
        weight: [N, K] e4m3 contiguous.
        weight_scales: [ceil(N / 128), ceil(K / 128)] float32 contiguous.

    Returns:
        [M, N] bfloat16, new memory.
    """
    across = tiles(values.shape[1], SCALED)
    shapes = (values.shape[0], across), (tiles(weight.shape[0], SCALED), across)
    return _launch(values, value_scales, weight, weight_scales, shapes, by_tile=True)


def fp8_row_product(
    values: torch.Tensor, value_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """`values @ weight.T`. Graph-safe. Made for up to `FEW_ROWS` rows; right for any.

    Args:
        values: [M, K] e4m3 contiguous, as `fp8.quantise_rows` makes them.
        value_scales: [M] float32.
        weight: [N, K] e4m3 contiguous.
        weight_scales: [N] float32.

    Returns:
        [M, N] bfloat16, new memory.
    """
    shapes = (values.shape[0],), (weight.shape[0],)
    return _launch(values, value_scales, weight, weight_scales, shapes, by_tile=False)


def _launch(
    values: torch.Tensor,
    value_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    by_tile: bool,
) -> torch.Tensor:
    (num_rows, width), out = values.shape, weight.shape[0]
    if weight.shape[1] != width or (tuple(value_scales.shape), tuple(weight_scales.shape)) != shapes:
        raise ValueError(
            f"{list(values.shape)} with scales {list(value_scales.shape)}, "
            f"weights {list(weight.shape)} with scales {list(weight_scales.shape)}"
        )
    if not all(one.is_contiguous() for one in (values, value_scales, weight, weight_scales)):
        raise ValueError("an FP8 product reads contiguous tensors")
    output = torch.empty((num_rows, out), dtype=torch.bfloat16, device=values.device)
    if num_rows == 0:
        return output
    chosen = tiles_for(num_rows, width, out)
    _product[(tiles(num_rows, chosen.rows), tiles(out, chosen.outs))](
        values,
        value_scales,
        weight,
        weight_scales,
        output,
        num_rows,
        OUT=out,
        WIDTH=width,
        ROW_TILE=chosen.rows,
        OUT_TILE=chosen.outs,
        SCALED=SCALED,
        BY_TILE=by_tile,
        num_warps=chosen.warps,
        num_stages=chosen.stages,
    )
    return output


def fp8_tile_product_twin(
    values: torch.Tensor, value_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Specification of `fp8_tile_product`: both sides dequantised."""
    width, out = values.shape[1], weight.shape[0]
    left = values.to(torch.float32) * value_scales.repeat_interleave(SCALED, dim=1)[:, :width]
    spread = weight_scales.repeat_interleave(SCALED, dim=0)[:out].repeat_interleave(SCALED, dim=1)[:, :width]
    return (left @ (weight.to(torch.float32) * spread).T).to(torch.bfloat16)


def fp8_row_product_twin(
    values: torch.Tensor, value_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Specification of `fp8_row_product`: both sides dequantised."""
    left, right = values.to(torch.float32) * value_scales[:, None], weight.to(torch.float32) * weight_scales[:, None]
    return (left @ right.T).to(torch.bfloat16)


@varying("num_rows")
def _product(
    values: tl.tensor,
    value_scales: tl.tensor,
    weight: tl.tensor,
    weight_scales: tl.tensor,
    output: tl.tensor,
    num_rows: tl.tensor,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_TILE: tl.constexpr,
    OUT_TILE: tl.constexpr,
    SCALED: tl.constexpr,
    BY_TILE: tl.constexpr,
) -> None:
    """One program: ROW_TILE x OUT_TILE of the output; OUT_TILE divides SCALED, so its columns share a tile's scales."""
    across: tl.constexpr = (WIDTH + SCALED - 1) // SCALED
    rows = (tl.program_id(0) * ROW_TILE + tl.arange(0, ROW_TILE)).to(tl.int64)
    outs = (tl.program_id(1) * OUT_TILE + tl.arange(0, OUT_TILE)).to(tl.int64)
    is_row, is_out = rows < num_rows, outs < OUT
    of_weight = weight_scales + (tl.program_id(1) * OUT_TILE // SCALED) * across
    total = tl.zeros((ROW_TILE, OUT_TILE), tl.float32)
    for at in tl.range(0, across):
        columns = at * SCALED + tl.arange(0, SCALED)
        inside = columns < WIDTH
        left = tl.load(
            values + rows[:, None] * WIDTH + columns[None, :], mask=is_row[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            weight + outs[None, :] * WIDTH + columns[:, None], mask=is_out[None, :] & inside[:, None], other=0.0
        )
        partial = tl.dot(left, right)
        if BY_TILE:
            scale = tl.load(value_scales + rows * across + at, mask=is_row, other=0.0) * tl.load(of_weight + at)
            partial *= scale[:, None]
        total += partial
    if not BY_TILE:
        of_rows = tl.load(value_scales + rows, mask=is_row, other=0.0)
        total *= of_rows[:, None] * tl.load(weight_scales + outs, mask=is_out, other=0.0)[None, :]
    target = output + rows[:, None] * OUT + outs[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])
