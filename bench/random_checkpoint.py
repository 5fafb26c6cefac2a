"""A checkpoint of a published shape with random weights: speed does not depend on what the weights are.

    python bench/random_checkpoint.py [DIRECTORY]

The weights are those that `--load-format dummy` makes, stored for servers that want a file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from model_directory import QWEN3_0_6B, bare_directory
from safetensors.torch import save_file

from engine.dummy_checkpoint import DummyCheckpoint
from engine.model_config import ModelConfig
from engine.weights import SINGLE_FILE


def default_directory() -> Path:
    """Outside the repository; kept between runs, since a gigabyte takes a while to write."""
    return Path(tempfile.gettempdir()) / "baton-bench" / "qwen3-0.6b-random"


def random_checkpoint(directory: Path | None = None, shape: dict[str, Any] = QWEN3_0_6B) -> Path:
    """The directory; the weights are written if they are not there yet."""
    directory = bare_directory(directory or default_directory(), shape)
    if (directory / SINGLE_FILE).is_file():
        return directory
    drawn = DummyCheckpoint(directory, ModelConfig.from_directory(directory), torch.device("cpu"))
    unfinished = directory / "unfinished.safetensors"
    save_file({name: drawn.read(name) for name in drawn.tensors}, unfinished, metadata={"format": "pt"})
    unfinished.rename(directory / SINGLE_FILE)
    return directory


if __name__ == "__main__":
    print(random_checkpoint(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
