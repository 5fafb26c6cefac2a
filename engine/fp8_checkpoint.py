"""FP8 matrices as checkpoints store them: which tensors belong to one, whether they fit, and reading several as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.fp8 import Fp8Matrix
from engine.quantization import Quantization
from fleet.errors import UnsupportedModel

if TYPE_CHECKING:
    from engine.weights import TensorInfo, TensorSource

STORED_AS = "F8_E4M3"  # as safetensors spells it
_WEIGHT_SCALES = ("weight_scale", "weight_scale_inv")  # either multiplies, whatever its name says
_INPUT_SCALES = ("input_scale", "activation_scale")
_KEY_SCALES = ("self_attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.k_proj.output_scale", "self_attn.kv_scale")
_VALUE_SCALES = ("self_attn.v_scale", "self_attn.v_proj.v_scale", "self_attn.v_proj.output_scale", "self_attn.kv_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Part:
    """One module of the checkpoint, its weight and its bias to be multiplied by powers of two.

    Attributes:
        name: without `.weight`.
        factor: of the weight.
        bias_factor: of the bias.
    """

    name: str
    factor: float = 1.0
    bias_factor: float = 1.0


def scale_tensors(
    tensors: Mapping[str, TensorInfo], matrices: Many[str], num_layers: int, quantization: Quantization | None
) -> set[str]:
    """Names of all scales that the checkpoint holds for FP8 matrices and for pages, checked.

    Args:
        tensors: of the checkpoint.
        matrices: names, without `.weight`, that may be FP8.
        num_layers: whose pages may have scales.
        quantization: as the configuration has it.

    Raises:
        UnsupportedModel: a matrix is FP8 and the configuration silent, a scale is missing or of a wrong shape.
    """
    found: set[str] = set()
    for name in matrices:
        info = tensors.get(f"{name}.weight")
        if info is None or info.dtype != STORED_AS:
            continue
        if quantization is None:
            raise UnsupportedModel(
                f"{name}.weight is stored as {STORED_AS}, but config.json has no quantization_config"
            )
        scale = _present(tensors, name, _WEIGHT_SCALES)
        if scale is None:
            raise UnsupportedModel(f"the checkpoint lacks {name}.{' or .'.join(_WEIGHT_SCALES)}")
        _check_scale(scale, tensors[scale], info.shape, quantization)
        found.add(scale)
        inputs = _present(tensors, name, _INPUT_SCALES)
        if inputs is not None:
            _check_scalar(inputs, tensors[inputs])
            found.add(inputs)
        elif quantization.static_inputs:
            raise UnsupportedModel(f"the checkpoint lacks {name}.{_INPUT_SCALES[0]}, which static inputs need")
    for layer in range(num_layers):
        for names in (_KEY_SCALES, _VALUE_SCALES):
            if (scale := _present(tensors, f"model.layers.{layer}", names)) is not None:
                _check_scalar(scale, tensors[scale])
                found.add(scale)
    return found


def page_scales(checkpoint: TensorSource, layer: int) -> tuple[float, float]:
    """By what a layer's keys and values are divided in FP8 pages: powers of two, 1 where the checkpoint is silent.

    A stored scale is rounded up to a power of two. Numbers with an exponent of their own lose nothing by that, and
    weights can be multiplied by it without rounding, so that no kernel needs to know of scales.

    Raises:
        UnsupportedModel: a scale is not a positive number.
    """
    scales = []
    for names in (_KEY_SCALES, _VALUE_SCALES):
        name = _present(checkpoint.tensors, f"model.layers.{layer}", names)
        value = 1.0 if name is None else _scalar(checkpoint, name)
        scales.append(2.0 ** math.ceil(math.log2(value)))
    return scales[0], scales[1]


def read_fp8(
    checkpoint: TensorSource, parts: Many[Part], quantization: Quantization | None, device: torch.device
) -> Fp8Matrix | None:
    """Matrices of equal width as one, rows stacked; None if they are not all FP8 or their tiles do not stack.

    Raises:
        UnsupportedModel: a scale is not a positive number.
    """
    if quantization is None or not all(is_fp8(checkpoint, part.name) for part in parts):
        return None
    scales = [_scales(checkpoint, part, quantization) for part in parts]
    shapes = [checkpoint.tensors[f"{part.name}.weight"].shape for part in parts]
    tile = quantization.tile if scales[0].dim() == 2 else None
    if any((one.dim() == 2) != (tile is not None) for one in scales):
        return None
    if tile is not None and any(shape[0] % tile[0] for shape in shapes[:-1]):
        return None
    rows = sum(shape[0] for shape in shapes)
    values = torch.empty((rows, shapes[0][1]), dtype=torch.float8_e4m3fn, device=device)
    top = 0
    for part, shape in zip(parts, shapes, strict=True):
        values[top : top + shape[0]].copy_(checkpoint.read(f"{part.name}.weight"))
        top += shape[0]
    input_scale = None
    if quantization.static_inputs:  # the parts read one input, so the largest of their scales covers it
        names = [_present(checkpoint.tensors, part.name, _INPUT_SCALES) for part in parts]
        input_scale = max(_scalar(checkpoint, name) for name in names if name is not None)
    return Fp8Matrix(values, torch.cat(scales).to(device), tile, input_scale)


def is_fp8(checkpoint: TensorSource, name: str) -> bool:
    """Whether the matrix is stored as FP8."""
    return checkpoint.tensors[f"{name}.weight"].dtype == STORED_AS


def _scales(checkpoint: TensorSource, part: Part, quantization: Quantization) -> torch.Tensor:
    """Of one matrix, float32: per channel [out], or per tile in two dimensions."""
    name = _present(checkpoint.tensors, part.name, _WEIGHT_SCALES)
    assert name is not None  # noqa: S101 - `scale_tensors` has looked
    scale = checkpoint.read(name).to(torch.float32)
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise UnsupportedModel(f"{name} holds numbers that are no scales")
    out = checkpoint.tensors[f"{part.name}.weight"].shape[0]
    if scale.numel() == 1 and (quantization.tile is None or scale.dim() < 2):
        scale = scale.view(1).expand(out)
    elif quantization.tile is None:
        scale = scale.view(out)
    return scale * part.factor


def _check_scale(name: str, info: TensorInfo, weight: tuple[int, ...], quantization: Quantization) -> None:
    """Raise UnsupportedModel unless a matrix's scale is per tensor, per channel or per announced tile."""
    out, width = weight
    shapes: list[tuple[int, ...]] = [(), (1,)]
    if quantization.tile is None:
        shapes += [(1, 1), (out,), (out, 1)]
    else:
        shapes.append((-(-out // quantization.tile[0]), -(-width // quantization.tile[1])))
    if info.shape not in shapes:
        raise UnsupportedModel(
            f"{name} has shape {list(info.shape)}; scales of a {out} x {width} matrix are "
            f"{' or '.join(str(list(shape)) for shape in shapes)}"
        )
    _check_dtype(name, info)


def _check_scalar(name: str, info: TensorInfo) -> None:
    if math.prod(info.shape) != 1:
        raise UnsupportedModel(f"{name} has shape {list(info.shape)}; one number is supported")
    _check_dtype(name, info)


def _check_dtype(name: str, info: TensorInfo) -> None:
    if info.dtype not in _SCALE_DTYPES:
        raise UnsupportedModel(f"{name} is stored as {info.dtype}; supported are {', '.join(_SCALE_DTYPES)}")


def _scalar(checkpoint: TensorSource, name: str) -> float:
    value = float(checkpoint.read(name).to(torch.float32).view(-1)[0])
    if not (math.isfinite(value) and value > 0):
        raise UnsupportedModel(f"{name} is {value}, which is no scale")
    return value


def _present(tensors: Mapping[str, TensorInfo], prefix: str, names: Many[str]) -> str | None:
    """The first of some names that the checkpoint holds under `prefix`."""
    return next((name for one in names if (name := f"{prefix}.{one}") in tensors), None)
