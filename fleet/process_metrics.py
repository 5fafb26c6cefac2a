"""What a process knows of its own sockets and tasks: figures that must be back where they were after any trouble."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Gauge

from fleet.bus import Bus


def watch_process(registry: CollectorRegistry, bus: Bus, *, prefix: str) -> None:
    """Show bus and tasks in this registry, read when it is collected; call it in the running event loop.

    Workers' and gateways' figures meet on one page, so `prefix` keeps their names apart.
    """
    loop = asyncio.get_running_loop()
    Gauge(f"{prefix}_tasks", "Tasks of the event loop", registry=registry).set_function(
        lambda: len(asyncio.all_tasks(loop))
    )
    Gauge(f"{prefix}_bus_peers", "Outgoing connections of the bus", registry=registry).set_function(
        lambda: bus.num_peers
    )
    refused = Gauge(
        f"{prefix}_bus_lost_messages",
        "Messages since start that were no message of ours, or that a full queue dropped",
        ["fate"],
        registry=registry,
    )
    refused.labels("malformed").set_function(lambda: bus.counters.malformed)
    refused.labels("dropped").set_function(lambda: bus.counters.dropped)
    Gauge(
        f"{prefix}_bus_refused_handshakes",
        "Times since start that somebody without the cluster secret was sent away",
        registry=registry,
    ).set_function(lambda: bus.counters.refused_handshakes)
