"""Root-mean-square norm (arXiv 1910.07467), alone or after a residual addition. Letters in `engine.kernels`."""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl

from engine.kernels.jit import kernel, power_of_two, tiles

_TILE_ELEMENTS = 4096  # of one program: enough loads in flight for narrow rows, few registers for wide ones


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm over the last axis. Graph-safe.

    Args:
        hidden: [T, E] or [T, H, E], any float dtype, last axis contiguous; rows may be strided.
        weight: [E].
        eps: added to the mean square.

    Returns:
        As `hidden`, new contiguous memory; computed in float32, rounded once.
    """
    normed = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    _launch(hidden, None, weight, eps, normed, None)
    return normed


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add, then norm, reading and writing each row once. Graph-safe.

    Args:
        hidden: [T, E], what a sublayer returned.
        residual: [T, E], same dtype.
        weight: [E].
        eps: added to the mean square.

    Returns:
        The norm of the new residual, and the new residual `residual + hidden` rounded to its dtype; [T, E], new memory.
    """
    if hidden.shape != residual.shape or hidden.dtype != residual.dtype or residual.dim() != 2:
        raise ValueError(f"{list(hidden.shape)} {hidden.dtype} does not add to {list(residual.shape)} {residual.dtype}")
    normed, summed = (torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) for _ in range(2))
    _launch(hidden, residual, weight, eps, normed, summed)
    return normed, summed


def rms_norm_twin(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Specification of `rms_norm`; what `engine.backend.TorchBackend.rms_norm` computes."""
    values = hidden.to(torch.float32)
    scale = torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * scale * weight).to(hidden.dtype)


def add_rms_norm_twin(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Specification of `add_rms_norm`."""
    summed = residual + hidden
    return rms_norm_twin(summed, weight, eps), summed


def _launch(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    normed: torch.Tensor,
    summed: torch.Tensor | None,
) -> None:
    width = hidden.shape[-1]
    heads = hidden.shape[1] if hidden.dim() == 3 else 1
    if hidden.dim() not in {2, 3} or weight.shape != (width,) or hidden.stride(-1) != 1 or weight.stride(0) != 1:
        raise ValueError(f"cannot norm {list(hidden.shape)}, strides {list(hidden.stride())}, by {list(weight.shape)}")
    if residual is not None and residual.stride(-1) != 1:
        raise ValueError(f"residual of strides {list(residual.stride())}")
    if hidden.numel() == 0:
        return
    width_tile = power_of_two(width)
    row_tile = max(1, min(_TILE_ELEMENTS // width_tile, power_of_two(heads)))
    _rms_norm[(hidden.shape[0], tiles(heads, row_tile))](
        hidden,
        residual,
        weight,
        normed,
        summed,
        hidden.stride(0),
        hidden.stride(1) if hidden.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        HEADS=heads,
        WIDTH=width,
        ROW_TILE=row_tile,
        WIDTH_TILE=width_tile,
        ADDS=residual is not None,
        num_warps=8 if row_tile * width_tile > 4096 else 4,
    )


@kernel
def _rms_norm(
    hidden: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    normed: tl.tensor,
    summed: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_TILE: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    ADDS: tl.constexpr,
) -> None:
    """One program: ROW_TILE heads of one token, or one token's whole width."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)[:, None]
    columns = tl.arange(0, WIDTH_TILE)[None, :]
    inside = (heads < HEADS) & (columns < WIDTH)
    packed = (token * HEADS + heads) * WIDTH + columns
    values = tl.load(hidden + token * token_stride + heads * head_stride + columns, mask=inside, other=0.0)
    values = values.to(tl.float32)
    if ADDS:
        values += tl.load(residual + token * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(summed.dtype.element_ty)
        tl.store(summed + packed, rounded, mask=inside)
        values = rounded.to(tl.float32)  # the norm of what the next layer will see
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    weights = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    result = values * scale[:, None] * weights
    tl.store(normed + packed, result.to(normed.dtype.element_ty), mask=inside)
