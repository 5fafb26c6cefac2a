"""What a prompt tells besides its next token: log-probabilities of its own tokens, and a vector.

Both need the final hidden states of all tokens concerned, which no page holds; so a sequence that asks for them does
not reuse cached pages where they would be skipped (`Sequence.needs_every_token`).

Letters: C tokens of a row, S tokens of a slice of it, V vocab_size, E hidden_size.
"""

from __future__ import annotations

import torch

from engine.logprobs import token_logprob
from engine.plan import Pooled, Row, ScoredPrompt
from engine.transformer import Transformer
from fleet.types import Pooling, TokenLogprob

SLICE_BYTES = 32 * 2**20
"""Logits are made for so many tokens at once that they fit here, however long the prompt's chunk is."""


def needs_hidden_states(row: Row) -> bool:
    """Whether a row has more to give than a token."""
    return row.sequence.passport.pooling is not None or _num_scored(row) > 0


def score(transformer: Transformer, hidden: torch.Tensor, row: Row) -> ScoredPrompt | None:
    """Log-probabilities of the prompt tokens that follow the row's, under the model's raw distribution.

    Args:
        transformer: for its final norm and head.
        hidden: [C, E] of the row's tokens, before the final norm.
        row: token `start + i` predicts the token at `start + i + 1`.

    Returns:
        None if the sequence did not ask, or the row predicts output alone.
    """
    num_scored = _num_scored(row)
    num_top = row.sequence.params.prompt_logprobs
    if num_scored <= 0 or num_top is None:
        return None
    first = row.start + 1
    targets = torch.tensor(row.sequence.token_ids[first : first + num_scored], device=hidden.device)
    per_slice = max(1, SLICE_BYTES // (4 * transformer.config.vocab_size))
    logprobs = []
    for begin in range(0, num_scored, per_slice):
        end = min(begin + per_slice, num_scored)
        logits = transformer.logits(hidden[begin:end])  # [S, V] float32
        logprobs += _score_slice(logits, targets[begin:end], num_top)
    return ScoredPrompt(first, logprobs)


def pool(transformer: Transformer, hidden: torch.Tensor, row: Row) -> Pooled | None:
    """The row's share of its prompt's vector, from the hidden states after the final norm.

    Args:
        transformer: for its final norm.
        hidden: [C, E] of the row's tokens, before the final norm.
        row: of a sequence that is to become a vector.

    Returns:
        None for an early chunk where the last token alone counts.
    """
    if row.sequence.passport.pooling is Pooling.LAST:
        if row.start + row.count < len(row.sequence.token_ids):
            return None
        hidden = hidden[-1:]
    total = transformer.normed(hidden).to(torch.float32).sum(dim=0)
    return Pooled(total.cpu().numpy().tobytes())


def _num_scored(row: Row) -> int:
    """How many tokens of the prompt the row predicts, as far as they are wanted."""
    if row.sequence.params.prompt_logprobs is None:
        return 0
    return min(row.start + row.count, row.sequence.prompt_len - 1) - row.start


def _score_slice(logits: torch.Tensor, targets: torch.Tensor, num_top: int) -> list[TokenLogprob]:
    totals = logits.logsumexp(dim=-1)  # [S]
    chosen = logits.gather(1, targets.unsqueeze(1))  # [S, 1]
    ranks = (logits > chosen).sum(dim=-1) + 1
    values, ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    top_values = (values - totals.unsqueeze(1)).tolist()
    return [
        token_logprob(logprob, zip(top_ids, tops, strict=True), num_top=num_top, rank=rank)
        for logprob, rank, top_ids, tops in zip(
            (chosen.squeeze(1) - totals).tolist(), ranks.tolist(), ids.tolist(), top_values, strict=True
        )
    ]
