"""What every worker counts. The gateways show it under the worker's name (`fleet.metrics`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from fleet.hand_off_messages import RefuseReason
from fleet.types import WorkerLoad

STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
CHOSEN = ("device", "device_grammar", "prompt", "logit_bias", "penalties", "batch", "bad_row")
HAND_OFF_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class HandOffView(Protocol):
    """A worker's hand-offs, as its metrics need to know them."""

    @property
    def num_giving(self) -> int:
        """Hand-offs being given."""
        ...

    @property
    def num_taking(self) -> int:
        """Grants that wait for their Commit."""
        ...

    @property
    def num_quarantined(self) -> int:
        """Closed grants whose writer is not known to be done."""
        ...

    @property
    def refusals(self) -> Mapping[str, int]:
        """Refusals sent since start, by reason."""
        ...

    @property
    def stale(self) -> Mapping[str, int]:
        """Messages since start that came too late, by reason."""
        ...

    @property
    def copy_seconds(self) -> Mapping[str, float]:
        """Time spent copying pages that were given, since start, by transport."""
        ...


class WorkerMetrics:
    """A worker's counters, gauges and histograms in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.running = Gauge("baton_worker_running", "Sequences being computed", registry=registry)
        self.waiting = Gauge("baton_worker_waiting", "Sequences waiting", registry=registry)
        self.pages = Gauge("baton_worker_pages", "KV pages, by state", ["state"], registry=registry)
        self.page_bytes = Gauge("baton_worker_page_bytes", "Bytes of one KV page", ["dtype"], registry=registry)
        self.over_share = Counter(
            "baton_worker_over_share",
            "Requests refused because their gateway had as many here as it may",
            registry=registry,
        )
        self.computed_tokens = Counter(
            "baton_worker_computed_tokens", "Tokens that went through the model", registry=registry
        )
        self.sampled_tokens = Counter("baton_worker_sampled_tokens", "Tokens sampled", registry=registry)
        self.prefix_query_tokens = Gauge(
            "baton_worker_prefix_query_tokens", "Tokens looked up in the prefix cache since start", registry=registry
        )
        self.prefix_hit_tokens = Gauge(
            "baton_worker_prefix_hit_tokens", "Tokens found in the prefix cache since start", registry=registry
        )
        self.step_seconds = Histogram("baton_worker_step_seconds", "Model steps", buckets=STEP_S, registry=registry)
        self.hand_offs = Counter(
            "baton_worker_hand_offs", "Sequences handed off", ["transport", "outcome"], registry=registry
        )
        self.hand_off_seconds = Histogram(
            "baton_worker_hand_off_seconds",
            "Grant to Ack, as the giver sees it",
            ["transport"],
            buckets=HAND_OFF_S,
            registry=registry,
        )
        self.hand_off_bytes = Counter(
            "baton_worker_hand_off_bytes", "Page bytes given away", ["transport"], registry=registry
        )
        self.move_seconds = Histogram(
            "baton_worker_move_seconds",
            "A sequence's pause by its parts: last_pages and answer (to the Commit) at the giver, first_token at the "
            "taker, which is counted for prompts too",
            ["phase"],
            buckets=STEP_S,
            registry=registry,
        )
        self.returned = Counter(
            "baton_worker_returned", "Requests given back to the gateway", ["reason"], registry=registry
        )

    def watch_hand_offs(self, view: HandOffView) -> None:
        """Show what hand-offs are open, and what was refused, whenever the registry is collected."""
        hand_offs = Gauge(
            "baton_worker_hand_offs_open", "Hand-offs that have not ended, by side", ["side"], registry=self.registry
        )
        hand_offs.labels("giving").set_function(lambda: view.num_giving)
        hand_offs.labels("taking").set_function(lambda: view.num_taking)
        hand_offs.labels("quarantined").set_function(lambda: view.num_quarantined)
        refusals = Gauge(
            "baton_worker_hand_off_refusals",
            "Offers and Commits refused since start",
            ["reason"],
            registry=self.registry,
        )
        for reason in RefuseReason:
            refusals.labels(reason.value).set_function(partial(_refused, view, reason))
        self.registry.register(_HandOffCounts(view))

    def watch_steps(self, num_steps: Mapping[str, int]) -> None:
        """Show where the tokens of decode steps were chosen. Kept by whoever runs the steps."""
        gauge = Gauge(
            "baton_worker_decode_steps",
            "Steps since start by where tokens were chosen: device, device_grammar (by masks), or why the host did",
            ["chosen"],
            registry=self.registry,
        )
        for where in CHOSEN:
            gauge.labels(where).set_function(partial(_count, num_steps, where))

    def show_load(self, load: WorkerLoad) -> None:
        """Set the gauges from the worker's own count."""
        self.running.set(load.num_running)
        self.waiting.set(load.num_waiting)
        used = load.total_pages - load.free_pages - load.quarantined_pages
        self.prefix_query_tokens.set(load.prefix_query_tokens)
        self.prefix_hit_tokens.set(load.prefix_hit_tokens)
        self.pages.labels("used").set(used)
        self.pages.labels("free").set(load.free_pages)
        self.pages.labels("cached").set(load.cached_pages)
        self.pages.labels("quarantined").set(load.quarantined_pages)


class _HandOffCounts(Collector):
    """Reads counts that are kept elsewhere, as the counters they are."""

    def __init__(self, view: HandOffView) -> None:
        self._view = view

    def collect(self) -> Iterable[Metric]:
        """A sample per reason, and one per transport."""
        yield _family(
            "baton_worker_stale_messages",
            "Messages of an old epoch, about a grant that is over, or of a former life, dropped",
            "reason",
            self._view.stale,
        )
        yield _family(
            "baton_worker_hand_off_copy_seconds",
            "Time spent copying the pages of baton_worker_hand_off_bytes",
            "transport",
            self._view.copy_seconds,
        )


def _family(name: str, what: str, label: str, counts: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(name, what, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _count(counts: Mapping[str, int], key: str) -> float:
    return counts.get(key, 0)


def _refused(view: HandOffView, reason: RefuseReason) -> float:
    return _count(view.refusals, reason)
