"""A Qwen3 checkpoint in bfloat16 as a GGUF file, weights copied as they are; needs `gguf` and numpy, no torch.

PYTHON bench/adapters/gguf_checkpoint.py MODEL_DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_file(directory: Path) -> Path:
    """`model.gguf` in the directory, written from `model.safetensors` if it is not there yet."""
    path = directory / "model.gguf"
    if not path.is_file():
        unfinished = directory / "unfinished.gguf"
        _write(directory, unfinished)
        unfinished.rename(path)
    return path


def _write(directory: Path, path: Path) -> None:
    config = json.loads((directory / "config.json").read_bytes())
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, directory, config)
    for name, values in _tensors(directory / "model.safetensors"):
        if values.ndim == 1:  # norms, which llama.cpp wants in float32
            widened = (values.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(_named(name), widened)
        else:
            writer.add_tensor(_named(name), values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _tensors(path: Path) -> list[tuple[str, Any]]:
    """Names and bfloat16 bits `uint16`, mapped from the file."""
    data = np.memmap(path, mode="r", dtype=np.uint8)
    begin = 8 + int(data[:8].view(np.uint64)[0])
    found = []
    for name, info in json.loads(bytes(data[8:begin])).items():
        if name == "__metadata__":
            continue
        if info["dtype"] != "BF16":
            raise SystemExit(f"{name} is stored as {info['dtype']}; only bfloat16 checkpoints are converted")
        low, high = info["data_offsets"]
        found.append((name, data[begin + low : begin + high].view(np.uint16).reshape(info["shape"])))
    return found


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict[str, Any]) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_bytes())
    by_id = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    by_id |= {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    size = config["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([by_id[number] for number in range(size)])
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([int(kinds[number in special]) for number in range(size)])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_eos_token_id(config["eos_token_id"])


if __name__ == "__main__":
    print(gguf_file(Path(sys.argv[1])))
