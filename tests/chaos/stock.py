"""Takes stock of a fleet: what each process holds, and what of it was not there while the fleet was idle.

The idle counts are measured on the fleet itself, before the first round and after every kind of request has been
through it once. A process that was started since is held to what its role had then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import httpx
import psutil
import redis
from support.fleet import SHARED_MEMORY, Fleet, Service, until

MIB = 2**20
REST_S = 10.0
SLACK = {"fds": 2, "Redis connections": 32, "memory MiB": 96, "decode connections": 1, "decode fds": 10}
"""What a process may have beyond its idle count. Descriptors: some come with the first use of a thread or a transport.
Redis connections: its client library opens one for each command under way at once, and keeps it. Memory: allocators
keep what the largest batch so far needed. A decode worker's connections: two that even out their load speak to each
other from the first move on, which takes descriptors at both ends. Of anything else nothing."""
WORK = ("pages", "hand-offs", "requests", "running", "waiting")
"""What there is none of in an idle fleet."""


@dataclass
class Leaks:
    """What was not back at its idle count, in words; `pages` counts those that no request and no cache holds."""

    pages: int = 0
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """One line of `/metrics`."""

    name: str
    labels: dict[str, str]
    value: float


def scrape(url: str) -> list[Sample]:
    """What a gateway shows; nothing if it does not answer."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=5).text
    except httpx.HTTPError:
        return []
    return [_sample(line) for line in text.splitlines() if line.startswith("baton_")]


def _sample(line: str) -> Sample:
    head, _, value = line.rpartition(" ")
    name, _, labels = head.partition("{")
    pairs = (pair.partition("=") for pair in labels.rstrip("}").split(",") if pair)
    return Sample(name, {key: text.strip('"') for key, _, text in pairs}, float(value))


def own_bytes(service: Service) -> int:
    """Memory that is this process's alone; the pages lie in shared memory and do not count."""
    with suppress(psutil.Error):
        facts = psutil.Process(service.process.pid).memory_info()
        return int(facts.rss - facts.shared)
    return 0


class Stock:
    """Counts what a fleet's processes hold. `learn` says what is idle; `leaks` what is more than that.

    Attributes:
        pids: of all processes that there ever were, by which their shared-memory files are known.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._idle: dict[tuple[str, str], int] = {}
        self._lasting_keys: set[str] = set()
        self._passing_kinds: set[str] = set()
        self.pids: set[int] = set()

    def learn(self, urls: Mapping[str, str]) -> None:
        """The fleet has nothing to do: what it holds now it may hold. Of a role, the process with the most counts.

        Raises:
            TimeoutError: it does not come to rest.
        """

        def count() -> dict[tuple[str, str], int]:
            counted: dict[tuple[str, str], int] = {}
            for name, what, number in self._counts(urls):
                key = role_of(name), what
                counted[key] = max(counted.get(key, 0), number)
            return counted if not any(n for (_, what), n in counted.items() if what.startswith(WORK)) else {}

        self._idle = until(count, within_s=REST_S, what="the fleet is idle")
        self._lasting_keys, passing = self._keys()
        self._passing_kinds = {key.partition(":")[0] for key in passing}

    @property
    def idle(self) -> dict[str, int]:
        """The idle counts, for the record."""
        return {f"{role} {what}": count for (role, what), count in sorted(self._idle.items())}

    def leaks(self, urls: Mapping[str, str]) -> Leaks:
        """What is there beyond the idle counts now."""
        leaks = Leaks()
        for name, what, count in self._counts(urls):
            idle = self._idle.get((role_of(name), what), 0)
            slack = SLACK.get(f"{role_of(name)} {what}", SLACK.get(what, 0))
            if count > idle + slack:
                if what.startswith("pages"):
                    leaks.pages += count - idle
                leaks.others.append(f"{name}: {count} {what}, {idle} when idle")
        leaks.others += [*self._orphaned_files(), *self._strange_keys()]
        return leaks

    def _counts(self, urls: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
        """`(process, what, count)` of everything that is counted."""
        shown: dict[tuple[str, str], int] = Counter()
        for gateway, url in urls.items():
            for sample in scrape(url):
                name = sample.labels.get("worker", gateway)
                if what := _counted(sample):
                    # Every gateway shows every worker, and may have heard it at another moment.
                    shown[name, what] = max(shown[name, what], int(sample.value))
        for (name, what), count in shown.items():
            yield name, what, count
        for name, service in self._fleet.services.items():
            pid = service.process.pid
            process = psutil.Process(pid)
            num_local = len(process.net_connections("unix"))
            yield name, "Redis connections", num_local
            yield name, "fds", process.num_fds() - num_local
            yield name, "memory MiB", own_bytes(service) // MIB
            yield name, "shared-memory files", len(list(SHARED_MEMORY.glob(f"baton-{pid}-*")))

    def _orphaned_files(self) -> Iterator[str]:
        live = {service.process.pid for service in self._fleet.services.values()}
        for path in SHARED_MEMORY.glob("baton-*"):
            pid = int(path.name.split("-")[1])
            if pid in self.pids and pid not in live:
                yield f"{path} of a process that is gone"

    def _keys(self) -> tuple[set[str], set[str]]:
        """Our keys without a time to live, and those with one, all without the namespace."""
        lasting, passing = set[str](), set[str]()
        with redis.Redis.from_url(self._fleet.redis.url, decode_responses=True) as client:
            for key in client.scan_iter():
                ttl = client.ttl(key)
                if ttl != -2:  # else it ended meanwhile
                    (lasting if ttl == -1 else passing).add(key.removeprefix(f"{self._fleet.namespace}:"))
        return lasting, passing

    def _strange_keys(self) -> Iterator[str]:
        """Keys that would stay for good and were not there, and lasting traces of processes that are gone."""
        lasting, passing = self._keys()
        for key in sorted(lasting - self._lasting_keys):
            yield f"Redis key {key} has no time to live, and was not there when idle"
        for key in sorted(passing):
            kind, _, rest = key.partition(":")
            if kind not in self._passing_kinds:
                yield f"Redis key {key} is of no kind that was there when idle"
            elif kind in ("worker", "gateway") and rest not in self._fleet.services:
                yield f"{kind} {rest} is still in the registry"


def role_of(name: str) -> str:
    """What a process of this name is."""
    return name.partition("-")[0]


def _counted(sample: Sample) -> str | None:
    """What a sample counts, if it must be as it was."""
    match sample.name.removeprefix("baton_").removeprefix("worker_").removeprefix("gateway_"):
        case "pages" if sample.labels["state"] in ("used", "quarantined"):
            return f"pages {sample.labels['state']}"
        case "hand_offs_open":
            return f"hand-offs {sample.labels['side']}"
        case "requests_live" | "requests_queued" | "running" | "waiting" | "tasks" as what:
            return what.replace("_", " ")
        case "bus_peers":
            return "connections"
    return None
