"""Products of packed matrices: against float64, and the same bits in any company and on any number of threads."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from engine.cpu.panels import EIGHT_BITS, PLAIN, TWELVE_BITS
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


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(64, 200), (96, 530), (64, 1024)])
def test_weights_in_twelve_bits_are_the_weights(num_outputs: int, num_inputs: int, native: bool) -> None:
    torch.manual_seed(num_inputs)
    weight = torch.randn(num_outputs, num_inputs).bfloat16()
    for number in (0.0, -0.0, 2.0**-120, -(2.0**-20), 3.0e38, 1.0e-40, -17.0):  # exceptions wherever they fall
        for _ in range(num_outputs * num_inputs // 10000 + 1):
            weight[torch.randint(num_outputs, ()), torch.randint(num_inputs, ())] = number
    weight[-32:] *= 2.0**-60  # a panel of its own range
    products = Products(native=native)
    packed = products.pack(weight)
    assert packed.form == TWELVE_BITS
    assert packed.arrays["panels"].numel() == 3 * weight.numel() // 2 + 128 * 96
    product = products.product(packed, None)
    one = torch.eye(num_inputs).bfloat16()  # each input alone: a product is the weight itself
    tiny = weight.abs() < torch.finfo(torch.bfloat16).tiny  # the instruction takes them for 0
    assert torch.equal(product(one), torch.where(tiny, 0.0, weight).T if native else weight.T)
    for begin in range(0, num_inputs, num_inputs // 7):
        assert torch.equal(product(one[begin : begin + 3]), product(one)[begin : begin + 3])


def test_a_matrix_of_many_exponents_stays_plain() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 90).bfloat16()
    spread = weight * 2.0 ** torch.randint(-20, 20, weight.shape)
    products = Products()
    assert products.pack(weight).form == TWELVE_BITS
    packed = products.pack(spread.bfloat16())
    assert packed.form == PLAIN
    hidden = torch.eye(90).bfloat16()
    assert torch.equal(products.product(packed, None)(hidden), spread.bfloat16().T)


@pytest.mark.parametrize("native", NATIVE)
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(96, 64), (33, 71), (64, 1000)])
def test_weights_in_eight_bits_are_rounded_by_output(num_outputs: int, num_inputs: int, native: bool) -> None:
    torch.manual_seed(num_inputs)
    weight = (
        torch.randn(num_outputs, num_inputs).bfloat16() * torch.logspace(-3, 3, num_outputs).unsqueeze(1).bfloat16()
    )
    weight[5] = 0
    bias = torch.randn(num_outputs).bfloat16()
    products = Products(native=native)
    packed = products.pack(weight, rounded=True)
    assert packed.form == EIGHT_BITS
    scales = weight.float().abs().amax(1, keepdim=True) / 127
    rounded = torch.round(torch.nan_to_num(weight.float() / scales)) * scales
    assert ((rounded - weight.float()).abs() <= scales / 2 * 1.0001).all()
    hidden = torch.randn(150, num_inputs).bfloat16()
    whole = products.product(packed, bias)(hidden)
    exact = hidden.double() @ rounded.double().T + bias.double()
    slack = 2.0**-8 * exact.abs() + 1e-6 * num_inputs * weight.double().abs().amax(1)
    assert ((whole.double() - exact).abs() <= slack).all()
    for begin, end in ((0, 1), (17, 20), (40, 72), (60, 150)):
        assert torch.equal(products.product(packed, bias)(hidden[begin:end]), whole[begin:end])
