"""What cannot be served is refused at start, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint

from engine.hub import resolve_model
from engine.load import load_model, resolve_dtype
from engine.model_config import ModelConfig
from engine.weights import Checkpoint, model_fingerprint
from fleet.errors import ModelNotFound, UnsupportedModel

CheckpointOf = Callable[[str], Path]


def config_of(directory: Path, **changes: Any) -> ModelConfig:
    raw = json.loads((directory / "config.json").read_text())
    return ModelConfig.from_dict({**raw, **changes})


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": kind, **parameters}}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ({"architectures": None, "model_type": "phi3"}, "phi3"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (rope("default", partial_rotary_factor=0.25), "partial_rotary_factor=0.25"),
        (rope("longrope"), "longrope"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope"),
        (rope("linear"), "factor"),
        (rope("llama3", factor=8.0, original_max_position_embeddings=64), "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ],
)
def test_configurations_are_refused_by_name(changes: dict[str, Any], named: str, checkpoint: CheckpointOf) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        config_of(checkpoint("llama"), **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"]}, "3 layers"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
    ],
)
def test_layer_types_are_refused_by_name(changes: dict[str, Any], named: str, checkpoint: CheckpointOf) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        config_of(checkpoint("qwen3"), **changes)


@pytest.mark.parametrize(
    ("variant", "dropped", "expected"),
    [
        ("llama", "sliding_window", (None, None, None)),
        ("mistral", "sliding_window", (4096, 4096, 4096)),
        ("qwen2", "layer_types", (None, None, None)),
    ],
)
def test_silence_means_what_transformers_takes_it_for(
    variant: str, dropped: str, expected: tuple[int | None, ...], checkpoint: CheckpointOf
) -> None:
    raw = json.loads((checkpoint(variant) / "config.json").read_text())
    raw.pop(dropped, None)
    assert ModelConfig.from_dict(raw).layer_windows == expected


def test_lengths_follow_the_stretch_of_the_rotary_embedding(checkpoint: CheckpointOf) -> None:
    directory = checkpoint("llama")  # 512 positions
    assert config_of(directory).max_length == 512
    assert config_of(directory, **rope("linear", factor=2.0)).max_length == 1024
    assert config_of(directory, **rope("dynamic", factor=4.0)).max_length == 2048
    yarn = rope("yarn", factor=4.0, original_max_position_embeddings=512)
    assert config_of(directory, **yarn).max_length == 2048
    dynamic = config_of(directory, **rope("dynamic", factor=4.0))
    assert dynamic.rotation_salt(512) == b""
    assert dynamic.rotation_salt(513) != dynamic.rotation_salt(514)
    assert config_of(directory).rotation_salt(100_000) == b""


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (drop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight"),
        (drop("lm_head.weight"), "lacks lm_head.weight"),
        (put("model.layers.0.self_attn.q_norm.weight", torch.ones(16)), "no use for: model.layers.0.self_attn.q_norm"),
        (put("model.norm.weight", torch.ones(65)), r"model.norm.weight has shape \[65\]"),
        (put("model.norm.weight", torch.ones(64, dtype=torch.int32)), "model.norm.weight is stored as I32"),
        (put("model.norm.weight", torch.ones(64).to(torch.float8_e4m3fn)), "F8_E4M3"),
    ],
)
def test_tensors_are_refused_by_name(
    edit: Callable[[dict[str, torch.Tensor]], object], named: str, tmp_path: Path
) -> None:
    directory = edit_weights(make_checkpoint(tmp_path / "m", "llama"), edit)
    with pytest.raises(UnsupportedModel, match=named):
        load_model(directory)


def test_stored_rotary_frequencies_and_a_doubled_tied_head_are_ignored(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama-tied")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    before = load_model(directory).fingerprint
    assert load_model(edit_weights(directory, add)).fingerprint == before


def test_missing_and_foreign_files_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        load_model(tmp_path)
    directory = make_checkpoint(tmp_path / "m", "llama", max_shard_size="200KB")
    shards = sorted(directory.glob("*.safetensors"))
    shards[0].write_bytes(b"not safetensors")
    with pytest.raises(UnsupportedModel, match=shards[0].name):
        load_model(directory)
    shards[0].unlink()
    with pytest.raises(UnsupportedModel, match=f"{shards[0].name} is missing"):
        load_model(directory)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ModelNotFound, match=r"model\.safetensors"):
        load_model(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"pytorch_model\.bin"):
        load_model(directory)
    (directory / "config.json").write_text("[1")
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        load_model(directory)


def test_an_index_cannot_point_outside_its_directory(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama", max_shard_size="200KB")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(UnsupportedModel, match="outside"):
        load_model(directory)


def test_fingerprints_tell_weights_apart_and_ignore_the_path(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "a", "llama", seed=1)
    copy = make_checkpoint(tmp_path / "b", "llama", seed=1)
    other = make_checkpoint(tmp_path / "c", "llama", seed=2)
    prints = [model_fingerprint(Checkpoint(one), ModelConfig.from_directory(one)) for one in (first, copy, other)]
    assert prints[0] == prints[1] != prints[2]


def test_auto_takes_the_stored_dtype_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_fp16": False})
    assert resolve_dtype("auto", torch.bfloat16, cpu) is torch.bfloat16
    assert resolve_dtype("auto", torch.float16, cpu) is torch.float32
    assert resolve_dtype("auto", torch.float16, cuda) is torch.float16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert resolve_dtype("auto", torch.bfloat16, cpu) is torch.float32
    assert resolve_dtype("float16", torch.bfloat16, cpu) is torch.float16
    with pytest.raises(UnsupportedModel, match="int8"):
        resolve_dtype("int8", torch.bfloat16, cpu)


def test_models_resolve_without_the_network(
    checkpoint: CheckpointOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(str(checkpoint("llama"))) == checkpoint("llama").resolve()
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ModelNotFound, match="not a directory"):
        resolve_model("./no/such/place")

    def offline(hub_id: str, **_: Any) -> str:
        raise LocalEntryNotFoundError(hub_id)

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelNotFound, match="org/name is neither a directory nor cached"):
        resolve_model("org/name")
    monkeypatch.undo()
    with pytest.raises(ModelNotFound, match="hub id"):
        resolve_model("not a hub id!")
