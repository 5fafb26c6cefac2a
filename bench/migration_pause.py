"""How long a stream stands still when its decode worker leaves, and which part of the move takes the time.

    python bench/migration_pause.py [--transports shm,tcp] [--streams 8] [--drains 6] [--dtype auto]
    python bench/migration_pause.py --model random --max-tokens 120 --drains 3     # a random checkpoint of 0.6B

Real processes, one compute thread each. Each drain sends SIGTERM to one of two decode workers in the middle of the
streams; the pause is what the client saw between the last token of the one worker and the first of the other, beside
the ordinary interval of the same stream before, at half the load of its worker, and after. Everything shares this
machine's cores, so a leaving worker's last steps and its interpreter's end are in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import openai
from random_checkpoint import random_checkpoint
from support.fleet import DEMO, Fleet  # type: ignore[import-not-found]  # of the tests, found by the path above
from support.redis_server import RedisServer  # type: ignore[import-not-found]  # likewise

TOKENS_BEFORE = 40
TOKENS_AFTER = 20
KV_CACHE_BYTES = 1 << 29
_MOVED = re.compile(
    r"sequence moved .*?last_pages_ms=(?P<last>[\d.]+).*?moved_pages=\d+.*?output_tokens=(?P<tokens>\d+)"
    r" request_id=(?P<id>\S+)"
)
_ANSWER = re.compile(r"sequence moved .*?answer_ms=([\d.]+)")
_FIRST = re.compile(r"first token .*?index=(\d+) request_id=(\S+) .*?waited_ms=([\d.]+)")


@dataclass
class Stream:
    """When each token of one stream came, by index."""

    request_id: str = ""
    times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What runs: the model, how its workers hold it, and the streams."""

    model: Path
    dtype: str
    num_streams: int
    max_tokens: int


@dataclass
class Move:
    """One sequence's move: what the client saw, and its parts as the workers measured them, in ms.

    `after` is the mean interval of the tokens behind the pause; NaN where too few came.
    """

    interval: float
    after: float
    pause: float
    last_pages: float
    answer: float
    first_token: float


async def follow(client: openai.AsyncOpenAI, number: int, max_tokens: int, tokens: asyncio.Semaphore) -> Stream:
    """Read one stream to its end."""
    stream = Stream()
    chunks = await client.completions.create(
        model="demo",
        prompt=f"Tell me of page number {number}. " * (1 + 5 * (number % 3)),
        max_tokens=max_tokens,
        temperature=1.0,
        seed=number,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    async for chunk in chunks:
        now_s = time.monotonic()
        stream.request_id = chunk.id
        for choice in chunk.choices:
            for _ in (choice.model_extra or {}).get("token_ids") or ():
                stream.times_s.append(now_s)
                tokens.release()
    return stream


def start_worker(fleet: Fleet, name: str, load: Load) -> None:
    """One worker of the kind that its name begins with."""
    module = f"{name.partition('-')[0]}_svc"
    worker = {"model": load.model, "served_model_name": "demo", "dtype": load.dtype, "kv_cache_bytes": KV_CACHE_BYTES}
    fleet.start(module, name, max_model_len=2048, log_level="debug", **worker)


@contextmanager
def running_fleet(transport: str, load: Load) -> Iterator[Fleet]:
    """One prefill and two decode workers."""
    with tempfile.TemporaryDirectory() as path, RedisServer(Path(path)) as redis:
        settings = {"lease_s": "2", "transports": transport}
        with Fleet(redis, Path(path), namespace="pause", settings=settings) as fleet:
            for name in ("prefill-1", "decode-1", "decode-2"):
                start_worker(fleet, name, load)
            fleet.gateway()
            fleet.wait_ready(decode=2)
            yield fleet
            fleet.stop_all()


async def drain(fleet: Fleet, leaving: str, load: Load) -> list[Move]:
    """Drain one decode worker amid streams and find each move's pause."""
    tokens = asyncio.Semaphore(0)
    async with (
        openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0, timeout=120) as client,
        asyncio.TaskGroup() as tasks,
    ):
        running = [
            tasks.create_task(follow(client, number, load.max_tokens, tokens)) for number in range(load.num_streams)
        ]
        for _ in range(TOKENS_BEFORE * load.num_streams):
            await tokens.acquire()
        service = fleet.forget(leaving)
        began_s = time.monotonic()
        code = await asyncio.to_thread(service.stop, signal.SIGTERM)
        if code != 0:
            raise SystemExit(f"{leaving} ended with {code}:\n{service.text()[-4000:]}")
    streams = {stream.request_id: stream for stream in (task.result() for task in running)}
    takers = "".join(other.text() for name, other in fleet.services.items() if name.startswith("decode"))
    first = {(found[2], int(found[1])): float(found[3]) for found in _FIRST.finditer(takers)}
    moves = []
    for line in service.text().splitlines():
        moved, answer = _MOVED.search(line), _ANSWER.search(line)
        if moved is None or answer is None or moved["id"] not in streams:
            continue
        times_s, index = streams[moved["id"]].times_s, int(moved["tokens"])
        if index >= len(times_s):
            continue  # it ended with its move
        moves.append(
            Move(
                interval=mean_interval_ms([moment for moment in times_s if moment < began_s]),
                after=mean_interval_ms(times_s[index : index + TOKENS_AFTER]),
                pause=(times_s[index] - times_s[index - 1]) * 1e3,
                last_pages=float(moved["last"]),
                answer=float(answer[1]),
                first_token=first.get((moved["id"], index), float("nan")),
            )
        )
    return moves


