"""What `config.json` says, reduced to the numbers that the forward pass needs. Everything else is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.quantization import Quantization, read_quantization
from engine.rope_config import RopeConfig, read_rope
from fleet.errors import ModelNotFound, UnsupportedModel


@dataclass(frozen=True, slots=True)
class _Family:
    """What a `transformers` configuration class assumes where `config.json` is silent."""

    num_kv_heads: int | None  # None: as many as query heads
    head_dim: int | None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int
    qkv_bias: bool = False
    reads_attention_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    layered_windows: bool = False  # use_sliding_window, max_window_layers, layer_types
    default_window: int | None = None


FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(
        num_kv_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
        reads_attention_bias=True,
        reads_mlp_bias=True,
    ),
    "MistralForCausalLM": _Family(num_kv_heads=8, head_dim=None, max_position_embeddings=131072, default_window=4096),
    "Qwen2ForCausalLM": _Family(
        num_kv_heads=32, head_dim=None, max_position_embeddings=32768, qkv_bias=True, layered_windows=True
    ),
    "Qwen3ForCausalLM": _Family(
        num_kv_heads=32,
        head_dim=128,
        max_position_embeddings=32768,
        reads_attention_bias=True,
        qk_norm=True,
        layered_windows=True,
    ),
}

_BY_MODEL_TYPE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A dense decoder of the Llama, Mistral, Qwen2 or Qwen3 family.

    Attributes:
        architecture: the class name of `transformers`, a key of `FAMILIES`.
        num_heads, num_kv_heads, head_dim: of attention; `head_dim` need not be `hidden_size / num_heads`.
        qkv_bias, o_bias, mlp_bias: which projections carry a bias.
        qk_norm: RMS norm over each head's query and key before rotation (Qwen3).
        max_position_embeddings: as written in `config.json`.
        max_length: longest sequence in tokens that the rotary embedding is made for; see `RopeConfig.max_length`.
        layer_windows: per layer, how many latest tokens a query sees, itself included; None is all.
        checkpoint_dtype: `dtype` or `torch_dtype` as written, None where the file is silent.
        quantization: of FP8 matrices, None where nothing is quantized.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    max_length: int
    rope: RopeConfig
    layer_windows: tuple[int | None, ...]
    checkpoint_dtype: str | None
    quantization: Quantization | None

    @classmethod
    def from_directory(cls, directory: Path) -> ModelConfig:
        """Read `config.json`. Raises ModelNotFound without one, UnsupportedModel naming what we lack."""
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ModelNotFound(f"{directory} holds no config.json") from None
        except (OSError, ValueError) as error:
            raise UnsupportedModel(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(raw, dict):
            raise UnsupportedModel(f"{path} is not a JSON object")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """The same from a parsed `config.json`, in the spelling of transformers 4 or 5. Raises UnsupportedModel."""
        architecture = _architecture(raw)
        family = FAMILIES[architecture]
        _refuse_extras(raw, architecture)
        num_layers = _count(raw, "num_hidden_layers")
        num_heads = _count(raw, "num_attention_heads")
        hidden_size = _count(raw, "hidden_size")
        num_kv_heads = _count(raw, "num_key_value_heads", family.num_kv_heads or num_heads, null=num_heads)
        if num_heads % num_kv_heads:
            raise UnsupportedModel(
                f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}"
            )
        share = hidden_size // num_heads
        head_dim = _count(raw, "head_dim", family.head_dim or share, null=share)
        if head_dim % 2:
            raise UnsupportedModel(f"head_dim={head_dim} is odd; rotary embedding turns pairs")
        positions = _count(raw, "max_position_embeddings", family.max_position_embeddings)
        attention_bias = _flag(raw, "attention_bias") if family.reads_attention_bias else False
        rope = read_rope(raw, head_dim=head_dim, max_position_embeddings=positions)
        return cls(
            architecture=architecture,
            vocab_size=_count(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=_flag(raw, "mlp_bias") if family.reads_mlp_bias else False,
            qk_norm=family.qk_norm,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            max_position_embeddings=positions,
            max_length=rope.max_length,
            rope=rope,
            layer_windows=_layer_windows(raw, family, num_layers),
            checkpoint_dtype=_dtype_name(raw),
            quantization=read_quantization(raw),
        )

    def rotation_salt(self, prompt_len: int) -> bytes:
        """What prefix-cache names of this prompt must be salted with besides the model; usually nothing.

        Under dynamic NTK scaling the keys of a prompt longer than the original maximum are turned by frequencies
        that depend on the prompt's length, so equal token ids are equal keys only at equal length.
        """
        if self.rope.kind == "dynamic" and prompt_len > self.max_position_embeddings:
            return prompt_len.to_bytes(8, "big")
        return b""


def _architecture(raw: dict[str, Any]) -> str:
    """The one architecture named in the file. Raises UnsupportedModel for any other than ours."""
    named = raw.get("architectures")
    if isinstance(named, list) and named:
        name = str(named[0])
    else:
        model_type = str(raw.get("model_type"))
        name = _BY_MODEL_TYPE.get(model_type, f"model_type {model_type}")
    if name not in FAMILIES:
        raise UnsupportedModel(f"architecture {name} is not supported; supported are {', '.join(FAMILIES)}")
    return name


def _refuse_extras(raw: dict[str, Any], architecture: str) -> None:
    """Raise UnsupportedModel for settings that change the forward pass in ways we do not have."""
    for key in _EXPERT_KEYS:
        if raw.get(key):
            raise UnsupportedModel(f"{key}={raw[key]}: mixture-of-experts models are not supported")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"hidden_act {activation!r} is not supported; only silu is")
    if architecture == "MistralForCausalLM" and raw.get("layer_types"):
        kinds = set(raw["layer_types"])
        if len(kinds) > 1:
            raise UnsupportedModel(f"layer_types {sorted(kinds)} of a Mistral model are not supported")


def _layer_windows(raw: dict[str, Any], family: _Family, num_layers: int) -> tuple[int | None, ...]:
    """Sliding window per layer, None where a layer sees everything."""
    if not family.layered_windows:
        window = _window(raw, family.default_window) if family.default_window else None
        return (window,) * num_layers
    window = _window(raw, 4096) if _flag(raw, "use_sliding_window") else None
    kinds = raw.get("layer_types")
    if kinds is None:
        first = _count(raw, "max_window_layers", 28, minimum=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise UnsupportedModel(f"layer_types does not name {num_layers} layers")
    for kind in kinds:
        if kind not in {"full_attention", "sliding_attention"}:
            raise UnsupportedModel(f"layer type {kind!r} is not supported")
        if kind == "sliding_attention" and window is None:
            raise UnsupportedModel("layer_types asks for sliding_attention but sliding_window is off")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _window(raw: dict[str, Any], default: int) -> int | None:
    """`sliding_window`, where an explicit null is off and silence is the family's default."""
    if raw.get("sliding_window", default) is None:
        return None
    return _count(raw, "sliding_window", default)


def _dtype_name(raw: dict[str, Any]) -> str | None:
    """`dtype` (transformers 5) or `torch_dtype` (4), without a `torch.` prefix."""
    name = raw.get("dtype") or raw.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")


def _count(
    raw: dict[str, Any], key: str, default: int | None = None, *, null: int | None = None, minimum: int = 1
) -> int:
    """A whole number; `default` where the key is absent, `null` (else the default) where it is null."""
    value = raw.get(key, default)
    if value is None:
        value = null if null is not None and key in raw else default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise UnsupportedModel(f"config.json: {key} must be a whole number of at least {minimum}, got {value!r}")
    return value


def _number(raw: dict[str, Any], key: str, default: float) -> float:
    """A real number, `default` where the key is absent."""
    value = raw.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UnsupportedModel(f"config.json: {key} must be a number, got {value!r}")
    return float(value)


def _flag(raw: dict[str, Any], key: str) -> bool:
    """A boolean, false where the key is absent or null."""
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise UnsupportedModel(f"config.json: {key} must be true or false, got {value!r}")
    return bool(value)
