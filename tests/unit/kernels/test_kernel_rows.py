"""Norms and the gated activation against their twins."""

from __future__ import annotations

import pytest
import torch
from kernel_kit import assert_close

from engine.backend import TorchBackend
from engine.kernels.rms_norm import add_rms_norm, add_rms_norm_twin, rms_norm, rms_norm_twin
from engine.kernels.silu_mul import silu_mul, silu_mul_twin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(0, 8), (1, 1), (3, 64), (5, 100), (2, 4097)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_equal_their_twins(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(shape, device=device) * 3).to(dtype)
    residual = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(shape[1], device=device).to(dtype)
    assert_close("norm", rms_norm(hidden, weight, 1e-5), rms_norm_twin(hidden, weight, 1e-5), roundings=4)
    normed, summed = add_rms_norm(hidden, residual, weight, 1e-5)
    expected_normed, expected_summed = add_rms_norm_twin(hidden, residual, weight, 1e-5)
    assert torch.equal(summed, expected_summed)
    assert_close("norm of a sum", normed, expected_normed, roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twins_are_the_operations_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    hidden, weight = torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    assert_close(
        "norm", rms_norm_twin(hidden, weight, 1e-6), TorchBackend().rms_norm(hidden, weight, 1e-6), roundings=4
    )
    assert_close("silu times up", silu_mul_twin(hidden), TorchBackend().gated_silu(hidden.clone()), roundings=0)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (5, 80), (33, 128)])
def test_heads_inside_a_wider_row_are_normed_each(heads: int, head_dim: int, device: torch.device) -> None:
    torch.manual_seed(1)
    row = torch.randn(3, (heads + 2) * head_dim, device=device).bfloat16()
    queries = row[:, : heads * head_dim].view(3, heads, head_dim)
    weight = torch.randn(head_dim, device=device).bfloat16()
    assert_close("head norm", rms_norm(queries, weight, 1e-6), rms_norm_twin(queries, weight, 1e-6), roundings=2)


def test_a_row_of_zeros_stays_zero_and_others_are_untouched(device: torch.device) -> None:
    hidden = torch.zeros(2, 16, device=device)
    hidden[1] = torch.arange(16)
    kept = hidden.clone()
    normed = rms_norm(hidden, torch.ones(16, device=device), 1e-6)
    assert not normed[0].any()
    assert normed[1].square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(hidden, kept)


def test_rows_that_do_not_fit_are_refused(device: torch.device) -> None:
    hidden = torch.zeros(2, 16, device=device)
    with pytest.raises(ValueError, match="cannot norm"):
        rms_norm(hidden, torch.ones(8, device=device), 1e-6)
    with pytest.raises(ValueError, match="does not add"):
        add_rms_norm(hidden, hidden.bfloat16(), torch.ones(16, device=device), 1e-6)
    with pytest.raises(ValueError, match="no gate and up"):
        silu_mul(torch.zeros(2, 5, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 200), (2, 2 * 1500)])
def test_the_activation_equals_its_twin(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(2)
    wider = (torch.randn(shape[0], shape[1] + 8, device=device) * 4).to(dtype)
    gate_up = wider[:, : shape[1]]
    # Two roundings to the dtype, each may fall the other way by a hair of the exponential.
    assert_close("silu times up", silu_mul(gate_up), silu_mul_twin(gate_up), roundings=3)
