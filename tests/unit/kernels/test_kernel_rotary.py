"""Norm, rotation and page writes in one launch against the operations of the forward pass."""

from __future__ import annotations

import pytest
import torch
from kernel_kit import assert_close

from engine.kernels.rotary_page_write import rotary_page_write, rotary_page_write_twin
from engine.rope import Rotary
from engine.rope_config import RopeConfig


def angle_table(head_dim: int, positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What a backend would keep: cosines and sines by position."""
    config = RopeConfig(kind="default", theta=10_000.0, dim=head_dim, original_max_positions=64, max_length=64)
    at = torch.arange(positions, device=device)
    return torch.cat(Rotary(config, device).cos_sin(at, at, dtype), dim=-1).squeeze(1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "page_size"),
    [(1, 1, 2, 1), (4, 2, 16, 4), (7, 1, 80, 16), (12, 12, 64, 3)],
)
def test_equals_the_forward_pass(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    norms: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    num_tokens, num_pages = 6, 9
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim + 3, device=device).to(dtype)[:, :-3]
    pool = torch.randn(num_pages, 3, 2, num_kv_heads, page_size, head_dim, device=device).to(dtype)
    expected_pool = pool.clone()
    weights = torch.randn(2, head_dim, device=device).to(dtype) if norms else [None, None]
    angles = angle_table(head_dim, 50, dtype, device)
    positions = torch.tensor([0, 49, 7, 3, 3, 12], device=device)
    slots = torch.randperm(num_pages * page_size, device=device)[:num_tokens]
    slots[3] = -1
    results = [
        call(
            qkv,
            angles,
            positions,
            slots,
            over[:, 1],
            num_heads=num_heads,
            query_norm=weights[0],
            key_norm=weights[1],
            eps=1e-6,
        )
        for call, over in ((rotary_page_write, pool), (rotary_page_write_twin, expected_pool))
    ]
    assert_close("queries", results[0], results[1], roundings=4)
    assert_close("pool", pool, expected_pool, roundings=4)
    assert torch.equal(pool[:, :, 1], expected_pool[:, :, 1]), "values are copied, not computed"
    assert torch.equal(pool[:, [0, 2]], expected_pool[:, [0, 2]])


def test_a_value_of_infinity_passes_by(device: torch.device) -> None:
    qkv = torch.ones(1, 3 * 4, device=device)
    qkv[0, 8:] = torch.inf
    layer = torch.zeros(1, 2, 1, 2, 4, device=device)
    at = torch.zeros(1, dtype=torch.int64, device=device)
    rotary_page_write(qkv, torch.rand(1, 4, device=device), at, at, layer, num_heads=1)
    assert bool((layer[0, 1, 0, 0] == torch.inf).all())
    assert not layer[0, :, 0, 1].any()


def test_no_tokens_and_bad_shapes(device: torch.device) -> None:
    layer, angles = torch.zeros(1, 2, 1, 2, 4, device=device), torch.rand(1, 4, device=device)
    at = torch.zeros(0, dtype=torch.int64, device=device)
    qkv = torch.zeros(0, 12, device=device)
    assert rotary_page_write(qkv, angles, at, at, layer, num_heads=1).shape == (0, 1, 4)
    with pytest.raises(ValueError, match="heads of 4"):
        rotary_page_write(qkv, angles, at, at, layer, num_heads=2)
    with pytest.raises(ValueError, match="not a layer"):
        rotary_page_write(qkv, angles, at, at, layer.transpose(3, 4), num_heads=1)
    with pytest.raises(ValueError, match="do not turn"):
        rotary_page_write(qkv, angles[:, :2], at, at, layer, num_heads=1)
    with pytest.raises(ValueError, match="come together"):
        rotary_page_write(qkv, angles, at, at, layer, num_heads=1, query_norm=torch.ones(4, device=device))
