"""A checkpoint that nobody stored: random weights for a configuration, made where they are used.

For measuring: speed does not depend on what the weights are, and a model of any published shape starts without its
files. The name is vLLM's (`load_format=dummy`).
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from engine.model_config import ModelConfig
from engine.noise import uniforms
from engine.weights import DTYPES, TensorInfo, expected_tensors, sampled_rows
from fleet.errors import SettingsError, UnsupportedModel

SEED = 1234
PERIOD = 1_048_583
"""A prime, so that no two rows of a matrix begin at the same place of the period."""
DEVIATION = 0.02  # as transformers initialises
_SUMMANDS = 4  # of uniform numbers, whose sum is close to normal
_CHUNK = 16  # periods per copy


class DummyCheckpoint:
    """Stands where `engine.weights.Checkpoint` does; use as a context manager.

    Norms are ones and biases zeros. Matrices repeat one sequence of `PERIOD` random numbers, each from a place that its
    name says, which fills a device as fast as it copies. The numbers come of whole-number arithmetic on the CPU, so
    they are the same to the last bit on any device, and workers that draw them hold the same model.

    Args:
        directory: with `config.json`.
        config: read from there.
        device: where `read` makes tensors.

    Attributes:
        tensors: as `engine.weights.Checkpoint` has them, of the dtype that the configuration names, else bfloat16.

    Raises:
        SettingsError: the configuration asks for quantized weights.
        UnsupportedModel: it names a dtype that no checkpoint is read in.
    """

    def __init__(self, directory: Path, config: ModelConfig, device: torch.device) -> None:
        if config.quantization is not None:
            raise SettingsError(
                f"BATON_LOAD_FORMAT = dummy draws unquantized weights, but {directory}/config.json has a "
                "quantization_config: take that out, and set BATON_QUANTIZATION instead"
            )
        named = config.checkpoint_dtype or "bfloat16"
        stored = {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}
        if named not in stored:
            raise UnsupportedModel(f"config.json has dtype {named!r}; supported are {', '.join(stored)}")
        self._dtype = DTYPES[stored[named]]
        self._device = device
        self._period = _period().to(self._dtype)
        self.tensors = {name: TensorInfo(shape, stored[named]) for name, shape in expected_tensors(config).items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # nothing is open

    def read(self, name: str) -> torch.Tensor:
        """The tensor in new memory of the device."""
        shape = self.tensors[name].shape
        if (same := _constant(name)) is not None:
            return torch.full(shape, same, dtype=self._dtype, device=self._device)
        flat = torch.empty(math.prod(shape), dtype=self._dtype, device=self._device)
        turned = self._period.roll(-_place(name)).to(self._device).repeat(min(_CHUNK, -(-len(flat) // PERIOD)))
        for at in range(0, len(flat), len(turned)):
            piece = flat[at : at + len(turned)]
            piece.copy_(turned[: len(piece)])
        return flat.view(shape)

    def map_alone(self, name: str) -> torch.Tensor:
        """Like `read`: there is no file to map."""
        return self.read(name)

    def sample(self, name: str) -> bytes:
        """As of a stored checkpoint with these tensors, without making the tensor."""
        shape = self.tensors[name].shape
        width = math.prod(shape[1:])
        same = _constant(name)
        rows = []
        for begin, end in sampled_rows(shape):
            if same is None:
                numbers = self._period[(_place(name) + torch.arange(begin * width, end * width)) % PERIOD]
            else:
                numbers = torch.full(((end - begin) * width,), same, dtype=self._dtype)
            rows.append(numbers.view(torch.uint8).numpy().tobytes())
        return b"".join(rows)

    def stamps(self) -> list[tuple[str, int, int]]:
        """No files; instead, what else the numbers depend on."""
        return [("dummy", SEED, PERIOD)]


def _period() -> torch.Tensor:
    """[PERIOD] float64: sums of few uniform numbers, of the standard deviation `DEVIATION`."""
    draws = torch.arange(_SUMMANDS * PERIOD)
    sums = uniforms(torch.full_like(draws, SEED), draws).view(_SUMMANDS, PERIOD).sum(0)  # exact: 48 bits each
    return (sums - _SUMMANDS / 2) * (DEVIATION * math.sqrt(12 / _SUMMANDS))


def _place(name: str) -> int:
    """Where in the period a tensor begins."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % PERIOD


def _constant(name: str) -> float | None:
    """What all numbers of a tensor are, where they are the same."""
    if name.endswith(".bias"):
        return 0.0
    return 1.0 if "norm" in name else None
