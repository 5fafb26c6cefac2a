"""SiLU of the gate times the up projection (SwiGLU, arXiv 2002.05202). Letters in `engine.kernels`."""
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton.language as tl
from torch.nn import functional

from engine.kernels.jit import kernel, power_of_two, tiles

_MOST_COLUMNS = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`. Graph-safe.

    Args:
        gate_up: [T, 2 * I], gates first, columns contiguous; not mutated.

    Returns:
        [T, I], new memory. The activation is rounded to the dtype before the product, as the twin's two passes do.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"no gate and up in {list(gate_up.shape)}, strides {list(gate_up.stride())}")
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if product.numel() == 0:
        return product
    tile = min(_MOST_COLUMNS, power_of_two(width))
    _silu_mul[(num_tokens, tiles(width, tile))](gate_up, product, gate_up.stride(0), WIDTH=width, TILE=tile)
    return product


def silu_mul_twin(gate_up: torch.Tensor) -> torch.Tensor:
    """Specification of `silu_mul`; what `engine.backend.TorchBackend.gated_silu` computes."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@kernel
def _silu_mul(
    gate_up: tl.tensor, product: tl.tensor, row_stride: tl.tensor, WIDTH: tl.constexpr, TILE: tl.constexpr
) -> None:
    """One program: TILE columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    row = gate_up + token * row_stride + columns
    gate = tl.load(row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + WIDTH, mask=inside, other=0.0).to(tl.float32)
    activated = (gate * tl.sigmoid(gate)).to(product.dtype.element_ty).to(tl.float32)
    tl.store(product + token * WIDTH + columns, (activated * up).to(product.dtype.element_ty), mask=inside)
