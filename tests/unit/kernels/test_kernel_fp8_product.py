"""Products of FP8 matrices: the kernel for scales per tile, cuBLAS's for scales per row, and models made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_kit import assert_close
from support.checkpoints import make_checkpoint
from support.engine_driver import Driver
from support.fp8_checkpoints import SCHEMES, quantise_checkpoint

from engine import load
from engine.backend import Linear, TorchBackend
from engine.fp8 import Fp8Matrix, product_twin, quantise, quantise_channels
from engine.kernel_backend import KernelBackend
from engine.kernels import fp8_product
from engine.kernels.fp8 import quantise_rows, quantise_tiles
from engine.kernels.fp8_product import (
    fp8_row_product,
    fp8_row_product_twin,
    fp8_tile_product,
    fp8_tile_product_twin,
)
from engine.kernels.fp8_tiles import ALL_TILES, Tiles, tiles_for
from engine.plan import Row

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no FP8"
)
TILE = (128, 128)


class TwinBackend(KernelBackend):
    """The same kernels around FP8 products by definition."""

    def fp8_linear(self, matrix: Fp8Matrix, bias: torch.Tensor | None, dtype: torch.dtype) -> Linear:
        """By definition."""
        del dtype
        return lambda hidden: product_twin(hidden, matrix, bias)


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 128, 128), (3, 200, 70), (16, 512, 300), (20, 384, 144)])
def test_the_product_by_tiles_equals_its_twin(rows: int, width: int, out: int, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device).bfloat16()
    hidden[0, 5] = 300  # spoils one tile of one row
    weight, weight_scales = quantise(torch.randn(out, width, device=device) / 8, tile_rows=128, tile_columns=128)
    values, value_scales = quantise_tiles(hidden, tile_rows=1)
    result = fp8_tile_product(values, value_scales, weight, weight_scales)
    expected = fp8_tile_product_twin(values, value_scales, weight, weight_scales)
    assert_close("product by tiles", result, expected, roundings=1.01)
    one = fp8_tile_product(values[:1], value_scales[:1], weight, weight_scales)
    assert_close("one row alone", one, result[:1], roundings=1.01)


@pytest.mark.parametrize(("rows", "width", "out"), [(1, 128, 128), (3, 200, 70), (20, 384, 144), (70, 256, 96)])
def test_the_product_by_rows_equals_its_twin(rows: int, width: int, out: int, device: torch.device) -> None:
    torch.manual_seed(3)
    values, of_rows = quantise_rows(torch.randn(rows, width, device=device).bfloat16())
    matrix = quantise_channels(torch.randn(out, width, device=device) / 8)
    result = fp8_row_product(values, of_rows, matrix.values, matrix.scales)
    expected = fp8_row_product_twin(values, of_rows, matrix.values, matrix.scales)
    assert_close("product by rows", result, expected, roundings=1.01)


@pytest.mark.parametrize("tiles", ALL_TILES, ids=lambda one: f"{one.rows}x{one.outs}")
def test_all_tiles_give_the_same_product(tiles: Tiles, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_product, "tiles_for", lambda *_: tiles)
    torch.manual_seed(4)
    values, of_rows = quantise_tiles(torch.randn(19, 300, device=device), tile_rows=1)
    weight, scales = quantise(torch.randn(150, 300, device=device) / 8, tile_rows=128, tile_columns=128)
    expected = fp8_tile_product_twin(values, of_rows, weight, scales)
    assert_close("product by tiles", fp8_tile_product(values, of_rows, weight, scales), expected, roundings=1.01)


@pytest.mark.parametrize("num_rows", [1, 16, 32, 64, 256, 8192])
@pytest.mark.parametrize(("width", "out"), [(4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096)])
def test_tiles_occupy_the_device_and_fit_it(num_rows: int, width: int, out: int) -> None:
    chosen = tiles_for(num_rows, width, out)
    assert chosen.shared_bytes <= 101_376, "the smallest card with FP8"
    assert chosen.rows < 2 * max(num_rows, 16), "most of a tile would be padding"
    assert -(-num_rows // chosen.rows) * -(-out // chosen.outs) >= 96, "processors stand idle"


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    weight, scales = quantise(torch.randn(128, 256, device=device), tile_rows=128, tile_columns=128)
    values, of_rows = quantise_tiles(torch.randn(4, 256, device=device), tile_rows=1)
    with pytest.raises(ValueError, match="with scales"):
        fp8_tile_product(values, of_rows[:, :1], weight, scales)
    with pytest.raises(ValueError, match="contiguous"):
        fp8_tile_product(values, of_rows.T.contiguous().T, weight, scales)
    assert fp8_tile_product(values[:0], of_rows[:0], weight, scales).shape == (0, 128)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["channel", "static", "tile"])
def test_a_backends_product_equals_the_specification(kind: str, bias: bool, device: torch.device) -> None:
    torch.manual_seed(1)
    weight = torch.randn(144, 256, device=device) / 8
    if kind == "tile":
        matrix = Fp8Matrix(*quantise(weight, tile_rows=128, tile_columns=128), tile=TILE)
    else:
        matrix = quantise_channels(weight)
        matrix = Fp8Matrix(matrix.values, matrix.scales, input_scale=0.01 if kind == "static" else None)
    added = torch.randn(144, device=device).bfloat16() if bias else None
    product = KernelBackend(group=1, device=device, fp8=True).fp8_linear(matrix, added, torch.bfloat16)
    assert product is not None
    hidden = torch.randn(5, 256, device=device).bfloat16()
    result, expected = product(hidden), product_twin(hidden, matrix, added)
    assert_close(f"{kind} product", result, expected, roundings=2)
    exact = hidden.float() @ weight.T + (0 if added is None else added.float())
    lost = float((result.float() - exact).abs().max() / exact.abs().max())
    print(f"{kind}: {lost:.3f} of the largest output lost to FP8")
    assert lost < 0.06


def test_what_has_no_fp8_product_is_left_to_the_loader(device: torch.device) -> None:
    torch.manual_seed(2)
    matrix, odd = quantise_channels(torch.randn(32, 64)), quantise_channels(torch.randn(24, 64))
    small = Fp8Matrix(*quantise(torch.randn(64, 64), tile_rows=64, tile_columns=64), tile=(64, 64))
    able = KernelBackend(group=1, device=device, fp8=True)
    assert able.fp8_linear(matrix, None, torch.bfloat16) is not None
    assert able.fp8_linear(matrix, None, torch.float32) is None
    assert able.fp8_linear(odd, None, torch.bfloat16) is None
    assert able.fp8_linear(small, None, torch.bfloat16) is None
    assert KernelBackend(group=1, device=device).fp8_linear(matrix, None, torch.bfloat16) is None
    assert TorchBackend().fp8_linear(matrix, None, torch.bfloat16) is None


@pytest.mark.parametrize("scheme", [*SCHEMES, "on the fly"])
@pytest.mark.parametrize("variant", ["llama3", "qwen3"])
def test_a_model_of_fp8_matrices_computes_what_its_twin_does(
    variant: str, scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    directory = make_checkpoint(
        tmp_path / variant, variant, hidden_size=128, head_dim=128, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=256, num_hidden_layers=1, initializer_range=0.1,
    )  # fmt: skip
    quantization = "fp8" if scheme == "on the fly" else "auto"
    if scheme in SCHEMES:
        directory, _ = quantise_checkpoint(directory, tmp_path, scheme)
    logits = []
    for backend in (make(group=2, device=device, fp8=True) for make in (TwinBackend, KernelBackend)):
        monkeypatch.setattr(load, "_backend", lambda *_, made=backend: made)
        driver = Driver(directory, dtype="bfloat16", quantization=quantization)
        assert (driver.model.num_fp8, driver.model.num_widened) == (4, 0)
        logits.append(driver.logits([Row(driver.admit(list(range(4, 20))), 0, 16, sample=False)]))
    apart, largest = float((logits[0] - logits[1]).abs().max()), float(logits[0].abs().max())
    print(f"{variant}, {scheme}: largest difference {apart:.3g} of logits up to {largest:.3g}")
    # Where bfloat16 falls on the other side of a middle, an input is a whole e4m3 step away: compared as a whole.
    assert float((logits[0] - logits[1]).square().mean().sqrt() / logits[0].square().mean().sqrt()) < 0.02
