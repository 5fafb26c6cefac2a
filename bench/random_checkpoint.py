"""A model directory of a published shape with random weights: speed does not depend on what the weights are.

    python bench/random_checkpoint.py [DIRECTORY]

The tokenizer is the demo model's, filled up with made-up words to the size of the vocabulary, so that any server loads
the directory and every token that random weights choose has a text. The weights are those that `--load-format dummy`
makes, stored for servers that want a file.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save_file

from engine.dummy_checkpoint import DummyCheckpoint
from engine.model_config import ModelConfig
from engine.weights import SINGLE_FILE

DEMO = Path(__file__).parents[1] / "models" / "demo"

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",  # as transformers 4 and llama.cpp's converter spell it
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""`config.json` of Qwen/Qwen3-0.6B, with the demo tokenizer's special ids."""


def default_directory() -> Path:
    """Outside the repository; kept between runs, since a gigabyte takes a while to draw."""
    return Path(tempfile.gettempdir()) / "baton-bench" / "qwen3-0.6b-random"


def bare_directory(directory: Path, shape: dict[str, Any]) -> Path:
    """The directory with configuration and tokenizer and no weights: enough for `--load-format dummy`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape, indent=1))
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, directory / name)
    (directory / "tokenizer.json").write_text(filled_tokenizer(shape["vocab_size"]))
    return directory


def random_checkpoint(directory: Path | None = None, shape: dict[str, Any] = QWEN3_0_6B) -> Path:
    """The directory with weights, which are drawn if they are not there yet."""
    directory = bare_directory(directory or default_directory(), shape)
    if (directory / SINGLE_FILE).is_file():
        return directory
    drawn = DummyCheckpoint(directory, ModelConfig.from_directory(directory), torch.device("cpu"))
    unfinished = directory / "unfinished.safetensors"
    save_file({name: drawn.read(name) for name in drawn.tensors}, unfinished, metadata={"format": "pt"})
    unfinished.rename(directory / SINGLE_FILE)
    return directory


def filled_tokenizer(vocab_size: int) -> str:
    """The demo model's `tokenizer.json` with words that no merge makes for all ids up to `vocab_size`."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_bytes())
    vocab = tokenizer["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocab.update({f"Ġ#{number}": number for number in range(vocab_size) if number not in taken})
    return json.dumps(tokenizer)


if __name__ == "__main__":
    print(random_checkpoint(Path(sys.argv[1]) if len(sys.argv) > 1 else None))
