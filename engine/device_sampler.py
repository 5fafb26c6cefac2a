"""Choosing a step's tokens on the device that computed its logits, in launches that a CUDA graph can hold.

It means what `engine.sampler` means, by the kernels of `engine.kernels.sampling` and `engine.kernels.penalties`; what
it cannot do it names beforehand (`why_host`). All parameters of a step go to the device before it; nothing comes back
but the ids.

Letters: B rows of a bucket, R rows of a step, V vocab_size, M entries of bias.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from engine.candidates import Cuts
from engine.device_copies import to_device
from engine.kernels.penalties import Bias, Penalties, edit_logits
from engine.kernels.sampling import choose_tokens
from engine.logit_edits import banned_ids, is_penalised
from engine.noise import as_int64
from engine.plan import Row
from engine.sequence import Sequence

MAX_BIAS = 4096
"""Entries of bias and bans in one step."""
MAX_PENALISED = 64
"""Rows with penalties in one step; each keeps V counts on the device."""
_NO_COUNTS = -1


@dataclass(frozen=True, slots=True)
class ChoiceInputs:
    """The parameters of one bucket, where a graph reads them.

    Attributes:
        integers: [3, B] int64: top_k, seeds, indexes of the output tokens.
        reals: [4, B] float32: temperatures, top_p, min_p, repetition penalties.
        doubles: [2, B] float64: presence and frequency penalties.
        places: [2 * B + 1] int32: rows of the counts, then where each row's bias begins.
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
        self._counts = TokenCounts(min(max_rows, MAX_PENALISED), vocab_size, device)

    def why_host(self, rows: Many[Row]) -> str | None:
        """What keeps this step's tokens from being chosen here, in a word, or None. Looks at parameters alone."""
        num_penalised = num_biased = 0
        for row in rows:
            params = row.sequence.params
            if params.grammar is not None:
                return "grammar"
            num_penalised += is_penalised(params)
            if params.logit_bias or params.min_tokens:
                entries = self._bias(row)
                num_biased += len(entries)
                if entries and not 0 <= min(entries) <= max(entries) < self._vocab_size:
                    return "logit_bias"
        if num_biased > MAX_BIAS:
            return "logit_bias"
        return "penalties" if num_penalised > self._counts.num_rows else None

    def blank(self, bucket: int) -> ChoiceInputs:
        """Greedy rows without edits."""

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        inputs = ChoiceInputs(
            integers=zeros(3, bucket, dtype=torch.int64),
            reals=zeros(4, bucket, dtype=torch.float32),
            doubles=zeros(2, bucket, dtype=torch.float64),
            places=zeros(2 * bucket + 1, dtype=torch.int32),
            bias_ids=zeros(MAX_BIAS, dtype=torch.int32),
            bias_values=zeros(MAX_BIAS, dtype=torch.float32),
        )
        self.fill(inputs, ())
        return inputs

    def fill(self, inputs: ChoiceInputs, rows: Many[Row]) -> None:
        """Write a step's parameters where the graph reads them. Mutates the counts of penalised rows.

        Requires: `why_host` has nothing against the rows.
        """
        bucket = inputs.integers.shape[1]
        integers = np.zeros((3, bucket), dtype=np.int64)
        reals = np.zeros((4, bucket), dtype=np.float32)
        doubles = np.zeros((2, bucket), dtype=np.float64)
        places = np.zeros(2 * bucket + 1, dtype=np.int32)
        reals[1] = reals[3] = 1.0
        places[:bucket] = _NO_COUNTS
        bias: dict[int, dict[int, float]] = {}
        for at, row in enumerate(rows):
            params = row.sequence.params
            integers[:, at] = params.top_k, as_int64(params.seed), _index(row)
            reals[:, at] = params.temperature, params.top_p, params.min_p, params.repetition_penalty
            doubles[:, at] = params.presence_penalty, params.frequency_penalty
            if entries := self._bias(row):
                bias[at] = entries
        penalised = [(at, row) for at, row in enumerate(rows) if is_penalised(row.sequence.params)]
        for at, place in self._counts.places(penalised):
            places[at] = place
        counts = np.array([len(bias.get(at, ())) for at in range(bucket)])
        places[bucket + 1 :] = np.cumsum(counts)
        to_device(integers, inputs.integers)
        to_device(reals, inputs.reals)
        to_device(doubles, inputs.doubles)
        to_device(places, inputs.places)
        if bias:
            ids = [token for entries in bias.values() for token in entries]
            values = [value for entries in bias.values() for value in entries.values()]
            to_device(np.array(ids, dtype=np.int32), inputs.bias_ids[: len(ids)])
            to_device(np.array(values, dtype=np.float32), inputs.bias_values[: len(ids)])

    def choose(self, inputs: ChoiceInputs, logits: torch.Tensor) -> torch.Tensor:
        """Edit and choose: `[B]` int64 ids, `NO_CHOICE` where there is none. Graph-safe.

        Args:
            inputs: filled.
            logits: [B, V] float32, mutated.
        """
        bucket = logits.shape[0]
        top_k, seeds, indexes = inputs.integers
        temperatures, top_p, min_p, repetition = inputs.reals
        count_rows, starts = inputs.places.tensor_split([bucket])
        penalties = Penalties(count_rows, self._counts.counts, repetition, *inputs.doubles)
        edit_logits(logits, Bias(starts, inputs.bias_ids, inputs.bias_values), penalties)
        chosen = choose_tokens(logits, temperatures, Cuts(top_k, top_p, min_p), seeds, indexes)
        self._counts.note(count_rows, chosen)
        return chosen

    def _bias(self, row: Row) -> dict[int, float]:
        """What is added to single logits: the request's bias, and bans of stop ids that would come too early."""
        params = row.sequence.params
        banned = banned_ids(params, _index(row), self._vocab_size)
        return dict(params.logit_bias or {}) | dict.fromkeys(banned, -np.inf)


