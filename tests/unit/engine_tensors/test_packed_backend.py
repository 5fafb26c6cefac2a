"""Packed matrices give the bits of unpacked ones."""

from __future__ import annotations

import pytest
import torch

from engine.backend import TorchBackend
from engine.packed_backend import PackedBackend, can_pack

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu")), reason="this build of torch, or this CPU, does not pack bfloat16 matrices"
)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 33])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_products_equal_plain_ones(num_tokens: int, biased: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 64).bfloat16()
    bias = torch.randn(96).bfloat16() if biased else None
    # A slice of a wider tensor, as the forward pass hands them on.
    hidden = torch.randn(num_tokens, 128).bfloat16()[:, :64]
    plain = TorchBackend().linear(weight, bias)(hidden)
    packed = PackedBackend().linear(weight.clone(), bias)(hidden)
    assert packed.shape == (num_tokens, 96)
    assert torch.equal(plain, packed)


def test_float32_is_left_alone() -> None:
    weight, hidden = torch.randn(16, 8), torch.randn(3, 8)
    product = PackedBackend().linear(weight, None)(hidden)
    assert torch.equal(product, TorchBackend().linear(weight, None)(hidden))
    assert torch.allclose(product, hidden @ weight.T, atol=1e-5)
