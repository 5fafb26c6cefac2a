"""Metrics travel with the heartbeats: a worker snapshots its registry, a gateway shows it under the worker's name.

So one scrape of one gateway sees the whole fleet, and workers open no port for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from fleet.messages import MetricFamily, MetricSample


class Reporter(Protocol):
    """A worker as the collector sees it."""

    @property
    def labels(self) -> dict[str, str]:
        """Labels that tell this worker from others."""
        ...

    @property
    def metrics(self) -> list[MetricFamily]:
        """Its last snapshot."""
        ...


def snapshot(registry: CollectorRegistry) -> list[MetricFamily]:
    """All samples of a registry, as plain data. Creation times are left out; nobody reads them across a fleet."""
    return [
        MetricFamily(
            family.name,
            family.type,
            family.documentation,
            [MetricSample(s.name, s.labels, s.value) for s in family.samples if not s.name.endswith("_created")],
        )
        for family in registry.collect()
    ]


class FleetCollector(Collector):
    """Yields the workers' families, merged by name, each sample labelled with its worker."""

    def __init__(self, reporters: Callable[[], Iterable[Reporter]]) -> None:
        self._reporters = reporters

    def collect(self) -> Iterable[Metric]:
        """One Metric per family name over all workers."""
        merged: dict[str, Metric] = {}
        for reporter in self._reporters():
            for family in reporter.metrics:
                metric = merged.get(family.name)
                if metric is None:
                    metric = merged[family.name] = Metric(family.name, family.documentation, family.kind)
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, **reporter.labels}, sample.value)
        return merged.values()