def mean_interval_ms(times_s: list[float]) -> float:
    """Between one token and the next; NaN for fewer than two."""
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1) * 1e3 if len(times_s) > 1 else float("nan")


def row(name: str, values: list[float]) -> str:
    """One line of the table: p50, p99, max."""
    values = sorted(value for value in values if value == value)  # noqa: PLR0124 - without NaN
    if not values:
        return f"  {name:<28} {'none':>8}"
    high = values[min(len(values) - 1, round(0.99 * (len(values) - 1)))]
    return f"  {name:<28} {statistics.median(values):8.1f} {high:8.1f} {values[-1]:8.1f}"


def show(transport: str, moves: list[Move], num_drains: int) -> None:
    """Print the table of one transport."""
    print(f"\n{transport}: {len(moves)} moves in {num_drains} drains" + " " * 8 + "     p50      p99      max")
    print(row("interval before, ms", [move.interval for move in moves]))
    print(row("interval after, ms", [move.after for move in moves]))
    print(row("pause at the client, ms", [move.pause for move in moves]))
    print(row("pause in intervals before", [move.pause / move.interval for move in moves]))
    print(row("pause in intervals after", [move.pause / move.after for move in moves]))
    print(row("stop to Commit, ms", [move.last_pages for move in moves]))
    print(row("Commit to Ack, ms", [move.answer for move in moves]))
    print(row("adopted to first token, ms", [move.first_token for move in moves]))


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", default="shm,tcp")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--drains", type=int, default=6)
    parser.add_argument("--model", default="demo", help="demo, random (a checkpoint of 0.6B) or a directory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-tokens", type=int, default=600)
    arguments = parser.parse_args()
    named = {"demo": lambda: DEMO, "random": random_checkpoint}
    model = named.get(arguments.model, lambda: Path(arguments.model).resolve())()
    load = Load(model, arguments.dtype, arguments.streams, arguments.max_tokens)
    for transport in arguments.transports.split(","):
        with running_fleet(transport, load) as fleet:
            moves: list[Move] = []
            for number in range(1, arguments.drains + 1):
                moves += asyncio.run(drain(fleet, f"decode-{number}", load))
                start_worker(fleet, f"decode-{number + 2}", load)
                fleet.wait_ready(decode=2)
            show(transport, moves, arguments.drains)


if __name__ == "__main__":
    main()
