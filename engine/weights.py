"""A checkpoint's tensors, memory-mapped: what is there, whether it fits the configuration, and reading one."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from engine.fp8_checkpoint import STORED_AS, scale_tensors
from engine.model_config import ModelConfig
from fleet.errors import ModelNotFound, UnsupportedModel

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_EMBEDDING = "model.embed_tokens.weight"
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says of one tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, e.g. BF16


class TensorSource(Protocol):
    """Where weights come from: `Checkpoint`, which describes each of these, or `engine.dummy_checkpoint`."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Treat as read-only."""
        ...

    def map_alone(self, name: str) -> torch.Tensor:
        """Like `read`, for a tensor that is kept."""
        ...

    def sample(self, name: str) -> bytes:
        """A few rows of it."""
        ...

    def stamps(self) -> list[tuple[str, int, int]]:
        """What tells values apart beyond samples."""
        ...


class Checkpoint:
    """The open safetensors files of one model directory; use as a context manager.

    Nothing is read but headers until `read`, and what `read` returns lies in the page cache, shared by all processes of
    the machine, until it is copied.

    Attributes:
        tensors: every tensor by name, over all shards.
    """

    def __init__(self, directory: Path) -> None:
        """Open all shards. Raises ModelNotFound without any, UnsupportedModel for other formats and broken files."""
        self._directory = directory
        self._files: dict[str, Any] = {}  # by file name; safetensors ships no types for its handles
        self._file_of: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        expected = _expected_files(directory)
        for file_name in sorted(set(expected.values())) if expected else [SINGLE_FILE]:
            self._open(directory / file_name)
        for name, file_name in expected.items():
            if self._file_of.get(name) != file_name:
                raise UnsupportedModel(f"{INDEX_FILE} puts {name} into {file_name}, which does not hold it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()  # a mapping ends with the last tensor that lies in it

    def read(self, name: str) -> torch.Tensor:
        """The tensor as stored, mapped and not copied. Treat as read-only."""
        tensor: torch.Tensor = self._files[self._file_of[name]].get_tensor(name)
        return tensor

    def map_alone(self, name: str) -> torch.Tensor:
        """Like `read`, in a mapping of its own: what else is read of the file is not kept in memory with it."""
        path = self._directory / self._file_of[name]
        handle: Any = safe_open(path, framework="pt", device="cpu")
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor

    def sample(self, name: str) -> bytes:
        """A few rows of a tensor as bytes: enough to tell two checkpoints apart, cheap enough to do for all."""
        view = self._files[self._file_of[name]].get_slice(name)
        shape = self.tensors[name].shape
        if not shape:
            return self.read(name).view(1).view(torch.uint8).numpy().tobytes()
        rows = [view[begin:end] for begin, end in sampled_rows(shape)]
        return b"".join(row.contiguous().view(torch.uint8).numpy().tobytes() for row in rows)

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change in nanoseconds of every file: they tell apart what `sample` does not."""
        abouts = ((name, (self._directory / name).stat()) for name in sorted(self._files))
        return [(name, about.st_size, about.st_mtime_ns) for name, about in abouts]

    def _open(self, path: Path) -> None:
        try:
            handle: Any = safe_open(path, framework="pt", device="cpu")
            self._files[path.name] = handle
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                view = handle.get_slice(name)
                self._file_of[name] = path.name
                self.tensors[name] = TensorInfo(tuple(view.get_shape()), str(view.get_dtype()))
        except FileNotFoundError:
            raise UnsupportedModel(f"weights file {path.name} is missing") from None
        except (SafetensorError, OSError) as error:
            raise UnsupportedModel(f"weights file {path.name} cannot be read: {error}") from error


def sampled_rows(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The half-open runs of rows (of numbers, in one dimension) that stand for a tensor."""
    length, count = shape[0], 64 if len(shape) == 1 else 1
    return [(at, min(at + count, length)) for at in (0, length // 2)]


def _expected_files(directory: Path) -> dict[str, str]:
    """Tensor name to file name as the index says; empty for a single file. Raises ModelNotFound, UnsupportedModel."""
    if (directory / INDEX_FILE).is_file():
        try:
            weight_map = json.loads((directory / INDEX_FILE).read_bytes())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedModel(f"{INDEX_FILE} holds no weight_map") from error
        if not isinstance(weight_map, dict) or not weight_map:
            raise UnsupportedModel(f"{INDEX_FILE} holds no weight_map")
        for file_name in weight_map.values():
            if Path(file_name).name != file_name:
                raise UnsupportedModel(f"{INDEX_FILE} points outside the model directory: {file_name}")
        return dict(weight_map)
    if (directory / SINGLE_FILE).is_file():
        return {}
    others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in directory.glob(pattern))
    if others:
        raise UnsupportedModel(f"weights are only in {others[0]}; Baton loads {SINGLE_FILE} or {INDEX_FILE}")
    raise ModelNotFound(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this configuration must hold, and no more."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        for part, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}.{part}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}.{part}.bias"] = (rows,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        if config.qk_norm:
            for norm in ("self_attn.q_norm", "self_attn.k_norm"):
                shapes[f"{prefix}.{norm}.weight"] = (config.head_dim,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def matrix_numbers(config: ModelConfig) -> int:
    """Numbers in all matrices that hidden states are multiplied with: each layer's and the vocabulary head."""
    shapes = expected_tensors(config)
    if not config.tie_word_embeddings:
        del shapes[_EMBEDDING]
    return sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)


def check_tensors(config: ModelConfig, checkpoint: TensorSource) -> None:
    """Raise UnsupportedModel naming tensors that are missing, unexpected, of a wrong shape or dtype.

    Old checkpoints store the rotary frequencies, and tied ones may store the shared matrix twice; both are ignored.
    """
    expected = expected_tensors(config)
    scales = _scale_tensors(config, checkpoint)
    missing = [name for name in expected if name not in checkpoint.tensors]
    if missing:
        raise UnsupportedModel(f"the checkpoint lacks {_some(missing)}")
    for name, shape in expected.items():
        info = checkpoint.tensors[name]
        if info.shape != shape:
            raise UnsupportedModel(f"{name} has shape {list(info.shape)}, config.json asks for {list(shape)}")
        if info.dtype not in DTYPES and not (info.dtype == STORED_AS and len(shape) == 2 and name != _EMBEDDING):
            raise UnsupportedModel(f"{name} is stored as {info.dtype}; supported are {', '.join(DTYPES)}")
    unexpected = [
        name
        for name in checkpoint.tensors
        if name not in expected
        and name not in scales
        and not name.endswith("rotary_emb.inv_freq")
        and name != "lm_head.weight"
    ]
    if unexpected:
        raise UnsupportedModel(
            f"the checkpoint holds tensors that {config.architecture} has no use for: {_some(unexpected)}"
        )


def stored_dtype(checkpoint: TensorSource) -> torch.dtype:
    """The dtype that most parameters are stored in, FP8 matrices aside: what is computed in."""
    counts: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype in DTYPES:
            dtype = DTYPES[info.dtype]
            counts[dtype] = counts.get(dtype, 0) + math.prod(info.shape)
    return max(counts, key=lambda dtype: counts[dtype])


def _scale_tensors(config: ModelConfig, checkpoint: TensorSource) -> set[str]:
    """Names of the scales of FP8 matrices and pages."""
    matrices = [
        name.removesuffix(".weight")
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and name != _EMBEDDING
    ]
    return scale_tensors(checkpoint.tensors, matrices, config.num_layers, config.quantization)


def model_fingerprint(checkpoint: TensorSource, config: ModelConfig, quantization: str = "auto") -> str:
    """Hash of what the model computes: configuration, tensor names, shapes, dtypes, and a sample of their values.

    Scales are among the tensors. `quantization` other than `auto` counts too, since it changes what is computed.

    Equal for copies of a checkpoint at other paths or sharded otherwise; different for different weights. Hex, 32
    characters. Raises UnsupportedModel.
    """
    digest = hashlib.blake2b(repr(config).encode(), digest_size=16, person=b"baton-model")
    if quantization != "auto":
        digest.update(f"quantization {quantization}\n".encode())
    for name in sorted({*expected_tensors(config), *_scale_tensors(config, checkpoint)}):
        info = checkpoint.tensors.get(name)
        if info is None:
            raise UnsupportedModel(f"the checkpoint lacks {name}")
        digest.update(f"{name} {info.shape} {info.dtype}\n".encode())
        digest.update(checkpoint.sample(name))
    return digest.hexdigest()


def _some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _NAMED_IN_ERRORS
    return ", ".join(names[:_NAMED_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")
