"""From an output's pieces to the events of a response."""

from __future__ import annotations

from gateway.api.jobs import Job, Output
from gateway.api.logprobs import TokenSpeller
from gateway.api.responses_api.narrator import Narrator
from gateway.api.responses_api.objects import ResponseObject
from gateway.text.assembler import Piece
from gateway.text.message_events import CallDelta, CallEnd, CallStart, ContentDelta, ReasoningDelta


def narrator_of(response: ResponseObject, job: Job) -> Narrator:
    """A narrator at the very beginning."""
    spell = TokenSpeller(job.model.card) if job.with_logprobs else None
    return Narrator(response, spell, num_top_logprobs=job.num_top_logprobs)


def tell(narrator: Narrator, output: Output, piece: Piece) -> bytes:
    """The events of a piece. Log-probabilities of its tokens go with the text that it adds."""
    events = b""
    tokens = piece.tokens
    for event in output.read(piece):
        match event:
            case ContentDelta(text):
                events += narrator.text(text, tokens)
                tokens = ()
            case ReasoningDelta(text):
                events += narrator.reasoning(text)
            case CallStart(name=name):
                events += narrator.call(name)
            case CallDelta(arguments=arguments):
                events += narrator.arguments(arguments)
            case CallEnd():
                events += narrator.call_done()
    return events + narrator.end_tokens(tokens)
