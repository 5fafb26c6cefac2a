"""From a model directory to a model in memory."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.backend import Backend, TorchBackend
from engine.choice import choice_for
from engine.cpu.backend import CpuBackend
from engine.cpu.shared_cores import SharedCores
from engine.cpu.weight_cache import WeightCache
from engine.dummy_checkpoint import DummyCheckpoint
from engine.fp8 import E4M3
from engine.model_config import ModelConfig
from engine.packed_backend import can_pack
from engine.transformer import Transformer
from engine.weight_loader import WeightLoader
from engine.weights import Checkpoint, check_tensors, matrix_numbers, model_fingerprint, stored_dtype
from fleet.errors import SettingsError, UnsupportedModel
from fleet.logs import get_logger

_log = get_logger("load")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8_CAPABILITY = (8, 9)
"""The first CUDA compute capability with FP8: Ada and Hopper."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        config: what `config.json` says.
        transformer: the forward pass with its weights.
        dtype: of activations, and of weights that are not FP8.
        kv_dtype: of keys and values in pages: `dtype`, or e4m3.
        num_fp8: matrices whose products are made in FP8. num_widened: FP8 matrices that were dequantised instead.
        num_int8: matrices rounded to 8 bits.
        device: where they are.
        fingerprint: hash of configuration and weights, for `fleet.types.Fingerprint.model`.
        weight_bytes: memory that the weights take, mapped embedding included.
        load_s: how long loading took.
    """

    config: ModelConfig
    transformer: Transformer
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    fingerprint: str
    weight_bytes: int
    num_fp8: int
    num_widened: int
    num_int8: int
    load_s: float

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return _name(self.dtype)

    @property
    def kv_dtype_name(self) -> str:
        """As `dtype_name`, or `float8_e4m3fn`."""
        return _name(self.kv_dtype)


def load_model(
    directory: Path,
    dtype: str = "auto",
    device: str = "cpu",
    cores: SharedCores | None = None,
    *,
    quantization: str = "auto",
    kv_cache_dtype: str = "auto",
    load_format: str = "auto",
    weight_cache: WeightCache | None = None,
    page_size: int | None = None,
) -> LoadedModel:
    """Read configuration and weights of a Hugging Face directory.

    Weights are read from memory-mapped files straight into matrices of their own, query, key and value rows stacked
    into one and gate and up rows into another, so that each exists once and the mapping can be dropped. Only an
    embedding of the right dtype stays mapped, where no matrix shares its memory: a step reads a few of its rows.

    Args:
        directory: as `engine.hub.resolve_model` returns it.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own, except on a CPU without instructions
            for it (bfloat16: AMX-BF16 or AVX512-BF16; float16: AMX-FP16 or AVX512-FP16), where it is float32.
        device: `cpu`, or a torch device.
        cores: shared with other workers; for a backend that computes alike on any number of threads.
        quantization: `auto`: as the checkpoint is; `fp8`: one that is unquantized is quantised as it is loaded, with a
            scale per output channel, embedding and vocabulary head aside; `int8`: likewise its weights alone, on CPUs
            where our own kernel makes bfloat16 products.
        kv_cache_dtype: of pages: `auto`, the model's own; or `fp8_e4m3`.
        load_format: `auto`: the directory's safetensors; `dummy`: random weights, for measuring. They are those of
            `engine.dummy_checkpoint`, and the directory needs none.
        weight_cache: where packed matrices may lie in a file for all workers of the machine; None: in own memory.
        page_size: tokens of a page, for kernels that may be compiled while another worker packs the matrices. Workers
            keep them on disk for each other, so that this one's time spares the other's.

    Raises:
        ModelNotFound: files are missing.
        UnsupportedModel: the checkpoint needs something that Baton does not have, or does not fit its configuration.
        SettingsError: `quantization`, `kv_cache_dtype` or `load_format` is unknown, the device cannot do it, or `dummy`
            or `int8` meets a quantized model.
    """
    began_s = time.perf_counter()
    config = ModelConfig.from_directory(directory)
    target = torch.device(device)
    if load_format not in ("auto", "dummy"):
        raise SettingsError(f"BATON_LOAD_FORMAT = {load_format!r}: auto or dummy")
    with Checkpoint(directory) if load_format == "auto" else DummyCheckpoint(directory, config, target) as checkpoint:
        check_tensors(config, checkpoint)
        resolved = resolve_dtype(dtype, stored_dtype(checkpoint), target)
        kv_dtype = resolve_kv_dtype(kv_cache_dtype, resolved, target)
        if quantization not in ("auto", "fp8", "int8"):
            raise SettingsError(f"BATON_QUANTIZATION = {quantization!r}: auto, fp8 or int8")
        backend = _backend(config, resolved, target, cores, weight_cache)
        if quantization == "int8":
            _check_int8(config, resolved, target, backend)
        loader = WeightLoader(
            config,
            checkpoint,
            resolved,
            target,
            backend,
            quantization=quantization if config.quantization is None else "auto",
            scales_pages=kv_dtype is E4M3,
        )
        fingerprint = model_fingerprint(checkpoint, config, quantization)
        values = f"{fingerprint} {checkpoint.stamps()} {'pages scaled' if kv_dtype is E4M3 else ''}"

        def compile_kernels() -> None:
            if page_size is not None:
                backend.warm(config, page_size)
                choice_for(target)

        with backend.loading(values, matrix_numbers(config) * resolved.itemsize, compile_kernels):
            transformer = loader.transformer()
    if loader.num_widened:
        _log.warning(
            "FP8 matrices are dequantised, which needs the memory of unquantized ones: no FP8 products here",
            matrices=loader.num_widened,
            of=loader.num_widened + loader.num_fp8,
            dtype=_name(resolved),
            device=device,
            needs="a CUDA device of compute capability 8.9 or newer, dtype bfloat16, sizes that are multiples of 16",
        )
    return LoadedModel(
        config=config,
        transformer=transformer,
        dtype=resolved,
        kv_dtype=kv_dtype,
        device=target,
        fingerprint=fingerprint,
        weight_bytes=loader.weight_bytes,
        num_fp8=loader.num_fp8,
        num_widened=loader.num_widened,
        num_int8=loader.num_int8,
        load_s=time.perf_counter() - began_s,
    )


def resolve_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What `dtype` means for a checkpoint stored as `stored`; see `load_model`. Raises UnsupportedModel."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise UnsupportedModel(f"dtype {dtype!r} is not supported; choose auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device.type != "cpu" or stored is torch.float32:
        return stored
    able = torch.cpu.get_capabilities()
    fast = {
        torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
        torch.float16: ("amx_fp16", "avx512_fp16", "fp16"),
    }
    return stored if any(able.get(name) for name in fast[stored]) else torch.float32


def resolve_kv_dtype(kv_cache_dtype: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What `kv_cache_dtype` means for a model of `dtype`; see `load_model`. Raises SettingsError."""
    if kv_cache_dtype == "auto":
        return dtype
    if kv_cache_dtype != "fp8_e4m3":
        raise SettingsError(f"BATON_KV_CACHE_DTYPE = {kv_cache_dtype!r}: auto or fp8_e4m3")
    if device.type == "cuda" and not has_fp8(device):
        raise SettingsError(
            f"BATON_KV_CACHE_DTYPE = {kv_cache_dtype} needs a GPU of compute capability 8.9 or newer; "
            f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}"
        )
    return E4M3


