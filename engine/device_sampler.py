"""Choosing a step's tokens on the device that computed its logits, in launches that a CUDA graph can hold.

It says what `engine.sampler` says, by the kernels of `engine.kernels.sampling` and `engine.kernels.penalties`; what it
cannot do it names beforehand (`why_host`). All parameters of a step go to the device before it, masks of constrained
rows just before the choice; nothing comes back but the ids.

Letters: B rows of a bucket, R rows of a step, V vocab_size, M entries of bias, Q edited rows, W words of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine.candidates import Cuts
from engine.device_copies import to_device, to_device_beside
from engine.grammar.matcher import MaskWords
from engine.kernels.penalties import Bias, Penalties, edit_logits, note_chosen
from engine.kernels.row_logits import RowLogits
from engine.kernels.sampling import choose_tokens
from engine.logit_edits import banned_ids, is_penalised
from engine.noise import as_int64
from engine.plan import Row
from engine.token_counts import TokenCounts

MAX_BIAS = 4096
"""Entries of bias and bans in one step."""
MAX_EDITED = 64
"""Rows with bias, bans or penalties in one step; each keeps V logits and V counts on the device."""
_NOWHERE = -1


class ChoiceKind(NamedTuple):
    """Which launches a choice needs: those that edit logits, and those that search for top-k's and top-p's limits."""

    edits: bool
    searches: bool


ALL_KINDS = tuple(ChoiceKind(edits, searches) for edits in (False, True) for searches in (False, True))


@dataclass(frozen=True, slots=True)
class ChoiceInputs:
    """The parameters of one bucket, where a graph reads them.

    Attributes:
        integers: [3, B] int64: top_k, seeds, indexes of the output tokens.
        reals: [4, B] float32: temperatures, top_p, min_p, repetition penalties.
        doubles: [2, B] float64: presence and frequency penalties.
        places: [4 * B + 1] int32: rows of the counts, of the edited logits and of the masks, then where each row's
            bias begins.
        bias_ids, bias_values: [M] int32 and float32.
    """

    integers: torch.Tensor
    reals: torch.Tensor
    doubles: torch.Tensor
    places: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor


class DeviceSampler:
    """Fills in parameters and launches the choice. One per runner: it keeps the counts that penalties follow.

    Args:
        vocab_size: V.
        max_rows: largest B.
        device: of the logits.
    """

    def __init__(self, *, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        num_edited = min(max_rows, MAX_EDITED)
        self._counts = TokenCounts(num_edited, vocab_size, device)
        self._edited = torch.zeros((num_edited, vocab_size), device=device)
        self._masks = torch.zeros((max_rows, -(-vocab_size // 32)), dtype=torch.int32, device=device)

    def why_host(self, rows: Many[Row]) -> str | None:
        """What keeps this step's tokens from being chosen here, in a word, or None. Looks at parameters alone."""
        num_penalised = num_edited = num_biased = 0
        for row in rows:
            params = row.sequence.params
            entries: dict[int, float] = {}
            if params.logit_bias or params.min_tokens:
                entries = self._bias(row)
                num_biased += len(entries)
                if entries and not 0 <= min(entries) <= max(entries) < self._vocab_size:
                    return "logit_bias"
            penalised = is_penalised(params)
            num_penalised += penalised
            num_edited += penalised or bool(entries)
        if num_penalised > self._counts.num_rows:
            return "penalties"
        return "logit_bias" if num_biased > MAX_BIAS or num_edited > self._counts.num_rows else None

    def blank(self, bucket: int) -> ChoiceInputs:
        """Greedy rows without edits."""

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        inputs = ChoiceInputs(
            integers=zeros(3, bucket, dtype=torch.int64),
            reals=zeros(4, bucket, dtype=torch.float32),
            doubles=zeros(2, bucket, dtype=torch.float64),
            places=zeros(4 * bucket + 1, dtype=torch.int32),
            bias_ids=zeros(MAX_BIAS, dtype=torch.int32),
            bias_values=zeros(MAX_BIAS, dtype=torch.float32),
        )
        self.fill(inputs, ())
        return inputs

    def fill(self, inputs: ChoiceInputs, rows: Many[Row]) -> ChoiceKind:
        """Write a step's parameters where the graph reads them, all but masks. Mutates the counts of penalised rows.

        Requires: `why_host` has nothing against the rows.

        Returns:
            The least kind of choice that serves them.
        """
        bucket = inputs.integers.shape[1]
        integers = np.zeros((3, bucket), dtype=np.int64)
        reals = np.zeros((4, bucket), dtype=np.float32)
        doubles = np.zeros((2, bucket), dtype=np.float64)
        reals[1] = reals[3] = 1.0
        bias: dict[int, dict[int, float]] = {}
        masked: list[int] = []
        searches = False
        for at, row in enumerate(rows):
            params = row.sequence.params
            integers[:, at] = params.top_k, as_int64(params.seed), _index(row)
            reals[:, at] = params.temperature, params.top_p, params.min_p, params.repetition_penalty
            doubles[:, at] = params.presence_penalty, params.frequency_penalty
            searches |= params.temperature > 0 and (params.top_k > 0 or params.top_p < 1)
            if entries := self._bias(row):
                bias[at] = entries
            if params.grammar is not None:
                masked.append(at)
        penalised = [(at, row) for at, row in enumerate(rows) if is_penalised(row.sequence.params)]
        edited = sorted({*bias, *(at for at, _ in penalised)})
        places = np.zeros(4 * bucket + 1, dtype=np.int32)
        places[: 3 * bucket] = _NOWHERE
        for at, place in self._counts.places(penalised):
            places[at] = place
        places[bucket + np.array(edited, dtype=np.int64)] = range(len(edited))
        places[2 * bucket + np.array(masked, dtype=np.int64)] = range(len(masked))
        places[3 * bucket + 1 :] = np.cumsum([len(bias.get(at, ())) for at in range(bucket)])
        to_device(integers, inputs.integers)
        to_device(reals, inputs.reals)
        to_device(doubles, inputs.doubles)
        to_device(places, inputs.places)
        if bias:
            ids = [token for entries in bias.values() for token in entries]
            values = [value for entries in bias.values() for value in entries.values()]
            to_device(np.array(ids, dtype=np.int32), inputs.bias_ids[: len(ids)])
            to_device(np.array(values, dtype=np.float32), inputs.bias_values[: len(ids)])
        return ChoiceKind(edits=bool(edited), searches=searches)

    def put_masks(self, masks: MaskWords) -> None:
        """Write the masks of a step's constrained rows, in their order, before its choice.

        Requires: no choice that reads masks is queued or runs.
        """
        words = masks[:, : self._masks.shape[1]]  # of a tokenizer larger than the model, some lie beyond V
        to_device_beside(words, self._masks[: len(words)])

    def choose(self, inputs: ChoiceInputs, kind: ChoiceKind, raw: torch.Tensor, chosen: torch.Tensor) -> None:
        """Edit and choose. Graph-safe.

        Args:
            inputs: filled.
            kind: at least what `fill` returned.
            raw: [B, V] of the model's type; not mutated.
            chosen: [B] int64, takes the ids, and `NO_CHOICE` where there is none.
        """
        bucket = raw.shape[0]
        top_k, seeds, indexes = inputs.integers
        temperatures, top_p, min_p, repetition = inputs.reals
        count_rows, edited_rows, mask_rows, starts = inputs.places.tensor_split([bucket, 2 * bucket, 3 * bucket])
        logits = RowLogits(raw, edited_rows, self._edited, mask_rows, self._masks)
        penalties = Penalties(count_rows, self._counts.counts, repetition, *inputs.doubles)
        if kind.edits:
            edit_logits(logits, Bias(starts, inputs.bias_ids, inputs.bias_values), penalties)
        choose_tokens(
            logits,
            temperatures,
            Cuts(top_k, top_p, min_p),
            seeds,
            indexes,
            searches=kind.searches,
            chosen=chosen,
        )
        if kind.edits:
            note_chosen(penalties, chosen)

    def _bias(self, row: Row) -> dict[int, float]:
        """What is added to single logits: the request's bias, and bans of stop ids that would come too early."""
        params = row.sequence.params
        banned = banned_ids(params, _index(row), self._vocab_size)
        return dict(params.logit_bias or {}) | dict.fromkeys(banned, -np.inf)


def _index(row: Row) -> int:
    """The output index of the token that the row chooses; the sequence may not have the one before it yet."""
    return row.start + row.count - row.sequence.prompt_len
