"""What a dense model reads and computes, counted from its configuration: the limits of figures are made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """Bytes and operations of a dense model, from its configuration; `weights` with the vocabulary head's, `head`."""

    weights: int
    head: int
    layers: int
    kv_heads: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        """Read `config.json`; `weights` are those that a token's computation reads."""
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        layer = hidden * dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
        layers = config["num_hidden_layers"]
        head = config["vocab_size"] * hidden
        return cls(layers * layer + head, head, layers, kv_heads, heads, dim)

    def step_bytes(self, streams: int, context: float, *, fp8: bool = False) -> float:
        """Bytes that one decode step reads, in bfloat16 or with FP8 matrices and pages; the head stays bfloat16."""
        keys_values = streams * context * self.layers * 2 * self.kv_heads * self.head_dim
        return (1.0 if fp8 else 2.0) * (self.weights - self.head + keys_values) + 2.0 * self.head

    def prompt_flops(self, tokens: int) -> float:
        """Operations of a prompt: products, and causal attention."""
        return 2.0 * self.weights * tokens + 2.0 * self.layers * self.heads * self.head_dim * tokens * tokens
