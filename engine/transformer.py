"""The forward pass of a dense decoder: token ids in, hidden states and logits out, keys and values into pages.

Letters: T tokens of the step, R rows that sample, V vocab_size, E hidden_size, Hq query heads, Hkv key/value heads,
D head_dim, I intermediate_size, N pages, P page_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.backend import Backend, HeadNorms, Linear
from engine.inputs import StepInputs
from engine.model_config import ModelConfig
from engine.rope import Rotary


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's parameters, matrices already taken over by the backend.

    Attributes:
        qkv: [T, E] -> [T, (Hq + 2 * Hkv) * D], queries first.
        output: [T, Hq * D] -> [T, E].
        gate_up: [T, E] -> [T, 2 * I], gates first.
        down: [T, I] -> [T, E].
        attention_norm, mlp_norm: [E].
        head_norms: of queries and keys, or None.
        window: how many latest tokens a query sees, None for all.
    """

    qkv: Linear
    output: Linear
    gate_up: Linear
    down: Linear
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    head_norms: HeadNorms | None
    window: int | None


@dataclass(frozen=True, slots=True)
class Transformer:
    """A whole model. Holds no state between calls: all context is in the pages.

    Attributes:
        embedding: [V, E].
        final_norm: [E].
        lm_head: [R, E] -> [R, V].
    """

    config: ModelConfig
    backend: Backend
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    lm_head: Linear
    rotary: Rotary

    def hidden_states(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Run all layers over the step's tokens.

        Args:
            inputs: of T tokens.
            pool: [N, layers, 2, Hkv, P, D]; mutated in the slots that `inputs` names.

        Returns:
            [T, E] before the final norm.
        """
        return self._run(inputs, pool, only_sampled=False)

    def sampled_states(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Like `hidden_states`, of the tokens that are sampled at alone, `[R, E]`.

        What the last layer makes of other tokens nobody reads, but for their keys and values: it computes no more of
        them, which saves most of a layer of every prompt.
        """
        return self._run(inputs, pool, only_sampled=True)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and vocabulary head, `[R, E]` -> `[R, V]` float32."""
        return self.raw_logits(hidden).to(torch.float32)

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same numbers as `logits` in the model's type, for what widens them as it reads."""
        return self.lm_head(self.normed(hidden))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm, `[R, E]` -> `[R, E]`: what the vocabulary head reads, and embeddings are made of."""
        return self.backend.rms_norm(hidden, self.final_norm, self.config.rms_norm_eps)

    def _run(self, inputs: StepInputs, pool: torch.Tensor, *, only_sampled: bool) -> torch.Tensor:
        hidden = functional.embedding(inputs.token_ids, self.embedding)
        angles = self.rotary.cos_sin(inputs.positions, inputs.rope_lengths, hidden.dtype)
        rotation = self.backend.plan_rotation(angles, inputs)
        backend, eps, sampled = self.backend, self.config.rms_norm_eps, inputs.sampled_tokens
        normed = backend.rms_norm(hidden, self.layers[0].attention_norm, eps)
        for index, layer in enumerate(self.layers):
            backend.begin_layer()
            layer_pool, attention = pool[:, index], inputs.attention[layer.window]
            qkv = layer.qkv(normed)
            queries, keys_values = backend.rotate_and_write(qkv, layer.head_norms, rotation, layer_pool, inputs)
            is_last = index + 1 == len(self.layers)
            if only_sampled and is_last and len(sampled) < len(hidden):
                hidden, queries, attention = hidden[sampled], queries[sampled], inputs.sampled_attention
                if not len(sampled):
                    break
            attended = layer.output(backend.attention(queries, keys_values, layer_pool, attention))
            normed, hidden = backend.add_rms_norm(attended, hidden, layer.mlp_norm, eps)
            gated = layer.down(backend.gated_silu(layer.gate_up(normed)))
            if is_last:
                hidden = hidden + gated
            else:
                normed, hidden = backend.add_rms_norm(gated, hidden, self.layers[index + 1].attention_norm, eps)
        return hidden
