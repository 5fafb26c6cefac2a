"""What a scheduler asks of a runner, and what it gets back: the only words between integers and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from engine.sequence import Sequence
from fleet.types import TokenLogprob


@dataclass(frozen=True, slots=True)
class Row:
    """Compute `token_ids[start : start + count]` of one sequence; sample after the last one if `sample`.

    The sequence's page table covers `start + count` tokens when the plan is made.

    Attributes:
        follows: where the row's one token is not known yet: the row of the plan before that chooses it. None: the
            sequence has all ids already.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    follows: int | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the model: rows of different sequences, in batch order."""

    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model in this step."""
        return sum(row.count for row in self.rows)


class Sampled(msgspec.Struct, frozen=True, gc=False):
    """A chosen token; `logprob` only if the sequence asked for it. `ends`: its grammar allows nothing after it."""

    token_id: int
    logprob: TokenLogprob | None = None
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Complete:
    """This row's output matches its grammar as it is and nothing longer does, so no token was chosen.

    So it happens when a worker dies between the token that ended an output and its last message.
    """


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a row adds to its prompt's vector: the sum of its tokens' final hidden states, or the last token's.

    `values` are float32 in this machine's order, as many as the model's hidden size.
    """

    values: bytes


@dataclass(frozen=True, slots=True)
class ScoredPrompt:
    """Log-probabilities of the prompt tokens from `position` on that a row predicted."""

    position: int
    logprobs: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Failed:
    """This row alone could not be computed or sampled; the message says why in one sentence for the client."""

    message: str


Result = Sampled | Complete | Pooled | Failed


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What the rows of a plan gave.

    Attributes:
        sampled: as long as the plan's rows; None where a row has nothing to give, `Failed` where it must end with an
            error, `Complete` where its output had ended already, `Pooled` where its sequence is to become a vector.
        scored: by index of the row, where a sequence asked for log-probabilities of its prompt.
    """

    sampled: tuple[Result | None, ...]
    scored: Mapping[int, ScoredPrompt] = field(default_factory=dict)


class Pending(Protocol):
    """A step that a device computes."""

    def wait(self) -> StepOutput:
        """Its results. Blocking; called once, on the step thread, in the order of the launches."""


class Runner(Protocol):
    """Turns a plan into sampled tokens, writing keys and values into the pages that the plan's sequences name."""

    def feeds_next(self, plan: StepPlan) -> bool:
        """Whether this plan's tokens are chosen on a device, where rows of the next plan may follow them unseen.

        Cheap; called while no launch runs. False for a device that is this processor: nothing could overlap.
        """

    def launch(self, plan: StepPlan) -> StepOutput | Pending:
        """Start one step, or compute it. Called on the step thread only. Does not mutate sequences.

        All that the rows say is read by the return, but for what their grammars need: the ids before theirs, which are
        read at the next launch or at `Pending.wait`, when the plan before is booked. Rows follow only a plan that feeds
        them, in one that does so too.
        """
