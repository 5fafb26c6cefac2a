"""Products of packed matrices: against float64, and the same bits in any company and on any number of threads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from engine.cpu.products import Products
from engine.cpu.tiles import has_pair_products

NATIVE = [False, pytest.param(True, marks=pytest.mark.skipif(not has_pair_products(), reason="no AVX512-BF16"))]


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(96, 64), (33, 70), (7, 33), (64, 4100)])
def test_a_product_is_the_product(num_outputs: int, num_inputs: int, biased: bool, native: bool) -> None:
    torch.manual_seed(num_inputs)
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    bias = torch.randn(num_outputs).bfloat16() if biased else None
    product = Products(native=native).linear(weight, bias)
    hidden = torch.randn(200, num_inputs + 6).bfloat16()[:, :num_inputs]  # a slice, as the forward pass hands on
    whole = product(hidden)
    exact = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    slack = 2.0**-8 * exact.abs() + 1e-6 * num_inputs
    assert ((whole.double() - exact).abs() <= slack).all()
    for begin, end in ((0, 0), (0, 1), (17, 18), (3, 16), (40, 72), (90, 187), (103, 200)):
        assert torch.equal(product(hidden[begin:end]), whole[begin:end])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    torch.manual_seed(0)
    product = Products().linear(torch.randn(1000, 1030).bfloat16(), None)
    hidden = torch.randn(150, 1030).bfloat16()
    alone = product(hidden)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(product(hidden), alone)
        assert torch.equal(product(hidden[5:6]), alone[5:6])
    finally:
        torch.set_num_threads(before)