def has_fp8(device: torch.device) -> bool:
    """Whether a CUDA device converts and multiplies FP8 numbers."""
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def _name(dtype: torch.dtype) -> str:
    """As settings spell it."""
    return str(dtype).removeprefix("torch.")


def _check_int8(config: ModelConfig, dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
    """Raises: SettingsError where weights cannot be rounded to 8 bits."""
    if config.quantization is not None:
        raise SettingsError("BATON_QUANTIZATION = int8, but the checkpoint is quantized already: leave it at auto")
    if device.type != "cpu":
        raise SettingsError(f"BATON_QUANTIZATION = int8 is for CPUs; on {device.type} set fp8")
    if dtype is not torch.bfloat16:
        raise SettingsError(f"BATON_QUANTIZATION = int8 needs dtype bfloat16, not {_name(dtype)}: set BATON_DTYPE")
    if not backend.rounds:
        raise SettingsError(
            "BATON_QUANTIZATION = int8 needs a CPU with AVX512-BF16 and without AMX, and numba: leave it at auto here"
        )


def _backend(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    cores: SharedCores | None,
    weight_cache: WeightCache | None,
) -> Backend:
    """The fastest backend that gives the specified results here. Raises: UnsupportedModel."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UnsupportedModel("a CUDA device needs Triton: pip install 'baton-serve[gpu]'")
        from engine.kernel_backend import KernelBackend

        group = config.num_heads // config.num_kv_heads
        return KernelBackend(group=group, device=device, fp8=has_fp8(device))
    return CpuBackend(cores, weight_cache) if dtype is torch.bfloat16 and can_pack(device) else TorchBackend()
