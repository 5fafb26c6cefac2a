"""HTTP figures in the gateway's own registry.

Litestar's Prometheus plugin would count into the process's global one.
"""

from __future__ import annotations

import time

from litestar.middleware import ASGIMiddleware
from litestar.status_codes import HTTP_429_TOO_MANY_REQUESTS
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REFUSAL_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2)
SECONDS = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class HttpMetrics(ASGIMiddleware):
    """Counts requests by route, method and status, and how long they take to the end of their body."""

    def __init__(self, registry: CollectorRegistry) -> None:
        route = ["method", "path"]
        self._requests = Counter("baton_http_requests", "HTTP requests answered", [*route, "status"], registry=registry)
        self._seconds = Histogram(
            "baton_http_request_duration_seconds",
            "From request to the end of its answer",
            route,
            buckets=SECONDS,
            registry=registry,
        )
        self._refusal_seconds = Histogram(
            "baton_refusal_seconds",
            "From the head of a request to the end of its refusal (429)",
            buckets=REFUSAL_S,
            registry=registry,
        )
        self._running = Gauge("baton_http_requests_in_progress", "HTTP requests under way", route, registry=registry)

    async def handle(self, scope: Scope, receive: Receive, send: Send, next_app: ASGIApp) -> None:
        """See `ASGIMiddleware`."""
        labels = (str(scope.get("method", "")), str(scope.get("path_template", "")))
        status = 0
        started_s = time.perf_counter()

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._running.labels(*labels).inc()
        try:
            await next_app(scope, receive, note_status)
        finally:
            self._running.labels(*labels).dec()
            # No status: the client left, or the server stopped, before an answer began
            self._requests.labels(*labels, str(status or 499)).inc()
            took_s = time.perf_counter() - started_s
            self._seconds.labels(*labels).observe(took_s)
            if status == HTTP_429_TOO_MANY_REQUESTS:
                self._refusal_seconds.observe(took_s)
