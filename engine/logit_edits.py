"""Edits of single rows of logits before the choice: bias, ban of stop ids, penalties.

Each touches only the ids it names, so a row without edits costs nothing and one with edits costs by its length.
V is vocab_size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Many

import torch

from fleet.types import SamplingParams


def needs_edits(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether `edit_row` would change anything."""
    return bool(
        params.logit_bias or is_penalised(params) or (params.stop_token_ids and num_output_tokens < params.min_tokens)
    )


def is_penalised(params: SamplingParams) -> bool:
    """Whether what a sequence holds already changes its scores."""
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)


def banned_ids(params: SamplingParams, num_output_tokens: int, vocab_size: int) -> list[int]:
    """Stop ids that may not be chosen yet; those outside the vocabulary cannot be anyway."""
    if num_output_tokens >= params.min_tokens:
        return []
    return [token for token in params.stop_token_ids if token < vocab_size]


def edit_row(logits: torch.Tensor, params: SamplingParams, token_ids: Many[int], prompt_len: int) -> None:
    """Apply logit bias, ban of stop ids before `min_tokens`, repetition, presence and frequency penalty, in this order.

    The repetition penalty (CTRL, arXiv 1909.05858, section 4.1) is over prompt and output: a positive logit is
    divided by it, a negative one multiplied. Presence and frequency penalties are over the output only.

    Args:
        logits: [V] float32, mutated.
        params: how; ids outside the vocabulary among stop ids are ignored, since they cannot be sampled.
        token_ids: prompt, then output.
        prompt_len: how many are the prompt.

    Raises:
        ValueError: `logit_bias` names an id outside the vocabulary.
    """
    vocab_size = logits.shape[0]
    if params.logit_bias:
        worst = max(params.logit_bias, key=lambda token: -token if token < 0 else token)
        if not 0 <= worst < vocab_size:
            raise ValueError(f"logit_bias names token id {worst}, outside the vocabulary of {vocab_size}")
        logits[_ids(params.logit_bias, logits)] += _values(params.logit_bias.values(), logits)
    if banned := banned_ids(params, len(token_ids) - prompt_len, vocab_size):
        logits[_ids(banned, logits)] = -torch.inf
    if params.repetition_penalty != 1.0:
        seen = _ids(set(token_ids), logits)
        chosen = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    if params.presence_penalty or params.frequency_penalty:
        counts = Counter(token_ids[prompt_len:])
        if counts:
            penalties = (params.presence_penalty + params.frequency_penalty * count for count in counts.values())
            logits[_ids(counts, logits)] -= _values(penalties, logits)


def _ids(tokens: Many[int] | set[int] | dict[int, float] | Counter[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)


def _values(values: object, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(list(values), dtype=like.dtype, device=like.device)  # type: ignore[call-overload]
