"""Puts token masks on logits, the tensor half of this package. Letters: R rows, V vocab_size, C constrained rows."""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch

from engine.grammar.matcher import MaskWords


def forbid(logits: torch.Tensor, rows: Many[int], masks: MaskWords) -> None:
    """Set the logits of tokens that a mask does not allow to minus infinity.

    Args:
        logits: [R, V] float32, mutated.
        rows: [C], which rows the masks are of.
        masks: [C, ceil(V / 32)] int32, bit `i % 32` of word `i // 32` for id `i`.
    """
    words = torch.from_numpy(masks).to(logits.device).unsqueeze(-1)  # [C, W, 1]
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    forbidden = ((words >> bits) & 1).eq_(0).flatten(1)[:, : logits.shape[1]].bool()
    if len(rows) == logits.shape[0]:
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = torch.tensor(rows, device=logits.device)
        logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)
