"""The choice of a token per row of edited logits, and what it depends on besides them.

`choose_tokens` is the specification in plain torch; `engine.cpu.choice` and `engine.kernels.sampling` are the same as
one kernel each.

Letters: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import NamedTuple

import numpy as np
import torch

from engine.candidates import Cuts, draw
from engine.errors import NoKernels
from engine.noise import as_int64, uniforms
from engine.sequence import Sequence
from fleet.logs import get_logger

NO_CHOICE = -1
"""In place of a token id: the row's logits leave nothing to choose from."""

_log = get_logger("choice")
_TINIEST = torch.finfo(torch.float32).tiny


class ChoiceRows(NamedTuple):
    """What R rows choose by, on the host.

    Attributes:
        temperatures: [R] float32; 0 takes the likeliest, the lowest id among equals.
        top_k, top_p, min_p: [R] int64, float32, float32, as in `engine.candidates.Cuts`.
        seeds: [R] int64.
        indexes: [R] int64, of the output token; the noise is that of `engine.noise.uniforms(seeds, indexes)`.
    """

    temperatures: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    seeds: np.ndarray
    indexes: np.ndarray

    @classmethod
    def of(cls, sequences: Many[Sequence]) -> ChoiceRows:
        """For the next token of each sequence."""
        params = [sequence.params for sequence in sequences]
        temperatures, top_p, min_p = np.array(
            ([one.temperature for one in params], [one.top_p for one in params], [one.min_p for one in params]),
            dtype=np.float32,
        )
        counts = [sequence.num_output_tokens for sequence in sequences]
        top_k, seeds, indexes = np.array(
            ([one.top_k for one in params], [as_int64(one.seed) for one in params], counts), dtype=np.int64
        )
        return cls(temperatures, top_k, top_p, min_p, seeds, indexes)

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, Cuts, torch.Tensor, torch.Tensor]:
        """Temperatures, cuts, seeds and indexes where the logits are."""
        temperatures, top_k, top_p, min_p, seeds, indexes = (torch.from_numpy(each).to(device) for each in self)
        return temperatures, Cuts(top_k, top_p, min_p), seeds, indexes


Choose = Callable[[torch.Tensor, ChoiceRows], list[int]]
"""From logits `[R, V]` float32, which it may overwrite, and what the rows choose by: token ids or `NO_CHOICE`."""


def choice_for(device: torch.device) -> Choose:
    """The fastest way on a device; on a CPU it is compiled here, or loaded from the cache on disk."""
    if device.type == "cpu":
        try:
            from engine.cpu.choice import TokenChoice

            return TokenChoice()
        except (ImportError, OSError, NoKernels) as error:
            _log.warning("no compiled sampling on this machine, each token is slower", reason=str(error))
    return choose_in_torch


def choose_in_torch(logits: torch.Tensor, rows: ChoiceRows) -> list[int]:
    """A `Choose` for any device."""
    return choose_tokens(logits, *rows.tensors(logits.device)).tolist()


def choose_tokens(
    logits: torch.Tensor, temperatures: torch.Tensor, cuts: Cuts, seeds: torch.Tensor, indexes: torch.Tensor
) -> torch.Tensor:
    """Choose one token per row.

    Args:
        logits: [R, V] float32, edited; not mutated.
        temperatures: [R] float32.
        cuts: of the R rows.
        seeds: [R] int64.
        indexes: [R] int64.

    Returns:
        [R] int64 token ids; `NO_CHOICE` for a row whose best logit is not finite or that holds NaN.
    """
    best, chosen = logits.max(dim=-1)  # NaN wins a maximum, so this finds it too
    sound = torch.isfinite(best)
    chosen.masked_fill_(~sound, NO_CHOICE)
    rows = torch.nonzero((temperatures > 0) & sound).squeeze(1)
    if rows.numel():
        scores = logits[rows] - best[rows].unsqueeze(1)
        # The best score is 0, so no temperature however small can overflow it.
        scores /= temperatures[rows].clamp(min=_TINIEST).unsqueeze(1)
        chosen[rows] = draw(scores, cuts.rows(rows), uniforms(seeds[rows], indexes[rows]))
    return chosen
