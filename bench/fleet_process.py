"""Fleets that a bench runs its client against: one at a time, started when first needed."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import child_process
from loopback import answers, free_port
from stage_results import Fault
from stages import Clock

_STOP_S = 10.0
_POLL_S = 0.25
_PROBE_S = 15.0


@dataclass(frozen=True)
class FleetSpec:
    """A gateway with one worker of each kind: which model under which name, and flags of `baton up`."""

    name: str
    model: Path
    flags: tuple[str, ...]


@dataclass(frozen=True)
class HandOffs:
    """How many were given over a transport, the bytes of pages that moved, and how long copying them took."""

    count: float
    num_bytes: float
    copy_s: float


class Fleets:
    """At most one runs; asking for another ends it, and one that failed its client and no longer answers is replaced.

    Use `close` at the end.

    Args:
        logs: folder of what they say.
        environment: of their processes.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = dict(environment) | {"XDG_STATE_HOME": str(logs)}
        self._running: tuple[FleetSpec, subprocess.Popen[bytes], int] | None = None
        self._broken: set[str] = set()
        self._is_suspect = False  # it has failed its client

    @property
    def url(self) -> str:
        """Of the running fleet. Raises Fault if there is none."""
        if self._running is None:
            raise Fault("no fleet runs")
        return f"http://127.0.0.1:{self._running[2]}"

    def need(self, spec: FleetSpec, clock: Clock) -> float | None:
        """Have this fleet running and ready; returns how long the start took, None if it ran already.

        Raises:
            Fault: it does not come up, or did not earlier; with the ends of its processes' logs.
        """
        if self._running is not None:
            if self._running[0] == spec and self._is_ready() and not (self._is_suspect and not self._answers()):
                return None
            self.close()
        if spec.name in self._broken:
            raise Fault(f"not run: the fleet {spec.name} did not come up for an earlier stage")
        began_s = time.monotonic()
        port = free_port()
        words = [sys.executable, "-m", "baton", "up", "--model", str(spec.model), "--served-model-name", spec.name]
        log = self._logs / f"{spec.name}.log"
        process = child_process.start([*words, "--port", str(port), *spec.flags], log, self._environment)
        self._running = spec, process, port
        self._is_suspect = False
        while not self._is_ready():
            if process.poll() is not None or clock.left_s == 0:
                self._broken.add(spec.name)
                said = self._said()
                self.close()
                reason = (re.findall(r'error=("[^"\n]*"|\S+)', said) or ["its time was up"])[0]
                took_s = time.monotonic() - began_s
                raise Fault(f"the fleet {spec.name} did not come up in {took_s:.0f} s: {reason}\n{said}")
            time.sleep(_POLL_S)
        return time.monotonic() - began_s

    def close(self) -> None:
        """End the running fleet: in order, then at once, then by force."""
        if self._running is None:
            return
        process = self._running[1]
        self._running = None
        started = child_process.family(process.pid)
        with child_process.watched(process):
            for hint in (signal.SIGINT, signal.SIGINT):
                if process.poll() is None:
                    process.send_signal(hint)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_STOP_S)
        child_process.kill(started)

    def load(self, clock: Clock, *words: str) -> dict[str, Any]:
        """Run the load test against the fleet and return its JSON report.

        Raises:
            Fault: a request failed, or time was up; with what client and services said.
        """
        try:
            return self._load(clock, *words)
        except Fault as fault:
            self._is_suspect = True
            raise Fault(f"{fault}\n{self._said()}") from None

    def _load(self, clock: Clock, *words: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            common = ["--url", f"{self.url}/v1", "--no-progress", "--json", str(report), "--ignore-eos"]
            child_process.run(["-m", "loadtest", *words, *common], clock, self._logs / "loadtest.log")
            read: dict[str, Any] = json.loads(report.read_text())
        summary = read.get("summary", {})
        if summary.get("num_ok") != summary.get("num_sent"):
            rate = f"{summary['output_tokens_per_s']:.0f} tokens/s all the same"
            raise Fault(f"{summary['num_ok']} of {summary['num_sent']} requests succeeded: {summary['errors']}; {rate}")
        return read

    def ask(self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 60.0) -> str:
        """One HTTP request to the gateway, of JSON if there is a body. Raises Fault."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - our own address
            f"{self.url}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:  # noqa: S310
                return str(answer.read().decode())
        except OSError as error:
            raise Fault(f"{path}: {error}") from error

    def hand_offs(self) -> dict[str, HandOffs]:
        """Those given since the start, by transport, as the gateway's metrics tell."""
        said = self.ask("/metrics")
        counts, num_bytes, copy_s = (
            _by_transport(said, f"baton_worker_hand_off{name}_total") for name in ("s", "_bytes", "_copy_seconds")
        )
        return {
            transport: HandOffs(count, num_bytes.get(transport, 0.0), copy_s.get(transport, 0.0))
            for transport, count in counts.items()
            if count
        }

    def _answers(self) -> bool:
        assert self._running is not None  # noqa: S101 - `need` has looked
        body = {"model": self._running[0].name, "prompt": "One", "max_tokens": 4, "ignore_eos": True}
        try:
            self.ask("/v1/completions", body, timeout_s=_PROBE_S)
        except Fault:
            return False
        return True

    def _is_ready(self) -> bool:
        return answers(f"{self.url}/health/ready", timeout_s=2)

    def _said(self) -> str:
        """The ends of the logs of the running fleet: of the command and of each service."""
        runs = {log.parent for log in (self._logs / "baton").rglob("*.log")}
        latest = max(runs, key=lambda folder: folder.stat().st_mtime, default=None)
        services = sorted(latest.glob("*.log")) if latest else []
        up = self._running[0].name if self._running else ""
        parts = [("baton up", self._logs / f"{up}.log"), *((log.stem, log) for log in services if log.stem != "redis")]
        return "\n".join(f"-- {name}:\n{child_process.tail(log, 1200)}" for name, log in parts)


def _by_transport(said: str, name: str) -> dict[str, float]:
    """A counter's sums over all workers, what was taken or failed aside."""
    sums: dict[str, float] = {}
    for labels, value in re.findall(rf"^{name}\{{([^}}]*)\}} (\S+)", said, re.MULTILINE):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if found.get("outcome", "given") == "given":
            sums[found["transport"]] = sums.get(found["transport"], 0.0) + float(value)
    return sums
