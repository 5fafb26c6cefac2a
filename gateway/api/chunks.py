"""What all chunks of one streamed answer have in common, encoded once."""

from __future__ import annotations

import secrets
import string

from gateway.api.jobs import Job, Run
from gateway.api.sse import json_text, json_value

PLAIN_END = b'"logprobs":null,"finish_reason":null}'
"""How a choice ends that says nothing of its tokens."""

_PAD_BYTES = 32
_LETTERS = string.ascii_letters + string.digits


class ChunkFrame:
    """Puts choices into whole events.

    Args:
        run: whose usage so far goes into every chunk if the request asks for it.
        kind: `object` of the chunks.
    """

    def __init__(self, run: Run, job: Job, kind: bytes) -> None:
        self._run = run
        self._head = b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"system_fingerprint":%b,' % (
            json_text(job.completion_id),
            kind,
            job.created,
            json_text(job.model_name),
            json_text(job.fingerprint),
        )
        if job.service_tier is not None:
            self._head += b'"service_tier":%b,' % json_text(job.service_tier)
        self._counts_on = job.usage_in_chunks
        self._pads = job.obfuscates
        self._tail = b'],"usage":null}\n\n' if job.include_usage else b"]}\n\n"

    def event(self, choice: bytes, *, beside: bytes = b"") -> bytes:
        """A chunk with one choice, given as JSON. `beside`: further members of the chunk, each with its comma."""
        tail = self._tail
        if self._counts_on:
            tail = b'],"usage":%b}\n\n' % json_value(self._run.usage())
        if self._pads:
            tail = b'],"obfuscation":"%b"%b' % (_filler(len(choice)), tail[1:])
        return self._head + beside + b'"choices":[' + choice + tail

    def usage(self) -> bytes:
        """The chunk after all others that `include_usage` asks for."""
        return b'%b"choices":[],"usage":%b}\n\n' % (self._head, json_value(self._run.usage()))


def _filler(length: int) -> bytes:
    """Random letters that fill a length up, so that the size of an event tells little of the text in it."""
    return "".join(secrets.choice(_LETTERS) for _ in range(-length % _PAD_BYTES)).encode()
