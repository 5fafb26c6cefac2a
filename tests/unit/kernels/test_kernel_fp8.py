"""FP8 bits and scales against torch's own conversion: equal, not close."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import fp8

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no FP8"
)

DTYPES = [torch.float32, torch.bfloat16]


def check(what: str, pair: tuple[torch.Tensor, torch.Tensor], twin: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Same scales, same bits."""
    apart = (pair[0].float() - twin[0].float()).abs().max() if pair[0].numel() else 0.0
    print(f"{what}: largest difference {float(apart):.3g} in FP8 numbers")
    assert pair[1].shape == twin[1].shape
    assert torch.equal(pair[1], twin[1])
    assert torch.equal(pair[0].view(torch.uint8), twin[0].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (2, 2500)])
def test_scales_of_tensors_and_rows(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    values = (torch.randn(shape, device=device) * torch.rand(shape[0], 1, device=device) * 50).to(dtype)
    values[-1] = 0
    check("tensor", fp8.quantise_tensor(values), fp8.quantise_tensor_twin(values))
    check("rows", fp8.quantise_rows(values), fp8.quantise_rows_twin(values))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "tile"), [((129, 257), (128, 128)), ((5, 300), (1, 128)), ((20, 7), (16, 4))])
def test_scales_of_tiles(
    shape: tuple[int, int], tile: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(1)
    values = (torch.randn(shape, device=device) * 5).to(dtype)
    values[0, 0] = 1000  # one outlier spoils one tile only
    pair = fp8.quantise_tiles(values, tile_rows=tile[0], tile_columns=tile[1])
    check("tiles", pair, fp8.quantise_tiles_twin(values, tile_rows=tile[0], tile_columns=tile[1]))
    assert float(pair[1].flatten()[1:].max()) < float(pair[1][0, 0])


def test_the_error_is_that_of_three_bits(device: torch.device) -> None:
    torch.manual_seed(2)
    values = torch.randn(4, 256, device=device)
    quantised, scales = fp8.quantise_rows(values)
    error = (quantised.float() * scales[:, None] - values).abs()
    # Half a unit in the last of three mantissa bits, and half the smallest subnormal step.
    assert bool((error <= values.abs() * 2.0**-4 + scales[:, None] * 2.0**-10).all())
    assert float(quantised.float().abs().max()) == fp8.E4M3_LARGEST


def test_halfway_goes_to_even_and_empties_pass(device: torch.device) -> None:
    values = torch.tensor([[448.0, 17.0, 19.0, -21.0, 2.0**-10, 3 * 2.0**-10]], device=device)
    quantised, scales = fp8.quantise_rows(values)
    assert scales.item() == 1.0
    assert quantised.float()[0].tolist() == [448.0, 16.0, 20.0, -20.0, 0.0, 2.0**-8]
    for quantise in (fp8.quantise_tensor, fp8.quantise_rows, fp8.quantise_tiles):
        assert quantise(torch.zeros(0, 8, device=device))[0].shape == (0, 8)
    with pytest.raises(ValueError, match="powers of two"):
        fp8.quantise_tiles(values, tile_rows=3)
    with pytest.raises(ValueError, match="cannot quantise"):
        fp8.quantise_rows(torch.zeros(6, 4, device=device).T)
