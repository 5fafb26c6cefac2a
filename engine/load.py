"""From a model directory to a model in memory."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.backend import Backend, Linear, TorchBackend
from engine.cpu.backend import CpuBackend
from engine.cpu.shared_cores import SharedCores
from engine.model_config import ModelConfig
from engine.packed_backend import PackedBackend, can_pack
from engine.rope import Rotary
from engine.transformer import Layer, Transformer
from engine.weights import Checkpoint, check_tensors, model_fingerprint, stored_dtype
from fleet.errors import UnsupportedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        config: what `config.json` says.
        transformer: the forward pass with its weights.
        dtype: of weights, activations, keys and values.
        device: where they are.
        fingerprint: hash of configuration and weights, for `fleet.types.Fingerprint.model`.
        weight_bytes: memory that the weights take, mapped embedding included.
        load_s: how long loading took.
    """

    config: ModelConfig
    transformer: Transformer
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    weight_bytes: int
    load_s: float

    @property
    def dtype_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.dtype).removeprefix("torch.")


def load_model(
    directory: Path, dtype: str = "auto", device: str = "cpu", cores: SharedCores | None = None
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

    Raises:
        ModelNotFound: files are missing.
        UnsupportedModel: the checkpoint needs something that Baton does not have, or does not fit its configuration.
    """
    began_s = time.perf_counter()
    config = ModelConfig.from_directory(directory)
    target = torch.device(device)
    with Checkpoint(directory) as checkpoint:
        check_tensors(config, checkpoint)
        resolved = resolve_dtype(dtype, stored_dtype(checkpoint), target)
        loader = _Loader(config, checkpoint, resolved, target, _backend(config, resolved, target, cores))
        transformer = loader.transformer()
    return LoadedModel(
        config=config,
        transformer=transformer,
        dtype=resolved,
        device=target,
        fingerprint=model_fingerprint(directory, config),
        weight_bytes=loader.weight_bytes,
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


def _backend(config: ModelConfig, dtype: torch.dtype, device: torch.device, cores: SharedCores | None) -> Backend:
    """The fastest backend that gives the specified results here. Raises: UnsupportedModel."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UnsupportedModel("a CUDA device needs Triton: pip install 'baton-serve[gpu]'")
        from engine.kernel_backend import KernelBackend

        return KernelBackend(group=config.num_heads // config.num_kv_heads, device=device)
    return CpuBackend(cores) if dtype is torch.bfloat16 and can_pack(device) else TorchBackend()


class _Loader:
    """Builds a `Transformer` out of an open checkpoint, one matrix at a time."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._backend = backend
        self.weight_bytes = 0

    def transformer(self) -> Transformer:
        """The whole model."""
        config = self._config
        tied = config.tie_word_embeddings
        if tied and not isinstance(self._backend, PackedBackend):
            head = embedding = self._stack("model.embed_tokens.weight")
        else:
            embedding = self._mapped("model.embed_tokens.weight")
            head = self._stack("model.embed_tokens.weight" if tied else "lm_head.weight")
        return Transformer(
            config=config,
            backend=self._backend,
            embedding=embedding,
            layers=tuple(self._layer(index) for index in range(config.num_layers)),
            final_norm=self._stack("model.norm.weight"),
            lm_head=self._backend.linear(head, None),
            rotary=Rotary(config.rope, self._device),
        )

    def _layer(self, index: int) -> Layer:
        config = self._config
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return Layer(
            qkv=self._linear(config.qkv_bias, *(f"{attention}.{part}_proj" for part in "qkv")),
            output=self._linear(config.o_bias, f"{attention}.o_proj"),
            gate_up=self._linear(config.mlp_bias, f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=self._linear(config.mlp_bias, f"{mlp}.down_proj"),
            attention_norm=self._stack(f"{prefix}.input_layernorm.weight"),
            mlp_norm=self._stack(f"{prefix}.post_attention_layernorm.weight"),
            query_norm=self._stack(f"{attention}.q_norm.weight") if config.qk_norm else None,
            key_norm=self._stack(f"{attention}.k_norm.weight") if config.qk_norm else None,
            window=config.layer_windows[index],
        )

    def _linear(self, has_bias: bool, *names: str) -> Linear:
        """One product for several matrices of equal width, their rows stacked."""
        weight = self._stack(*(f"{name}.weight" for name in names))
        bias = self._stack(*(f"{name}.bias" for name in names)) if has_bias else None
        return self._backend.linear(weight, bias)

    def _stack(self, *names: str) -> torch.Tensor:
        """Tensors one below the other in new memory of the model's dtype and device."""
        shapes = [self._checkpoint.tensors[name].shape for name in names]
        rows = sum(shape[0] for shape in shapes)
        stacked = torch.empty((rows, *shapes[0][1:]), dtype=self._dtype, device=self._device)
        top = 0
        for name, shape in zip(names, shapes, strict=True):
            stacked[top : top + shape[0]].copy_(self._checkpoint.read(name))
            top += shape[0]
        self.weight_bytes += stacked.nbytes
        return stacked

    def _mapped(self, name: str) -> torch.Tensor:
        """The tensor in the page cache if it can be used as it is, else a copy."""
        tensor = self._checkpoint.read(name)
        if tensor.dtype != self._dtype or self._device.type != "cpu":
            return self._stack(name)
        self.weight_bytes += tensor.nbytes
        return tensor
