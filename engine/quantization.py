"""How a checkpoint says that its matrices are FP8, in the spellings that are published.

- `quant_method: fp8`: `weight_scale` per tensor (AutoFP8), or `weight_scale_inv` per tile with `weight_block_size`
  (DeepSeek, Qwen3-*-FP8). `activation_scheme` is `dynamic`, or `static` with an `input_scale` per matrix.
- `quant_method: compressed-tensors`: `config_groups`, each with a `strategy` of weights (`tensor`, `channel`, `block`)
  and of inputs (RedHatAI's and other checkpoints of llm-compressor).

Which matrices are quantised, the tensors say themselves, and the shape of a matrix's scales says what they cover; so
lists of ignored layers (`ignore`, `ignored_layers`, `modules_to_not_convert`) need no reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fleet.errors import UnsupportedModel

ADVICE = "Baton reads FP8 e4m3 checkpoints (quant_method fp8 or compressed-tensors); serve the unquantized one"


@dataclass(frozen=True, slots=True)
class Quantization:
    """What the configuration says beyond the tensors.

    Attributes:
        tile: (rows, columns) that a scale of two dimensions covers, None where none is announced.
        static_inputs: inputs are quantised by the checkpoint's own `input_scale`.
    """

    tile: tuple[int, int] | None
    static_inputs: bool


def read_quantization(raw: dict[str, Any]) -> Quantization | None:
    """Read it from a parsed `config.json`; None for an unquantized model. Raises UnsupportedModel."""
    config = raw.get("quantization_config") or raw.get("compression_config")
    if not config:
        return None
    if not isinstance(config, dict):
        raise UnsupportedModel(f"quantization_config is {config!r}. {ADVICE}")
    method = config.get("quant_method")
    if method == "fp8":
        return _fine_grained(config)
    if method in ("compressed-tensors", "compressed_tensors"):
        return _compressed_tensors(config)
    raise UnsupportedModel(f"quantization_config has quant_method {method!r}. {ADVICE}")


def _fine_grained(config: dict[str, Any]) -> Quantization:
    if config.get("fmt", "e4m3") != "e4m3":
        raise UnsupportedModel(f"quantization_config: fmt {config['fmt']!r}. {ADVICE}")
    if config.get("scale_fmt") not in (None, "float"):
        raise UnsupportedModel(f"quantization_config: scale_fmt {config['scale_fmt']!r} is not supported")
    scheme = config.get("activation_scheme", "dynamic")
    if scheme not in ("static", "dynamic"):
        raise UnsupportedModel(f"quantization_config: activation_scheme {scheme!r}; supported are static and dynamic")
    tile = _tile(config.get("weight_block_size"), "weight_block_size")
    return _checked(tile, static_inputs=scheme == "static")


def _compressed_tensors(config: dict[str, Any]) -> Quantization:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UnsupportedModel(f"quantization_config has no config_groups. {ADVICE}")
    if config.get("sparsity_config"):
        raise UnsupportedModel("quantization_config: sparsity_config is not supported")
    found = {_group(name, group) for name, group in groups.items()}
    if len(found) > 1:
        raise UnsupportedModel(
            f"quantization_config: config_groups {', '.join(groups)} differ; one scheme is supported"
        )
    return found.pop()


def _group(name: str, group: Any) -> Quantization:
    """One of `config_groups`."""
    where = f"quantization_config.config_groups.{name}"
    weights = _scheme(group, "weights", where)
    if weights is None or weights.get("strategy") not in ("tensor", "channel", "block"):
        raise UnsupportedModel(f"{where}.weights: strategy must be tensor, channel or block. {ADVICE}")
    inputs = _scheme(group, "input_activations", where)
    if inputs is None:
        raise UnsupportedModel(f"{where} leaves inputs unquantized (weight-only), which is not supported. {ADVICE}")
    tile = None
    if weights["strategy"] == "block":
        tile = _tile(weights.get("block_structure"), f"{where}.weights.block_structure")
        if tile is None:
            raise UnsupportedModel(f"{where}.weights.block_structure is missing")
    return _checked(tile, static_inputs=not inputs.get("dynamic", False))


def _scheme(group: Any, key: str, where: str) -> dict[str, Any] | None:
    """Weights' or inputs' arguments; they must be 8-bit floating point numbers around zero."""
    scheme = group.get(key) if isinstance(group, dict) else None
    if scheme is None:
        return None
    if not isinstance(scheme, dict) or (scheme.get("num_bits"), scheme.get("type")) != (8, "float"):
        raise UnsupportedModel(f"{where}.{key} is not 8-bit float. {ADVICE}")
    if not scheme.get("symmetric", True):
        raise UnsupportedModel(f"{where}.{key} is not symmetric, which is not supported")
    return scheme


def _tile(value: Any, where: str) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):  # `128x128` in older files
        value = [int(part) if part.isdigit() else part for part in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(size, int) and size > 0 for size in value):
        raise UnsupportedModel(f"{where} must be two whole numbers, got {value!r}")
    return value[0], value[1]


def _checked(tile: tuple[int, int] | None, *, static_inputs: bool) -> Quantization:
    if tile is not None and static_inputs:
        raise UnsupportedModel("quantization_config: static inputs with scales per block are not supported")
    return Quantization(tile, static_inputs)