class TokenCounts:
    """How often each token stands in the sequences that have penalties, on the device.

    A sequence's counts are made once, from its ids, and then grow by what is chosen without the host. A sequence whose
    tokens were meanwhile chosen elsewhere is counted anew.

    Attributes:
        counts: [Q, V] int32, see `engine.kernels.penalties.Penalties`.
        num_rows: Q.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.counts = torch.zeros((num_rows, vocab_size), dtype=torch.int32, device=device)
        self.num_rows = num_rows
        self._places: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()
        self._num_counted = [0] * num_rows

    def places(self, penalised: Many[tuple[int, Row]]) -> list[tuple[int, int]]:
        """Give each row its row of the counts, which will hold all ids before the choice, and the choice after it.

        Args:
            penalised: at most Q of a step's rows, with their indexes in it.

        Returns:
            The same indexes, with rows of the counts.
        """
        sequences = [row.sequence for _, row in penalised]
        taken = {self._places[one] for one in sequences if one in self._places}
        idle = set(range(self.num_rows)) - taken
        unowned = idle - set(self._places.values())
        found: list[tuple[int, int]] = []
        for at, row in penalised:
            place = self._places.get(row.sequence)
            if place is None:
                place = unowned.pop() if unowned else self._dispossess(idle)
                idle.discard(place)
                self._places[row.sequence] = place
                self._num_counted[place] = 0
            num_tokens = row.start + 1
            if self._num_counted[place] != num_tokens:
                self._count(place, row.sequence, num_tokens)
            self._num_counted[place] = num_tokens + 1
            found.append((at, place))
        return found

    def note(self, count_rows: torch.Tensor, chosen: torch.Tensor) -> None:
        """Count what was chosen, `[B]` int64, for the rows that have counts, `[B]` int32. Graph-safe."""
        counted = (count_rows >= 0) & (chosen >= 0)
        at = count_rows.clamp(min=0).to(torch.int64) * self.counts.shape[1] + chosen.clamp(min=0)
        self.counts.view(-1).scatter_add_(0, at, 2 * counted.to(torch.int32))

    def _dispossess(self, idle: set[int]) -> int:
        """Take an idle row from a sequence that is not in this step."""
        place = idle.pop()
        for owner, owned in list(self._places.items()):
            if owned == place:
                del self._places[owner]
        return place

    def _count(self, place: int, sequence: Sequence, num_tokens: int) -> None:
        ids = sequence.token_ids[:num_tokens]
        assert len(ids) == num_tokens, "a token unseen by the host was not chosen here"  # noqa: S101 (our own invariant)
        vocab_size = self.counts.shape[1]
        counts = 2 * np.bincount(ids[sequence.prompt_len :], minlength=vocab_size)
        counts[ids[: sequence.prompt_len]] += 1  # once for each id, however often it is there
        to_device(counts.astype(np.int32), self.counts[place])


def _index(row: Row) -> int:
    """The output index of the token that the row chooses; the sequence may not have the one before it yet."""
    return row.start + row.count - row.sequence.prompt_len
