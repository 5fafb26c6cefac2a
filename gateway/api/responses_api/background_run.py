"""One background response being computed, whatever happens to workers, Redis or the gateway before this one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
import structlog
from litestar.types import HTTPReceiveMessage

from fleet.keys import ApiKey
from fleet.types import FinishReason
from gateway.api.client_watch import ClientGone
from gateway.api.context import ApiContext
from gateway.api.jobs import Job, Output
from gateway.api.replies import as_api_error
from gateway.api.requests import ChatCompletionRequest
from gateway.api.responses_api.event_log import EventLog, Lease, Unit
from gateway.api.responses_api.narrator import Narrator
from gateway.api.responses_api.objects import ResponseObject
from gateway.api.responses_api.prepare import job_of
from gateway.api.responses_api.recorded import RecordedRun
from gateway.api.responses_api.telling import narrator_of, tell
from gateway.errors import ApiError, PipelineError, RateLimited, Unavailable, UnknownModel
from gateway.pipeline import Tokens
from gateway.text.assembler import Piece

PATIENCE_S = 600.0
"""How long a response waits in all for room, for workers, for its model to be known, before it fails."""
RETRY_S = 1.0

_JSON = msgspec.json


class BackgroundRun:
    """Computes one response and writes its events to the log.

    An attempt that fails for want of workers or room is followed by another, which says again what was said, in the
    same portions, and so tells the same events; those that are written already are not written again. A gateway that
    takes over does the same with the tokens that the one before wrote.

    Args:
        response: as created. Mutates nothing of it.
        chat: makes the job.
        job: of the first attempt; None: made from `chat`.
        num_events, tokens: what is written already.
        fails: an error that ends it without an attempt.
    """

    def __init__(
        self,
        api: ApiContext,
        log: EventLog,
        lease: Lease,
        *,
        response: ResponseObject,
        chat: ChatCompletionRequest,
        key: ApiKey | None,
        job: Job | None = None,
        num_events: int = 0,
        tokens: Sequence[Tokens] = (),
        fails: ApiError | None = None,
    ) -> None:
        self._api = api
        self._log = log
        self.lease = lease
        self._created = _JSON.encode(msgspec.structs.replace(response, status="queued"))
        self._chat = chat
        self._key = key
        self._job = job
        self._num_events = num_events
        self._tokens = list(tokens)
        self._fails = fails
        self._num_attempts = 0
        self._narrator: Narrator | None = None

    async def serve(self) -> None:
        """Run to an end that is written, or until the run is not ours any more."""
        try:
            await self._serve()
        except ClientGone:  # cancelled, deleted or taken over
            return
        except ApiError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the response must end
            structlog.get_logger("gateway.api").exception("background response failed", id=self.lease.response_id)
            self._fail(as_api_error(error))
        await self.lease.written.wait()

    async def _serve(self) -> None:
        """Attempt until one succeeds or patience ends. Raises: ApiError; ClientGone."""
        if self._fails is not None:
            raise self._fails
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                await self._attempt()
            except (PipelineError, RateLimited, Unavailable, UnknownModel) as error:
                if time.monotonic() > deadline_s:
                    raise as_api_error(error) from error
                self._job = None  # the model, or what it can hold, may have changed
                await self._pause(RETRY_S)
            else:
                return

    async def _pause(self, seconds: float) -> None:
        """Raises: ClientGone if the run is lost meanwhile."""
        try:
            await asyncio.wait_for(self.lease.lost.wait(), seconds)
        except TimeoutError:
            return
        raise ClientGone

    async def _attempt(self) -> None:
        job = self._job or await job_of(self._api, self._chat, None)
        self._num_attempts += 1
        # Workers may still know the request of an earlier attempt
        name = f"{self.lease.response_id}-{self.lease.owner[:8]}.{self._num_attempts}"
        job = msgspec.structs.replace(job, completion_id=name, key=self._key)
        narrator = self._narrator = narrator_of(_JSON.decode(self._created, type=ResponseObject), job)
        narrator.created()
        async with RecordedRun(self._api, job, list(self._tokens)) as run:
            self._write(narrator.started(), run, changes=True)
            reason = FinishReason.STOP

            async def write(output: Output, piece: Piece) -> None:
                nonlocal reason
                self._write(tell(narrator, output, piece), run)
                reason = piece.finish or reason

            await run.drive(write, self._until_lost)
            self._write(narrator.finished(reason, run.usage()), run, changes=True)

    async def _until_lost(self) -> HTTPReceiveMessage:
        """What `Run.drive` takes for the client's connection."""
        await self.lease.lost.wait()
        return {"type": "http.disconnect"}

    def _write(self, events: bytes, run: RecordedRun | None, *, changes: bool = False) -> None:
        """Have events written that were not; `changes`: the response itself changed with them."""
        narrator = self._narrator
        assert narrator is not None, "an attempt tells through its narrator"  # noqa: S101 (our own invariant)
        if not events or narrator.next_number <= self._num_events:
            return
        tokens = run.take_fresh() if run is not None else []
        self._tokens += tokens
        unit = Unit(
            last_number=narrator.next_number - 1,
            num_events=events.count(b"\n\n"),
            events=events,
            tokens=tokens,
            status=narrator.response.status if changes else "",
            body=_JSON.encode(narrator.response) if changes else b"",
        )
        self._num_events = narrator.next_number
        self._log.write(self.lease, unit)

    def _fail(self, error: ApiError) -> None:
        if self._narrator is None or self._narrator.next_number < self._num_events:
            # It broke before it could say again what was written: go on from there without the open items
            self._narrator = Narrator(_JSON.decode(self._created, type=ResponseObject), None)
            self._narrator.next_number = self._num_events
        self._write(self._narrator.failed(error), None, changes=True)
