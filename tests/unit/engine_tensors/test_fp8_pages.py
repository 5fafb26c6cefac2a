"""FP8 pages on a CPU: half the bytes, one result however a prompt is cut, and the checkpoint's scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import VOCAB_SIZE, make_checkpoint
from support.engine_driver import Driver
from support.fp8_checkpoints import quantise_checkpoint

from engine.fp8 import E4M3
from engine.fp8_checkpoint import page_scales
from engine.kv_pool import kv_page_bytes, pool_over
from engine.load import load_model
from engine.plan import Row
from engine.weights import Checkpoint

CheckpointOf = Callable[[str], Path]
PROMPT = [(7 * at * at + 3 * at) % VOCAB_SIZE for at in range(41)]


def in_chunks(driver: Driver, *counts: int) -> torch.Tensor:
    """All logits of the prompt, computed in chunks of these sizes and single tokens for the rest."""
    sequence = driver.admit(PROMPT)
    sizes = (*counts, *[1] * (len(PROMPT) - sum(counts)))
    return torch.cat(
        [driver.logits([Row(sequence, sequence.num_computed_tokens, size, sample=False)]) for size in sizes]
    )


@pytest.mark.parametrize("variant", ["llama-biases", "qwen3", "mistral-window", "qwen2"])
def test_a_prompt_cut_in_any_way_is_one_result(variant: str, checkpoint: CheckpointOf) -> None:
    driver = Driver(checkpoint(variant), kv_cache_dtype="fp8_e4m3")
    assert driver.pool.dtype is E4M3
    whole = in_chunks(driver, 41)
    for counts in ((13, 20, 8), (1, 30)):
        cut = in_chunks(driver, *counts)
        if "window" in variant:  # begin elsewhere in a chunk, and keep ordinary rounding (`engine.exactness`)
            assert float((cut - whole).abs().max()) < 1e-4
        else:
            assert torch.equal(cut, whole)
    plain = in_chunks(Driver(checkpoint(variant)), 41)
    lost, largest = float((whole - plain).abs().max()), float(plain.abs().max())
    print(f"{variant}: FP8 pages move logits by up to {lost:.3g} of {largest:.3g}")
    assert 0 < lost < 0.5 * largest


def test_bfloat16_models_attend_over_fp8_pages(checkpoint: CheckpointOf) -> None:
    driver = Driver(checkpoint("qwen3"), dtype="bfloat16", kv_cache_dtype="fp8_e4m3")
    exact = in_chunks(Driver(checkpoint("qwen3"), kv_cache_dtype="fp8_e4m3"), 20, 10)
    rounded = in_chunks(driver, 20, 10)
    apart = float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    print(f"bfloat16 beside float32, both over FP8 pages: {apart:.3g} apart")
    assert apart < 0.1


def test_pages_are_half_of_bfloat16s_and_lie_over_any_memory(checkpoint: CheckpointOf) -> None:
    model = load_model(checkpoint("qwen3"), "bfloat16", kv_cache_dtype="fp8_e4m3")
    size = kv_page_bytes(model.config, 4, model.kv_dtype)
    assert 2 * size == kv_page_bytes(model.config, 4, model.dtype)
    memory = bytearray(8 * size)
    pool = pool_over(memory, config=model.config, num_pages=8, page_size=4, dtype=model.kv_dtype)
    pool[7, -1, 1, -1, -1, -1] = 1.0
    assert memory[-1] == 0x38  # exponent 7, which stands for 0


@pytest.mark.parametrize("variant", ["llama-biases", "qwen3"])
@pytest.mark.parametrize(("key_scale", "value_scale"), [(1 / 32, 1 / 4), (4.0, 2.0)])
def test_scales_of_pages_change_what_is_stored_and_nothing_else(
    variant: str, key_scale: float, value_scale: float, checkpoint: CheckpointOf, tmp_path: Path
) -> None:
    scales = (0.8 * key_scale, value_scale)  # the first is no power of two and is rounded up to one
    fp8, _ = quantise_checkpoint(checkpoint(variant), tmp_path, "channel", page_scales=scales)
    scaled, unscaled = Driver(fp8, kv_cache_dtype="fp8_e4m3"), Driver(fp8.parent / "plain", kv_cache_dtype="fp8_e4m3")
    with_scales, without = in_chunks(scaled, 41), in_chunks(unscaled, 41)
    numbers = [driver.pool.float() for driver in (scaled, unscaled)]  # both deal the same pages
    keys, values = numbers[0][:, 0, 0], numbers[0][:, 0, 1]
    plain_keys, plain_values = numbers[1][:, 0, 0], numbers[1][:, 0, 1]
    for kind, one, other, scale in (
        ("keys", keys, plain_keys, key_scale),
        ("values", values, plain_values, value_scale),
    ):
        sound = (other.abs() >= 2.0**-5) & (other.abs() < 440)  # neither subnormal nor saturated, in either pool
        sound &= (other.abs() / scale >= 2.0**-5) & (other.abs() / scale < 440)
        assert bool(sound.any()), kind
        assert torch.equal(one[sound] * scale, other[sound]), kind
    apart = float((with_scales - without).abs().max())
    print(f"{variant}: logits with scales are up to {apart:.3g} from those without")
    assert apart < 0.1 * float(without.abs().max())
    # In pages of the model's own dtype the scales have no part.
    assert torch.equal(in_chunks(Driver(fp8), 41), in_chunks(Driver(fp8.parent / "plain"), 41))


def test_the_scales_that_older_tools_wrote_are_found(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "m", "llama")
    fp8, _ = quantise_checkpoint(source, tmp_path, "tensor")
    tensors = load_file(fp8 / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.output_scale"] = torch.tensor(0.3)
    tensors["model.layers.0.self_attn.v_proj.output_scale"] = torch.tensor(1.0)
    tensors["model.layers.1.self_attn.kv_scale"] = torch.tensor([3.0])
    save_file(tensors, fp8 / "model.safetensors", metadata={"format": "pt"})
    assert load_model(fp8, kv_cache_dtype="fp8_e4m3").num_widened > 0
    with Checkpoint(fp8) as opened:
        assert [page_scales(opened, layer) for layer in range(3)] == [(0.5, 1.0), (4.0, 4.0), (1.0, 1.0)]
