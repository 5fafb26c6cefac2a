"""What is told of requests as they go: to the metrics, to their state in Redis, and to the log."""

from __future__ import annotations

import time
from collections.abc import Callable

from fleet.logs import get_logger
from fleet.request_state import Transition
from fleet.types import FinishReason, PeerRef, RequestState
from gateway.live import LiveRequest
from gateway.metrics import GatewayMetrics

_log = get_logger("requests")


class Journal:
    """Writes down; decides nothing.

    Args:
        metrics: of this gateway.
        record: takes a step of a request's state, for Redis.
    """

    def __init__(self, metrics: GatewayMetrics, record: Callable[[Transition], None]) -> None:
        self.metrics = metrics
        self._record = record

    def state(self, live: LiveRequest, state: RequestState, **fields: str | int) -> None:
        """Where a request is now."""
        facts: dict[str, str | int | float] = {**fields, "hops": live.hops.encoded()}
        if live.first_token_at_s is not None:
            facts["first_token"] = live.first_token_at_s
        self._record(Transition(live.request_id, live.epoch, state, facts))

    def admitted(self, live: LiveRequest) -> None:
        """It was let in."""
        passport = live.passport
        self.metrics.prompt_tokens.labels(passport.model).inc(passport.prompt_len)
        self.state(
            live,
            RequestState.QUEUED,
            model=passport.model,
            prompt_tokens=passport.prompt_len,
            gateway=passport.gateway.name,
        )

    def first_token(self, live: LiveRequest) -> None:
        """It has its first token."""
        live.first_token_at_s = time.time()
        if live.first_token_s is not None:
            ttft_s = live.first_token_s - live.created_s
            self.metrics.ttft_seconds.labels(live.passport.model).observe(ttft_s)

    def gap(self, live: LiveRequest, gap_s: float, num_tokens: int, worker: PeerRef) -> None:
        """So many tokens came from this worker so long after the one before them."""
        model = live.passport.model
        self.metrics.itl_seconds.labels(model).observe(gap_s / num_tokens)
        if live.speaker is None:  # the first word of an epoch in a stream that had begun
            self.metrics.replay_pause_seconds.labels(model).observe(gap_s)
        elif live.speaker not in (worker, live.prefill_peer):
            self.metrics.migration_pause_seconds.labels(model).observe(gap_s)

    def replayed(self, live: LiveRequest, reason: str) -> None:
        """It goes on elsewhere under a new epoch."""
        self.metrics.replays.labels(reason).inc()
        _log.info("request replayed", request_id=live.request_id, epoch=live.epoch, reason=reason)
        self.state(live, RequestState.QUEUED, output_tokens=len(live.output), replay_reason=reason)

    def ended(self, live: LiveRequest, reason: FinishReason) -> None:
        """It is over."""
        now_s = time.monotonic()
        self.metrics.finished.labels(live.passport.model, reason.value).inc()
        self.metrics.e2e_seconds.labels(live.passport.model).observe(now_s - live.created_s)
        state = RequestState.FAILED if reason is FinishReason.ERROR else RequestState.FINISHED
        self.state(live, state, output_tokens=len(live.output), finish_reason=reason.value)
        _log.info(
            "request ended",
            request_id=live.request_id,
            model=live.passport.model,
            reason=reason.value,
            prompt_tokens=live.prompt_len,
            output_tokens=len(live.output),
            epoch=live.epoch,
            ttft_ms=None if live.first_token_s is None else round((live.first_token_s - live.created_s) * 1e3, 1),
            total_ms=round((now_s - live.created_s) * 1e3, 1),
        )
