"""The gateway's part of `bench/growth.py`: its processor time and memory against workers and streams.

A probe asks the gateway for its health every 50 ms: what it waits for is the gateway's event loop, plus the lag of this
process's own, which is measured beside it. Tokens are counted where they leave the workers: a gateway that is behind
sends several in one event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

import psutil
from gateway_overhead import mock_fleet
from machine import quantile

WORKERS = (1, 4, 16, 64)
STREAMS = (125, 250, 500, 1000, 2000)
INTERVAL_S = 0.25
"""Between the tokens of one of many streams: 2,000 of them make 8,000 tokens/s, which this process takes in as well."""
HOLD_S = 8.0
REQUESTS = 400
STEADY_STREAMS, TOKENS = 64, 300
Rows = list[dict[str, float]]


def used_s(process: psutil.Process) -> float:
    """Processor time so far."""
    return sum(process.cpu_times()[:2])


async def with_workers() -> dict[str, Rows]:
    """At rest, per request of one token, and per token of 64 streams."""
    rows = []
    for count in WORKERS:
        async with mock_fleet(count, 0.02) as (bench, gateway, _):
            before_s = used_s(gateway)
            await asyncio.sleep(5)
            rest = (used_s(gateway) - before_s) / 5
            began_s, before_s = time.monotonic(), used_s(gateway)
            for _ in range(REQUESTS // 8):
                await asyncio.gather(*(bench.stream(1) for _ in range(8)))
            request_s = used_s(gateway) - before_s - rest * (time.monotonic() - began_s)
            began_s, before_s = time.monotonic(), used_s(gateway)
            await asyncio.gather(*(bench.stream(TOKENS) for _ in range(STEADY_STREAMS)))
            token_s = used_s(gateway) - before_s - rest * (time.monotonic() - began_s)
        rows.append(
            {
                "workers": float(count),
                "at rest, % of a core": rest * 100,
                "us per request": request_s / REQUESTS * 1e6,
                "us per token": token_s / (STEADY_STREAMS * TOKENS) * 1e6,
            }
        )
    return {"rows": rows}


async def with_streams() -> dict[str, Rows]:
    """Streams that all run at once, over 8 decode workers, in one gateway that has served none before."""
    rows = []
    for count in STREAMS:
        async with mock_fleet(8, INTERVAL_S) as (bench, gateway, _):
            await asyncio.gather(*(bench.stream(2) for _ in range(8)))
            empty = gateway.memory_info().rss
            ramp_s = count / 250
            num_tokens = int((ramp_s + HOLD_S + 2) / INTERVAL_S)
            async with asyncio.TaskGroup() as group:
                tasks = []
                for _ in range(count):
                    tasks.append(group.create_task(bench.stream(num_tokens)))
                    await asyncio.sleep(ramp_s / count)
                await asyncio.sleep(1)
                began_s, before_s = time.monotonic(), used_s(gateway)
                waits_ms, lags_ms = await probe(bench.port, HOLD_S)
                span_s, cpu_s = time.monotonic() - began_s, used_s(gateway) - before_s
                resident = gateway.memory_info().rss
            sent = within(bench.sent.values(), began_s, span_s)
            arrived = within((task.result()[1] for task in tasks), began_s, span_s)
        rows.append(
            {
                "streams": float(count),
                "tokens/s": sent / span_s,
                "tokens per event": sent / arrived,
                "% of a core": cpu_s / span_s * 100,
                "us per token": cpu_s / sent * 1e6,
                "KiB per stream": (resident - empty) / count / 1024,
                "probe p50 ms": quantile(waits_ms, 0.5),
                "probe p99 ms": quantile(waits_ms, 0.99),
                "own lag p50 ms": quantile(lags_ms, 0.5),
                "own lag p99 ms": quantile(lags_ms, 0.99),
            }
        )
    return {"rows": rows}


async def probe(port: int, duration_s: float) -> tuple[list[float], list[float]]:
    """Milliseconds of health checks, and how late this process's own loop woke, every 50 ms."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    waits_ms, lags_ms = [], []
    end_s = time.monotonic() + duration_s
    while (now_s := time.monotonic()) < end_s:
        await asyncio.sleep(0.05)
        lags_ms.append((time.monotonic() - now_s - 0.05) * 1e3)
        began_s = time.monotonic()
        writer.write(b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        waits_ms.append((time.monotonic() - began_s) * 1e3)
    writer.close()
    return waits_ms, lags_ms


def within(times: Iterable[list[float]], began_s: float, span_s: float) -> int:
    """How many of them lie in a span."""
    return sum(began_s <= at < began_s + span_s for series in times for at in series)
