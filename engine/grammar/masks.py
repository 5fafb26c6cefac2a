"""Puts token masks on logits, the tensor half of this package. Letters: R rows, V vocab_size, C constrained rows."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch

from engine.grammar.matcher import MaskWords


def forbid(logits: torch.Tensor, rows: Many[int], masks: MaskWords) -> None:
    """Set the logits of tokens that a mask does not allow to minus infinity.

    Args:
        logits: [R, V] float32, mutated.
        rows: [C], which rows the masks are of.
        masks: [C, ceil(V / 32)] int32, bit `i % 32` of word `i // 32` for id `i`.
    """
    forbidden = _forbidden(masks, logits.shape[1], logits.device)
    if len(rows) == logits.shape[0]:
        logits.masked_fill_(forbidden, -torch.inf)
    else:
        index = torch.tensor(rows, device=logits.device)
        logits[index] = logits[index].masked_fill_(forbidden, -torch.inf)


def _forbidden(masks: MaskWords, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[C, V] bool. Unpacked where the logits are: a device gets an eighth of a byte per token sent, not a whole one."""
    packed = ~masks.view(np.uint8)  # [C, 4 W], lowest bit first on every machine that Baton runs on
    if device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little")).view(torch.bool)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    unpacked = (torch.from_numpy(packed).to(device).unsqueeze(-1) >> bits) & 1  # [C, 4 W, 8]
    return unpacked.flatten(1)[:, :vocab_size].bool()
