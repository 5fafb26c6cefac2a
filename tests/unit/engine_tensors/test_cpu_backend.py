"""The CPU backend's operations against their torch twins, in float32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.engine_driver import GREEDY, Driver, make_sequence
from support.paired_pages import unpaired

from engine.attention_inputs import InputShape
from engine.backend import HeadNorms, TorchBackend
from engine.cpu.backend import CpuBackend
from engine.inputs import build_inputs
from engine.plan import Row

HKV = 4
ROUNDING = 2.0**-8  # of bfloat16, relative

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="this build of torch has no oneDNN",
)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("group", "head_dim"), [(2, 128), (3, 80)])
def test_norm_rotation_and_page_write_match_their_twins(
    group: int, head_dim: int, normed: bool, page_size: int
) -> None:
    torch.manual_seed(0)
    plan = []
    for past, count, pages in ((37, 1, [5, 1, 6]), (0, 21, [3, 0]), (9, 4, [4])):
        sequence = make_sequence(range(past + count), GREEDY)
        sequence.page_table = pages
        plan.append(Row(sequence, past, count, sample=True))
    fast, twin = CpuBackend(), TorchBackend()
    shape = InputShape(page_size, (None,), None, layer_token_bytes=64, device=torch.device("cpu"))
    inputs = build_inputs(plan, shape, twin.plan_attention)
    layer = torch.full((7, 2, HKV, page_size, head_dim), torch.nan).bfloat16()
    num_tokens, num_heads = inputs.token_ids.shape[0], (group + 2) * HKV
    qkv = torch.randn(num_tokens, num_heads * head_dim).bfloat16()
    norms = HeadNorms(torch.rand(head_dim).bfloat16(), torch.rand(head_dim).bfloat16(), 1e-6) if normed else None
    angles = torch.rand(num_tokens, 1, head_dim // 2) * 6
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    wide = HeadNorms(norms.queries.float(), norms.keys.float(), norms.eps) if norms is not None else None
    exact_layer = layer.float()
    expected, _ = twin.rotate_and_write(qkv.float(), wide, (cos.float(), sin.float()), exact_layer, inputs)
    rotation = fast.plan_rotation((cos, sin), inputs)
    queries, kept = fast.rotate_and_write(qkv, norms, rotation, layer, inputs)
    assert kept is None
    for result, wanted in ((queries, expected), (unpaired(layer), exact_layer)):
        known = wanted.isfinite()
        assert torch.equal(result.isfinite(), known)
        assert ((result.float() - wanted).abs() <= ROUNDING * (1 + wanted.abs()))[known].all()


def test_the_norm_of_rows_matches_its_twin() -> None:
    hidden, weight = torch.randn(37, 96 * 2).bfloat16()[:, :96], torch.rand(96).bfloat16()
    for rows in (hidden, hidden[:1], hidden[:0]):
        expected = TorchBackend().rms_norm(rows.float(), weight.float(), 1e-6)
        result = CpuBackend().rms_norm(rows, weight, 1e-6)
        assert ((result.float() - expected).abs() <= ROUNDING * expected.abs()).all()


def test_a_sum_is_normed_as_it_is_rounded() -> None:
    hidden, residual, weight = torch.randn(37, 96).bfloat16(), torch.randn(37, 96).bfloat16(), torch.rand(96).bfloat16()
    for rows in (37, 1, 0):
        summed = residual[:rows] + hidden[:rows]
        expected = CpuBackend().rms_norm(summed, weight, 1e-6)
        normed, result = CpuBackend().add_rms_norm(hidden[:rows], residual[:rows].clone(), weight, 1e-6)
        assert torch.equal(result, summed)
        assert torch.equal(normed, expected)


@pytest.mark.parametrize("size", [3072, 80])
def test_the_gated_activation_matches_its_twin(size: int) -> None:
    gate_up = torch.cat((torch.linspace(-120, 120, 7 * size), torch.randn(7 * size) * 4)).view(-1, 2 * size).bfloat16()
    expected = TorchBackend().gated_silu(gate_up.float())
    result = CpuBackend().gated_silu(gate_up).float()
    assert ((result - expected).abs() <= ROUNDING * expected.abs() + 1e-30).all()


def test_a_bfloat16_model_says_what_its_float32_twin_says(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    exact, fast = Driver(directory, dtype="float32"), Driver(directory, dtype="bfloat16", page_size=16)
    prompt = [random.Random(1).randrange(3, 300) for _ in range(90)]
    results = []
    for driver in (exact, fast):
        sequence = driver.admit(prompt)
        parts = [driver.logits([Row(sequence, at, count, sample=False)]) for at, count in ((0, 50), (50, 1), (51, 39))]
        results.append(torch.cat(parts))
    difference = (results[0] - results[1]).abs()
    scale = results[0].std().item()
    print(f"logits differ by {difference.mean().item():.4f} in the mean, standard deviation {scale:.3f}")
    assert difference.mean().item() < 0.03 * scale


@pytest.mark.parametrize(
    ("how", "rounding"), [({"page_size": 4}, 0.03), ({"kv_cache_dtype": "fp8_e4m3", "page_size": 16}, 0.1)]
)
def test_pages_that_are_not_of_pairs_are_written_and_read_by_torch(
    tmp_path: Path, how: dict[str, Any], rounding: float
) -> None:
    directory = make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16)
    paired, plain = Driver(directory, dtype="bfloat16", page_size=16), Driver(directory, dtype="bfloat16", **how)
    orders = []
    results = []
    for driver in (paired, plain):
        model = driver.model
        orders.append(model.transformer.backend.page_order(model.config, driver.page_size, model.kv_dtype))
        sequence = driver.admit(range(3, 60))
        parts = [driver.logits([Row(sequence, at, count, sample=False)]) for at, count in ((0, 50), (50, 1), (51, 6))]
        results.append(torch.cat(parts))
    assert orders == ["page-major-pairs-1", "page-major-1"]
    assert (results[0] - results[1]).abs().mean().item() < rounding * results[0].std().item()


def test_without_the_compiler_torch_attends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("engine.cpu.backend.RowKernels", missing)
    driver = Driver(make_checkpoint(tmp_path / "m", "qwen3", dtype=torch.bfloat16), dtype="bfloat16", page_size=16)
    backend, config = driver.model.transformer.backend, driver.model.config
    assert backend.page_order(config, 16, torch.bfloat16) == "page-major-1"
    assert driver.logits([Row(driver.admit(range(3, 40)), 0, 37, sample=False)]).isfinite().all()


def missing() -> None:
    raise ImportError("No module named 'numba'")
