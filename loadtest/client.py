"""One measured request: send, take the stream, write the record."""

import asyncio

from loadtest.chunks import StreamSink
from loadtest.connection import Clock
from loadtest.errors import BadAnswer, ConnectFailed, ExchangeError
from loadtest.record import Outcome, Record, Tally, TokenCount
from loadtest.server import Server
from loadtest.workload import Call


class Client:
    """Sends calls and turns each into a record.

    ``origin_s`` is the clock time that the records count from; ``tally`` is kept up to date on the way.
    """

    def __init__(self, server: Server, tally: Tally, clock: Clock, origin_s: float, timeout_s: float) -> None:
        self._server = server
        self._tally = tally
        self._clock = clock
        self._origin_s = origin_s
        self._timeout_s = timeout_s
        self.records: list[Record] = []

    def now_s(self) -> float:
        """Return the time on the records' scale."""
        return self._clock() - self._origin_s

    async def send(
        self, call: Call, *, scheduled_s: float, held_s: float = 0.0, heard: list[str] | None = None
    ) -> Record:
        """Send ``call`` now, wait for the end of its stream and append its record to ``records``.

        ``heard`` gets the answer's text, where the caller wants it.

        Never raises for what the server does: that is the record's outcome. A cancelled send is recorded
        as such, and the cancellation goes on.
        """
        sink = StreamSink(self._tally, heard)
        record = Record(
            index=call.index,
            turn=call.turn,
            scheduled_s=scheduled_s,
            sent_s=self.now_s(),
            held_s=held_s,
            asked_prompt_tokens=call.prompt_tokens,
            asked_output_tokens=call.output_tokens,
        )
        self._tally.sent()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._server.send(call.request, sink)
            _judge(record, sink)
        except asyncio.CancelledError:
            record.outcome = Outcome.CANCELLED
            raise
        except TimeoutError:
            record.outcome = Outcome.TIMEOUT
            record.error = f"no end within {self._timeout_s:g} s"
        except ExchangeError as error:
            record.outcome, record.error = _outcome_of(error), str(error)
        finally:
            record.end_s = self.now_s()
            self._copy(record, sink)
            self._tally.ended(record)
            self.records.append(record)
        return record

    def _copy(self, record: Record, sink: StreamSink) -> None:
        record.status = sink.status
        record.retry_after_s = sink.retry_after_s
        record.finish_reason = sink.finish_reason
        times = sink.content_at_s
        for place, at_s in enumerate(times):
            times[place] = at_s - self._origin_s
        record.content_times_s = times
        usage = sink.usage
        if usage is not None and usage.completion_tokens is not None:
            record.output_tokens = usage.completion_tokens
        else:
            record.output_tokens = len(times)
            record.token_count = TokenCount.CHUNKS
        # Without usage the length that was asked for is the best guess there is.
        has_count = usage is not None and usage.prompt_tokens is not None
        record.prompt_tokens = (usage.prompt_tokens or 0) if usage and has_count else record.asked_prompt_tokens


def _judge(record: Record, sink: StreamSink) -> None:
    if sink.status == 429:
        record.outcome, record.error = Outcome.REJECTED, sink.error_message()
    elif sink.status != 200:
        record.outcome, record.error = Outcome.HTTP_ERROR, sink.error_message()
    elif sink.failure is not None:
        record.outcome = Outcome.BAD_ANSWER if sink.broken else Outcome.STREAM_ERROR
        record.error = sink.failure
    elif (fault := sink.fault()) is not None:
        record.outcome = Outcome.BAD_ANSWER if sink.num_events == 0 else Outcome.DISCONNECTED
        record.error = fault


def _outcome_of(error: ExchangeError) -> Outcome:
    if isinstance(error, ConnectFailed):
        return Outcome.CONNECT_ERROR
    return Outcome.BAD_ANSWER if isinstance(error, BadAnswer) else Outcome.DISCONNECTED
