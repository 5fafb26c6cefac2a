"""Request state in Redis: a compare-and-set state machine, written behind the token path in batches.

The gateway that owns a request is the only writer of its key, so what is seen in Redis lags but never lies.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from fleet.logs import get_logger
from fleet.redis_client import UNAVAILABLE, Redis
from fleet.scripts import lua
from fleet.types import RequestState

FLUSH_S = 0.05
RETRY_S = 0.5
MAX_BATCH = 256
MAX_PENDING = 100_000
LIVE_TTL_S = 3_600
ENDED_TTL_S = 900

_log = get_logger("request_state")


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of a request's state.

    Attributes:
        fields: further facts to set along, e.g. `prefill_worker`, `decode_worker`, `output_tokens`, `finish_reason`.
        at_s: Unix time of the change itself, not of the write.
    """

    request_id: str
    epoch: int
    state: RequestState
    fields: dict[str, str | int | float] = field(default_factory=dict)
    at_s: float = field(default_factory=time.time)


class RequestStateWriter:
    """Takes transitions at once and writes them soon; bounded, and patient while Redis is away."""

    def __init__(self, redis: Redis, *, namespace: str) -> None:
        self._redis = redis
        self._namespace = namespace
        self._script = redis.register_script(lua("transition"))
        self._pending: deque[Transition] = deque(maxlen=MAX_PENDING)
        self._wake = asyncio.Event()
        self.refused = 0

    @property
    def num_pending(self) -> int:
        """Transitions not yet in Redis."""
        return len(self._pending)

    def record(self, transition: Transition) -> None:
        """Queue a transition. Never waits; beyond `MAX_PENDING` the oldest are forgotten."""
        self._pending.append(transition)
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled; a task of the service's group."""
        away = False
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                try:
                    await self.flush()
                except UNAVAILABLE as error:
                    if not away:
                        _log.warning("Redis is away, request state will catch up", error=str(error))
                    away = True
                    await asyncio.sleep(RETRY_S)
                else:
                    if away:
                        _log.info("Redis is back")
                    away = False
                    await asyncio.sleep(FLUSH_S)

    async def flush(self) -> None:
        """Write what is pending, at most one batch. Raises what Redis raises, and keeps the batch then."""
        batch = [self._pending[i] for i in range(min(MAX_BATCH, len(self._pending)))]
        if not batch:
            return
        pipe = self._redis.pipeline(transaction=False)
        for change in batch:
            pairs = [item for pair in change.fields.items() for item in pair]
            arguments = [change.state.value, change.epoch, change.at_s, LIVE_TTL_S, ENDED_TTL_S, *pairs]
            await self._script(keys=[f"{self._namespace}:request:{change.request_id}"], args=arguments, client=pipe)
        taken = await pipe.execute()
        self.refused += sum(1 for answer in taken if not answer)
        for _ in batch:
            self._pending.popleft()
