"""The error tree of the engine.

BatonError
└── EngineError
    ├── OutOfPages              the pool cannot give that many pages now
    ├── SequenceTooLong         the sequence could never run here, however empty the pool
    ├── AlreadyFinished         the passport that arrived needs no further token
    ├── DuplicateSequence       this request is here already under the same epoch
    ├── ReservationMismatch     what arrived does not fit the pages that were reserved for it
    ├── VocabularyUnusable      grammars cannot be enforced with this model's tokenizer
    ├── GrammarRejected         a grammar does not compile, or an output does not follow it
    ├── WeightFileRefused       a file of packed weights is torn, foreign, or of another checkpoint
    ├── NoKernels               compiled CPU kernels cannot be had here
    ├── StepOutOfOrder          schedule and commit did not alternate
    └── BrokenInvariant         our own mistake: the page accounts or a plan contradict themselves

`ModelNotFound` and `UnsupportedModel` belong to the shared floor: see `fleet.errors`.
"""

from fleet.errors import BatonError
from fleet.types import FinishReason


class EngineError(BatonError):
    """Root of the errors that the engine raises on purpose."""


class OutOfPages(EngineError):
    """The pool cannot give that many pages now. Nothing was taken."""

    def __init__(self, *, needed: int, available: int) -> None:
        super().__init__(f"{needed} pages needed, {available} available")
        self.needed = needed
        self.available = available


class SequenceTooLong(EngineError):
    """The sequence could never run here, however empty the pool. The message says which bound it breaks."""


class AlreadyFinished(EngineError):
    """The passport that arrived needs no further token: its last one ended it. Nothing was taken."""

    def __init__(self, reason: FinishReason) -> None:
        super().__init__(f"the sequence is complete on arrival: {reason}")
        self.reason = reason


class DuplicateSequence(EngineError):
    """This request is here already under the same epoch."""

    def __init__(self, *, request_id: str, epoch: int) -> None:
        super().__init__(f"request {request_id} is here already in epoch {epoch}")
        self.request_id = request_id
        self.epoch = epoch


class ReservationMismatch(EngineError):
    """A passport or token count does not fit the reservation. The reservation stays open."""


class VocabularyUnusable(EngineError):
    """Grammars cannot be enforced with this model's tokenizer. The message says why."""


class GrammarRejected(EngineError):
    """A grammar does not compile, outgrows its limits, or is not followed by an output. The message says why."""


class StepOutOfOrder(EngineError):
    """`schedule` was called with a plan in flight, or `commit` with another plan than that one."""


class BrokenInvariant(EngineError):
    """Our own mistake: a page was released twice, an output is not as long as its plan, and the like."""


class WeightFileRefused(EngineError):
    """A file of packed weights is torn, foreign, or of another checkpoint; it is not used."""


class NoKernels(EngineError):
    """Compiled CPU kernels cannot be had here; plain torch computes instead."""
