"""When a sequence ends, alike on prefill and decode workers."""

from __future__ import annotations

from engine.sequence import Sequence
from fleet.types import FinishReason


def finish_reason(sequence: Sequence, token_id: int, max_model_len: int) -> FinishReason | None:
    """Why `sequence` would end with `token_id` as its next output token, or None.

    `token_id` is not in `sequence.token_ids` yet; nothing is mutated. A stop id ends the sequence from output index
    `min_tokens` on and takes precedence over the length: it is delivered as the last token either way.

    Args:
        sequence: before the token.
        token_id: the token sampled.
        max_model_len: longest prompt plus output in tokens.
    """
    return _reason(sequence, token_id, sequence.num_output_tokens, max_model_len)


def ends_with_next(sequence: Sequence, max_model_len: int) -> bool:
    """Whether the next output token is the last one, whichever it is."""
    return _is_full(sequence, sequence.num_output_tokens + 1, max_model_len)


def finished_on_arrival(sequence: Sequence, max_model_len: int) -> FinishReason | None:
    """Why a sequence that came with output needs no further token, or None.

    So it happens when a worker dies between its last token and its last message, and the gateway replays.
    """
    num_output_tokens = sequence.num_output_tokens
    if num_output_tokens == 0:
        return None
    return _reason(sequence, sequence.token_ids[-1], num_output_tokens - 1, max_model_len)


def _reason(sequence: Sequence, token_id: int, index: int, max_model_len: int) -> FinishReason | None:
    params = sequence.params
    if token_id in params.stop_token_ids and index >= params.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if _is_full(sequence, index + 1, max_model_len) else None


def _is_full(sequence: Sequence, num_output_tokens: int, max_model_len: int) -> bool:
    return num_output_tokens >= sequence.params.max_tokens or sequence.prompt_len + num_output_tokens >= max_model_len
