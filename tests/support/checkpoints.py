"""Random-weight Hugging Face directories, written by `transformers` itself, with a small tokenizer of their own.

    directory = make_checkpoint(tmp_path / "m", "qwen3")

makes a real model directory: `config.json`, `model.safetensors` (or shards), `generation_config.json`,
`tokenizer.json`, `tokenizer_config.json` with a chat template. Weights are drawn wide, so that greedy decoding
wanders instead of repeating one id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 320  # 256 bytes, 4 special tokens, a few merges
PAD, BOS, EOS, TURN = "<|pad|>", "<|begin|>", "<|end|>", "<|turn|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the dog chases the fox through the old garden",
    "once upon a time there was a small server that never lost a token even when its worker went away",
    "a relay runner hands the baton to the next runner without stopping and the race goes on",
    "system user assistant hello world how are you today please count from one to ten",
)

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_THETA = {"rope_theta": 10000.0}
_YARN = {**_THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

_FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

# name: (family, what differs from _SMALL)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_theta": 500000.0,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": {**_THETA, "rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": (
        "llama",
        {"rope_parameters": {**_THETA, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 48},
    ),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama-yarn-attention-factor": (
        "llama",
        {"rope_parameters": {**_YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 24, "num_attention_heads": 8, "num_key_value_heads": 2}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 13}),
    "qwen2": ("qwen2", {}),
    "qwen2.5": (
        "qwen2",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}, "num_attention_heads": 8},
    ),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3-window": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3-biases": ("qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
}


def make_checkpoint(
    directory: Path, variant: str = "llama", *, seed: int = 0, max_shard_size: str = "1GB", **changes: Any
) -> Path:
    """Write a model directory and return it.

    Args:
        directory: made if missing.
        variant: a key of `VARIANTS`.
        seed: of the weights.
        max_shard_size: e.g. `"100KB"` for several shards with an index.
        changes: to the configuration, over the variant's; `dtype` is the stored one.
    """
    family, differences = VARIANTS[variant]
    config_class, model_class = _FAMILIES[family]
    dtype = changes.pop("dtype", torch.float32)
    config = config_class(**{**_SMALL, **differences, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        # Biases and norms start as zeros and ones, which would hide a forgotten one.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.data.uniform_(0.6, 1.4)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCAB_SIZE` ids that can spell any text, with a chat template. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, additional_special_tokens=[TURN]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def spell_as_transformers_4(directory: Path) -> None:
    """Rewrite `config.json` as older releases wrote it: `torch_dtype`, top-level `rope_theta`, `rope_scaling`."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    path.write_text(json.dumps(config))
