"""What the gateway counts itself; the workers' own figures join them on `/metrics` through `fleet.metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fleet.messages import MoveReason

LATENCY_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
INTERVAL_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


class GatewayMetrics:
    """The gateway's counters, gauges and histograms in one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        model = ["model"]
        self.prompt_tokens = Counter("baton_prompt_tokens", "Prompt tokens admitted", model, registry=registry)
        self.output_tokens = Counter("baton_output_tokens", "Output tokens delivered", model, registry=registry)
        self.finished = Counter(
            "baton_requests_finished", "Requests ended, by reason", ["model", "reason"], registry=registry
        )
        self.rejected = Counter("baton_requests_rejected", "Requests not admitted", ["reason"], registry=registry)
        self.replays = Counter("baton_replays", "Requests replayed under a new epoch", ["reason"], registry=registry)
        self.migrations = Counter(
            "baton_migrations", "Requests moved from one decode worker to another", ["reason"], registry=registry
        )
        self.migration_pause_seconds = Histogram(
            "baton_migration_pause_seconds",
            "From the last token of the one decode worker to the first of the other",
            model,
            buckets=INTERVAL_S,
            registry=registry,
        )
        self.replay_pause_seconds = Histogram(
            "baton_replay_pause_seconds",
            "From the last token before a replay to the first one after it",
            model,
            buckets=LATENCY_S,
            registry=registry,
        )
        self.stale_messages = Counter(
            "baton_stale_messages", "Messages about an old epoch or an ended request, dropped", registry=registry
        )
        self.queued = Gauge("baton_requests_queued", "Requests without a first token", registry=registry)
        self.live = Gauge("baton_requests_live", "Requests that have not ended", registry=registry)
        self.ttft_seconds = Histogram(
            "baton_ttft_seconds", "Admission to first token", model, buckets=LATENCY_S, registry=registry
        )
        self.itl_seconds = Histogram(
            "baton_itl_seconds", "Between tokens of one request", model, buckets=INTERVAL_S, registry=registry
        )
        self.e2e_seconds = Histogram(
            "baton_e2e_seconds", "Admission to end", model, buckets=LATENCY_S, registry=registry
        )

    def count_move(self, reason: MoveReason | None) -> None:
        """A decode worker has taken a request, for this reason if it is known; a prefill worker's is no move."""
        if reason not in (None, MoveReason.PREFILLED):
            self.migrations.labels(reason).inc()
