"""Pages to and from a staging buffer: bytes, not numbers."""

from __future__ import annotations

import pytest
import torch

from engine.kernels.pages import gather_pages, gather_pages_twin, scatter_pages, scatter_pages_twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("page_shape", [(2, 2, 1, 4, 16), (1, 2, 1, 3, 1), (3, 2, 2, 16, 40), (5,)])
def test_pages_go_out_and_come_back(page_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    pool = torch.randn(11, *page_shape, device=device).to(dtype)
    ids = torch.tensor([4, 0, -1, 10, 7], device=device)
    staged, expected = (torch.zeros(6, *page_shape, dtype=dtype, device=device) for _ in range(2))
    gather_pages(pool, ids, staged)
    gather_pages_twin(pool.view(torch.int8), ids, expected.view(torch.int8))
    assert torch.equal(staged.view(torch.int8), expected.view(torch.int8))
    assert not staged[[2, 5]].view(torch.int8).any(), "a negative id and the buffer's end stay as they are"

    target, expected_target = (torch.ones_like(pool) for _ in range(2))
    to = torch.tensor([9, 3, 1, -1, 2], dtype=torch.int32, device=device)
    scatter_pages(staged, to, target)
    scatter_pages_twin(staged.view(torch.int8), to, expected_target.view(torch.int8))
    assert torch.equal(target.view(torch.int8), expected_target.view(torch.int8))
    assert torch.equal(target[9].view(torch.int8), pool[4].view(torch.int8))


def test_nothing_to_move_and_refusals(device: torch.device) -> None:
    pool, staging = torch.ones(3, 2, 4, device=device), torch.zeros(2, 2, 4, device=device)
    gather_pages(pool, torch.zeros(0, dtype=torch.int64, device=device), staging)
    assert not staging.any()
    with pytest.raises(ValueError, match="3 pages"):
        gather_pages(pool, torch.arange(3, device=device), staging)
    with pytest.raises(ValueError, match="contiguous"):
        gather_pages(pool.transpose(1, 2), torch.arange(2, device=device), staging.view(2, 4, 2))
