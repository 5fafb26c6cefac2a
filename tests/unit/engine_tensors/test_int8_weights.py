"""Models whose weights are rounded to 8 bits as they are loaded, on processors with our own products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_driver import Driver
from support.fp8_checkpoints import quantise_checkpoint

pytest.importorskip("numba")

from engine.cpu import backend as cpu_backend
from engine.load import load_model
from engine.plan import Row
from fleet.errors import SettingsError

CheckpointOf = Callable[[str], Path]


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("variant", ["qwen3", "llama"])
def test_all_matrices_but_embedding_and_head_are_rounded(checkpoint: CheckpointOf, variant: str) -> None:
    def drive(**how: Any) -> tuple[Driver, torch.Tensor]:
        driver = Driver(checkpoint(variant), dtype="bfloat16", page_size=16, **how)
        return driver, driver.logits([Row(driver.admit(range(3, 40)), 0, 37, sample=False)])

    exact, expected = drive()
    rounded, actual = drive(quantization="int8")
    assert rounded.model.num_int8 == 4 * rounded.model.config.num_layers
    assert exact.model.num_int8 == 0
    assert rounded.model.weight_bytes < exact.model.weight_bytes
    assert rounded.model.fingerprint != exact.model.fingerprint  # pages of the one are not the other's
    apart = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < apart < 0.1


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "float32"}, "needs dtype bfloat16, not float32"),
        ({"dtype": "bfloat16", "device": "meta"}, "is for CPUs; on meta set fp8"),
    ],
)
def test_where_it_cannot_be_the_start_stops(how: dict[str, str], message: str, checkpoint: CheckpointOf) -> None:
    with pytest.raises(SettingsError, match=message):
        load_model(checkpoint("llama"), quantization="int8", **how)


@pytest.mark.usefixtures("own_products")
def test_what_is_quantized_already_is_not_rounded_again(checkpoint: CheckpointOf, tmp_path: Path) -> None:
    fp8, _ = quantise_checkpoint(checkpoint("llama"), tmp_path, "channel")
    with pytest.raises(SettingsError, match="quantized already"):
        load_model(fp8, "bfloat16", quantization="int8")


def test_other_processors_refuse_it(checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_backend, "suits_own_products", lambda: False)
    with pytest.raises(SettingsError, match="AVX512-BF16"):
        load_model(checkpoint("llama"), "bfloat16", quantization="int8")
