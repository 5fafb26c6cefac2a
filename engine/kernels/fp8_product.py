"""The product of FP8 inputs and FP8 weights with scales per tile, as DeepSeek-V3 (arXiv 2412.19437, 3.3) makes it.

Scales along K change every 128 columns, so each 128 columns' sum is scaled before it is added up, in float32. Products
with scales that are the same for a whole row and a whole column are cuBLAS's. Letters in `engine.kernels`.
"""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.kernels.jit import kernel, power_of_two, tiles

TILE = 128
_SMALLEST_DOT = 16
_FEW_ROWS = 16  # up to here reading weights bounds it, and many small programs read fastest


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
    (num_rows, width), (out, weight_width) = values.shape, weight.shape
    across = tiles(width, TILE)
    if (
        weight_width != width
        or value_scales.shape != (num_rows, across)
        or weight_scales.shape != (tiles(out, TILE), across)
    ):
        raise ValueError(
            f"{list(values.shape)} with scales {list(value_scales.shape)}, "
            f"weights {list(weight.shape)} with scales {list(weight_scales.shape)}"
        )
    if not all(one.is_contiguous() for one in (values, value_scales, weight, weight_scales)):
        raise ValueError("an FP8 product reads contiguous tensors")
    output = torch.empty((num_rows, out), dtype=torch.bfloat16, device=values.device)
    if num_rows == 0:
        return output
    few = num_rows <= _FEW_ROWS
    row_tile = _SMALLEST_DOT if few else min(TILE, power_of_two(num_rows))
    out_tile = 32 if few else TILE
    _product[(tiles(num_rows, row_tile), tiles(out, out_tile))](
        values,
        value_scales,
        weight,
        weight_scales,
        output,
        num_rows,
        OUT=out,
        WIDTH=width,
        ROW_TILE=row_tile,
        OUT_TILE=out_tile,
        SCALED=TILE,
        num_warps=4 if few else 8,
        num_stages=4 if few else 3,
    )
    return output


def fp8_tile_product_twin(
    values: torch.Tensor, value_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor
) -> torch.Tensor:
    """Specification of `fp8_tile_product`: both sides dequantised."""
    width, out = values.shape[1], weight.shape[0]
    left = values.to(torch.float32) * value_scales.repeat_interleave(TILE, dim=1)[:, :width]
    spread = weight_scales.repeat_interleave(TILE, dim=0)[:out].repeat_interleave(TILE, dim=1)[:, :width]
    return (left @ (weight.to(torch.float32) * spread).T).to(torch.bfloat16)


@kernel
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
) -> None:
    """One program: ROW_TILE x OUT_TILE of the output; OUT_TILE divides SCALED, so its columns share their scales."""
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
        scale = tl.load(value_scales + rows * across + at, mask=is_row, other=0.0) * tl.load(of_weight + at)
        total += tl.dot(left, right) * scale[:, None]
    target = output + rows[:, None] * OUT + outs[None, :]
    tl.store(target, total.to(output.dtype.element_ty), mask=is_row[:, None] & is_out[None, :])
