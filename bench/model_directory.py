"""Model directories of published shapes without weights: all that `--load-format dummy` needs.

The tokenizer is the demo model's, filled up with made-up words to the size of the vocabulary, so that any server loads
the directory and every token that random weights choose has a text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[1] / "models" / "demo"

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

QWEN3_8B: dict[str, Any] = QWEN3_0_6B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_window_layers": 36,
    "tie_word_embeddings": False,
}


def bare_directory(directory: Path, shape: dict[str, Any]) -> Path:
    """The directory, with configuration and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape, indent=1))
    for name in ("tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, directory / name)
    (directory / "tokenizer.json").write_text(filled_tokenizer(shape["vocab_size"]))
    return directory


def filled_tokenizer(vocab_size: int) -> str:
    """The demo model's `tokenizer.json` with words that no merge makes for all ids up to `vocab_size`."""
    tokenizer = json.loads((DEMO / "tokenizer.json").read_bytes())
    vocab = tokenizer["model"]["vocab"]
    taken = {*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"])}
    vocab.update({f"Ġ#{number}": number for number in range(vocab_size) if number not in taken})
    return json.dumps(tokenizer)
