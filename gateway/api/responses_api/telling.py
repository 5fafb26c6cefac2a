"""From an output's pieces to the events of a response."""

from __future__ import annotations

from gateway.api.jobs import Job, Output
from gateway.api.logprobs import TokenSpeller
from gateway.api.responses_api.narrator import Narrator
from gateway.api.responses_api.objects import ResponseObject
from gateway.text.assembler import Piece


def narrator_of(response: ResponseObject, job: Job) -> Narrator:
    """A narrator at the very beginning."""
    spell = TokenSpeller(job.model.card) if job.with_logprobs else None
    return Narrator(response, spell, num_top_logprobs=job.num_top_logprobs)


def tell(narrator: Narrator, _output: Output, piece: Piece) -> bytes:
    """The events of a piece."""
    return narrator.text(piece)
