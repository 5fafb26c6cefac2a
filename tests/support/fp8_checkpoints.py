"""FP8 checkpoints as they are published, made from the unquantized ones of `support.checkpoints`.

Quantised here by definition and not by `engine.fp8`, so that both can be wrong only in different ways.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E4M3_LARGEST = 448.0

SCHEMES: dict[str, dict[str, Any]] = {
    # AutoFP8: one scale per matrix, measured scales for inputs
    "tensor": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    # llm-compressor's FP8_DYNAMIC
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "output_activations": None,
                "weights": {
                    "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True,
                },
            }
        },
    },
    # Qwen3-*-FP8 and DeepSeek
    "block": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
    },
}  # fmt: skip


def quantise_checkpoint(
    source: Path,
    directory: Path,
    scheme: str,
    *,
    page_scales: tuple[float, float] | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Path, Path]:
    """Write an FP8 copy of a one-file checkpoint, and the same numbers dequantised as a plain one.

    Args:
        source: unquantized.
        directory: made; holds `fp8` and `plain`.
        scheme: a key of `SCHEMES`.
        page_scales: `k_scale` and `v_scale` of every layer.
        scale_dtype: of the scales of weights.

    Returns:
        The FP8 directory and the plain one.
    """
    quantised, plain = shutil.copytree(source, directory / "fp8"), shutil.copytree(source, directory / "plain")
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    stored, numbers = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        tile = {"tensor": weight.shape, "channel": (1, weight.shape[1]), "block": (128, 128)}[scheme]
        values, scales, numbers[name] = _quantise(weight, tile, scale_dtype)
        stored[name] = values
        prefix = name.removesuffix(".weight")
        if scheme == "block":
            stored[f"{prefix}.weight_scale_inv"] = scales
        else:
            stored[f"{prefix}.weight_scale"] = scales.view(-1) if scheme == "tensor" else scales
        if scheme == "tensor":
            stored[f"{prefix}.input_scale"] = torch.tensor([0.02])
    if page_scales is not None:
        for layer in range(config["num_hidden_layers"]):
            for part, scale in zip("kv", page_scales, strict=True):
                stored[f"model.layers.{layer}.self_attn.{part}_scale"] = torch.tensor([scale])
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": SCHEMES[scheme]}))
    return quantised, plain


def edit_quantization(directory: Path, **changes: Any) -> None:
    """Change keys of `quantization_config`."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def _quantise(
    weight: torch.Tensor, tile: tuple[int, ...], scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E4M3 numbers, a scale per tile, and their products in the weight's dtype; tile by tile."""
    rows, columns = tile
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    numbers = torch.empty(weight.shape, dtype=torch.float32)
    scales = torch.empty(math.ceil(weight.shape[0] / rows), math.ceil(weight.shape[1] / columns), dtype=scale_dtype)
    for down in range(scales.shape[0]):
        for across in range(scales.shape[1]):
            place = (slice(down * rows, (down + 1) * rows), slice(across * columns, (across + 1) * columns))
            part = weight[place].float()
            scales[down, across] = part.abs().max() / E4M3_LARGEST
            scale = scales[down, across].float()
            values[place] = (part / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
            numbers[place] = values[place].float() * scale
    return values, scales, numbers.to(weight.dtype)
