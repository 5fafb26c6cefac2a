"""Random weights made at start: the same for everybody, and a model like one that was stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.dummy_checkpoint import DEVIATION, PERIOD, DummyCheckpoint
from engine.hub import resolve_model
from engine.load import load_model
from engine.model_config import ModelConfig
from engine.weights import SINGLE_FILE, Checkpoint, model_fingerprint
from fleet.errors import SettingsError, UnsupportedModel

CheckpointOf = Callable[[str], Path]
CPU = torch.device("cpu")


@pytest.fixture
def bare(checkpoint: CheckpointOf, tmp_path: Path) -> Path:
    """A model directory without weights."""
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(checkpoint("qwen2") / name, tmp_path / name)
    return tmp_path


def change(directory: Path, **entries: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def opened(directory: Path) -> DummyCheckpoint:
    return DummyCheckpoint(directory, ModelConfig.from_directory(directory), CPU)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_stored_copy_is_the_same_model(bare: Path, tmp_path: Path, dtype: str) -> None:
    change(bare, dtype=dtype)
    config = ModelConfig.from_directory(bare)
    dummy = opened(bare)
    save_file({name: dummy.read(name) for name in dummy.tensors}, bare / SINGLE_FILE)
    with Checkpoint(bare) as stored:
        assert stored.tensors == dummy.tensors
        assert model_fingerprint(stored, config) == model_fingerprint(dummy, config)
    (bare / SINGLE_FILE).rename(tmp_path / "elsewhere")
    assert load_model(bare, load_format="dummy").fingerprint == model_fingerprint(opened(bare), config)


def test_matrices_are_spread_as_initialised_ones_and_no_rows_are_alike(bare: Path) -> None:
    change(bare, vocab_size=40_000, dtype="float32")  # several periods
    rows = opened(bare).read("model.embed_tokens.weight")
    assert rows.numel() > 2 * PERIOD
    assert float(rows.std()) == pytest.approx(DEVIATION, rel=0.01)
    assert abs(float(rows.mean())) < DEVIATION / 500
    assert len(rows.unique(dim=0)) == len(rows)
    first, other = (opened(bare).read(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (0, 1))
    assert not torch.equal(first, other)
    assert set(opened(bare).read("model.norm.weight").tolist()) == {1.0}
    assert set(opened(bare).read("model.layers.0.self_attn.q_proj.bias").tolist()) == {0.0}


def test_what_does_not_go_with_random_weights_is_refused(bare: Path) -> None:
    with pytest.raises(SettingsError, match="BATON_LOAD_FORMAT = 'random'"):
        load_model(bare, load_format="random")
    change(bare, dtype="float64")
    with pytest.raises(UnsupportedModel, match="float64"):
        load_model(bare, load_format="dummy")
    change(bare, dtype="bfloat16", quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})
    with pytest.raises(SettingsError, match="quantization_config"):
        load_model(bare, load_format="dummy")


@pytest.mark.parametrize("weights", [True, False])
def test_weights_that_are_not_wanted_are_not_downloaded(monkeypatch: pytest.MonkeyPatch, weights: bool) -> None:
    asked: list[str] = []

    def download(_hub_id: str, *, allow_patterns: list[str], **_rest: object) -> str:
        asked.extend(allow_patterns)
        return "/somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve_model("some/model", weights=weights)
    assert ("*.safetensors" in asked) == weights
    assert "*.json" in asked
