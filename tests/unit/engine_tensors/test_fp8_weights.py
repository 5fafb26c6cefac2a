"""FP8 checkpoints in every published form beside the same numbers dequantised, by our engine and by `transformers`."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import VOCAB_SIZE, make_checkpoint
from support.engine_driver import Driver
from support.fp8_checkpoints import SCHEMES, edit_quantization, quantise_checkpoint
from transformers import AutoModelForCausalLM

from engine.fp8 import quantise_channels
from engine.load import load_model
from engine.plan import Row
from fleet.errors import BatonError, SettingsError, UnsupportedModel

CheckpointOf = Callable[[str], Path]
PROMPT = random.Random(3).choices(range(VOCAB_SIZE), k=40)
GROUP = SCHEMES["channel"]["config_groups"]["group_0"]


def logits_of(directory: Path, **how: str) -> torch.Tensor:
    driver = Driver(directory, **how)
    return driver.logits([Row(driver.admit(PROMPT), 0, len(PROMPT), sample=False)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["llama-biases", "llama3", "qwen3"])
def test_a_published_form_is_read_as_its_dequantised_numbers(
    variant: str, scheme: str, checkpoint: CheckpointOf, tmp_path: Path
) -> None:
    fp8, plain = quantise_checkpoint(checkpoint(variant), tmp_path, scheme)
    ours, dequantised = logits_of(fp8), logits_of(plain)
    assert torch.equal(ours, dequantised)  # a product of e4m3 and a float32 scale, rounded once, is the same anywhere
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(torch.tensor([PROMPT])).logits[0]
    apart = float((ours - theirs).abs().max())
    lost = float((ours - logits_of(checkpoint(variant))).abs().max())
    print(f"{variant}, {scheme}: largest difference {apart:.2e} to transformers; {lost:.2e} to the unquantized model")
    assert apart < 1e-4
    assert lost > 10 * apart  # it did read the FP8 numbers


def test_tiles_that_end_inside_a_stack_are_read_right(tmp_path: Path) -> None:
    wide = make_checkpoint(tmp_path / "wide", "qwen3", hidden_size=192, intermediate_size=400, num_hidden_layers=1)
    fp8, plain = quantise_checkpoint(wide, tmp_path, "block", scale_dtype=torch.bfloat16)
    assert torch.equal(logits_of(fp8), logits_of(plain))


def test_the_log_says_that_matrices_were_dequantised(
    checkpoint: CheckpointOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8, _ = quantise_checkpoint(checkpoint("qwen3"), tmp_path, "channel")
    model = load_model(fp8)
    assert (model.num_fp8, model.num_widened) == (0, 4 * model.config.num_layers)
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("FP8 matrices are dequantised") == 1


def test_unquantized_weights_become_fp8_on_request(checkpoint: CheckpointOf, tmp_path: Path) -> None:
    _, plain = quantise_checkpoint(checkpoint("qwen3"), tmp_path, "channel")
    on_the_fly, published = logits_of(checkpoint("qwen3"), quantization="fp8"), logits_of(plain)
    print(f"largest difference {float((on_the_fly - published).abs().max()):.2e}")
    assert torch.equal(on_the_fly, published)
    auto, fp8 = load_model(checkpoint("qwen3")), load_model(checkpoint("qwen3"), quantization="fp8")
    assert auto.fingerprint != fp8.fingerprint  # their pages differ
    already = quantise_checkpoint(checkpoint("llama"), tmp_path / "again", "tensor")[0]
    assert torch.equal(logits_of(already, quantization="fp8"), logits_of(already))


def test_scales_are_part_of_the_fingerprint(checkpoint: CheckpointOf, tmp_path: Path) -> None:
    one = quantise_checkpoint(checkpoint("llama"), tmp_path / "one", "tensor", page_scales=(0.1, 0.1))[0]
    two = quantise_checkpoint(checkpoint("llama"), tmp_path / "two", "tensor", page_scales=(0.1, 0.2))[0]
    assert load_model(one).fingerprint != load_model(two).fingerprint


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "model.layers.1.mlp.down_proj"
TENSOR_FAULTS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("tensor", lambda t: t.pop(f"{NAME}.weight_scale"), f"lacks {NAME}.weight_scale or .weight_scale_inv"),
    ("tensor", lambda t: t.pop(f"{NAME}.input_scale"), "input_scale, which static inputs need"),
    ("tensor", lambda t: t[f"{NAME}.weight_scale"].fill_(-1), "hold no scales|are no scales"),
    ("tensor", lambda t: t[f"{NAME}.input_scale"].fill_(torch.inf), "is no scale"),
    ("channel", lambda t: t.update({f"{NAME}.weight_scale": torch.ones(3, 1)}), r"has shape \[3, 1\]"),
    ("block", lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(2, 2)}), r"has shape \[2, 2\]"),
    ("block", lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(1, 1).to(torch.uint8)}), "stored as U8"),
    (
        "channel",
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "model.norm.weight is stored as F8_E4M3",
    ),
    (
        "channel",
        lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float().to(torch.float8_e5m2)}),
        "stored as F8_E5M2",
    ),
]


@pytest.mark.parametrize(("scheme", "edit", "message"), TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_named(
    scheme: str,
    edit: Callable[[dict[str, torch.Tensor]], object],
    message: str,
    checkpoint: CheckpointOf,
    tmp_path: Path,
) -> None:
    fp8, _ = quantise_checkpoint(checkpoint("llama"), tmp_path, scheme)
    change(fp8, edit)
    with pytest.raises(UnsupportedModel, match=message):
        load_model(fp8)


CONFIG_FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("tensor", {"quant_method": "gptq"}, "quant_method 'gptq'"),
    ("tensor", {"activation_scheme": "later"}, "activation_scheme 'later'"),
    ("tensor", {"weight_block_size": [128, 128]}, "static inputs with scales per block"),
    ("block", {"weight_block_size": [128]}, "must be two whole numbers"),
    ("block", {"fmt": "e5m2"}, "fmt 'e5m2'"),
    ("block", {"scale_fmt": "ue8m0"}, "scale_fmt 'ue8m0'"),
    ("channel", {"config_groups": {}}, "has no config_groups"),
    ("channel", {"config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], "num_bits": 4}}}}, "not 8-bit float"),
    ("channel", {"config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], "type": "int"}}}}, "not 8-bit float"),
    ("channel", {"config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], "symmetric": False}}}}, "symmetric"),
    ("channel", {"config_groups": {"g": {**GROUP, "weights": {**GROUP["weights"], "strategy": "group"}}}}, "strategy"),
    ("channel", {"config_groups": {"g": {**GROUP, "input_activations": None}}}, "weight-only"),
    (
        "channel",
        {"config_groups": {"g": GROUP, "h": {**GROUP, "input_activations": {"num_bits": 8, "type": "float"}}}},
        "g, h differ",
    ),
]


@pytest.mark.parametrize(("scheme", "changes", "message"), CONFIG_FAULTS)
def test_configurations_that_we_lack_are_named(
    scheme: str, changes: dict[str, Any], message: str, checkpoint: CheckpointOf, tmp_path: Path
) -> None:
    fp8, _ = quantise_checkpoint(checkpoint("llama"), tmp_path, scheme)
    edit_quantization(fp8, **changes)
    with pytest.raises(UnsupportedModel, match=message):
        load_model(fp8)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quantization": "int4"}, "BATON_QUANTIZATION = 'int4': auto, fp8 or int8"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "BATON_KV_CACHE_DTYPE = 'fp8_e5m2': auto or fp8_e4m3"),
    ],
)
def test_unknown_settings_stop_the_start(how: dict[str, str], message: str, checkpoint: CheckpointOf) -> None:
    with pytest.raises(SettingsError, match=message):
        load_model(checkpoint("llama"), **how)
    assert issubclass(SettingsError, BatonError)


def test_channels_of_zeros_and_of_one_outlier_keep_to_themselves() -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    weight[1] *= 1e-3
    weight[1, 7] = 1e4
    matrix = quantise_channels(weight)
    numbers = matrix.dequantised(torch.float32)
    assert matrix.scales[0] == 1
    assert not numbers[0].any()
    assert numbers[1].count_nonzero() == 1  # the outlier takes the whole channel's range
    assert bool(
        ((numbers[2:] - weight[2:]).abs() <= weight[2:].abs() * 2.0**-4 + matrix.scales[2:, None] * 2.0**-10).all()
    )
