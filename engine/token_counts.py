"""What penalties follow: how often each token stands in a sequence, kept on the device. V is vocab_size, Q rows."""

from __future__ import annotations

from collections.abc import Sequence as Many
from weakref import WeakKeyDictionary

import numpy as np
import torch

from engine.device_copies import to_device
from engine.plan import Row
from engine.sequence import Sequence


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
