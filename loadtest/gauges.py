"""What the server says of itself while it is under load: queue lengths and pages, worker by worker."""

import asyncio
import contextlib

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from loadtest.connection import Clock
from loadtest.errors import ExchangeError
from loadtest.server import Server

_INTERVAL_S = 1.0

_FIGURES = {
    "baton_worker_running": "running",
    "baton_worker_waiting": "waiting",
    "baton_worker_pages": "pages",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "pages used, share",
    "sglang:num_running_reqs": "running",
    "sglang:num_queue_reqs": "waiting",
    "sglang:token_usage": "pages used, share",
}
"""Gauges of servers we know, and under which heading they are shown."""
_USED_STATES = {"used", "active", "running"}


class Sample(msgspec.Struct, frozen=True):
    """One reading. ``pool`` is prefill or decode where the server tells; ``at_s`` counts as records do."""

    at_s: float
    figure: str
    pool: str
    worker: str
    value: float


class GaugeWatch:
    """Reads ``/metrics`` once a second; a server without it is left alone."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self._origin_s = clock()
        self.samples: list[Sample] = []

    def start_at(self, origin_s: float) -> None:
        """Count times from ``origin_s`` on the clock."""
        self._origin_s = origin_s

    async def watch(self) -> None:
        """Sample until cancelled, or until the server shows that it has nothing to say."""
        while True:
            text = None
            with contextlib.suppress(ExchangeError, TimeoutError):
                text = await self._server.get_text(f"{self._server.root}/metrics")
                if text is None:
                    return
            if text is not None:
                self.samples += read_gauges(text, self._clock() - self._origin_s)
            await asyncio.sleep(_INTERVAL_S)


def read_gauges(text: str, at_s: float) -> list[Sample]:
    """Pick what we know out of Prometheus text; of Baton's pages, those that requests hold."""
    # The parser is slow and the text long: leave it only the lines that matter.
    lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] in _FIGURES]
    samples = []
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for one in family.samples:
            labels = one.labels
            if "state" in labels and labels["state"] not in _USED_STATES:
                continue
            worker = labels.get("worker") or labels.get("engine") or "server"
            samples.append(Sample(at_s, _FIGURES[one.name], labels.get("role", ""), worker, float(one.value)))
    return samples
