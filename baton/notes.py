"""Notes of running fleets in the user's state directory, so that other commands find an embedded Redis."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from baton.errors import NoFleet, SeveralFleets, StateUnwritable

KEPT_RUNS = 10
_CLOCK_SLACK_S = 0.5


class FleetNote(msgspec.Struct, frozen=True, kw_only=True):
    """One running `baton up`.

    Attributes:
        pid, created_s: of the command's process; the creation time tells a reused process id.
        redis_url, namespace: where its fleet's data lie.
        api_url: base URL for clients.
        run_dir: its logs.
    """

    pid: int
    created_s: float
    redis_url: str
    namespace: str
    api_url: str
    run_dir: str


class NoteBook:
    """The notes in `{state_dir}/fleets`, one file per process."""

    def __init__(self, state_dir: Path) -> None:
        self._fleets = state_dir / "fleets"
        self._runs = state_dir / "runs"

    def new_run_dir(self, pid: int) -> Path:
        """A fresh directory for logs; older ones beyond the last ten are removed.

        Raises:
            StateUnwritable: it cannot be made.
        """
        try:
            self._runs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._forget_old_runs()
            made = self._runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{pid}"
            made.mkdir(mode=0o700)
        except OSError as error:
            raise StateUnwritable(
                f"cannot write to {self._runs}: {error.strerror}; set XDG_STATE_HOME to a directory of yours"
            ) from error
        return made

    def path(self, pid: int) -> Path:
        """Where the note of this process lies."""
        return self._fleets / f"{pid}.json"

    def write(self, note: FleetNote) -> None:
        """Leave a note, readable to this user alone. Raises StateUnwritable."""
        path = self.path(note.pid)
        try:
            self._fleets.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = path.with_suffix(".part")
            part.touch(mode=0o600)
            part.write_bytes(msgspec.json.encode(note))
            part.replace(path)
        except OSError as error:
            raise StateUnwritable(f"cannot write {path}: {error.strerror}; set XDG_STATE_HOME") from error

    def remove(self, pid: int) -> None:
        """Take the note away; idempotent."""
        with suppress(OSError):
            self.path(pid).unlink(missing_ok=True)

    def living(self) -> list[FleetNote]:
        """Notes of processes that still run, oldest first; others are removed."""
        found = []
        for path in sorted(self._fleets.glob("*.json")):
            note = _read(path)
            if note is not None and is_alive(note):
                found.append(note)
            else:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        return sorted(found, key=lambda note: note.created_s)

    def only_one(self) -> FleetNote:
        """The one running fleet.

        Raises:
            NoFleet: none runs.
            SeveralFleets: more than one does.
        """
        found = self.living()
        if not found:
            raise NoFleet("no running `baton up` found: start one, or name a Redis by --redis-url or BATON_REDIS_URL")
        if len(found) > 1:
            listed = ", ".join(f"{note.redis_url} ({note.api_url})" for note in found)
            raise SeveralFleets(f"several fleets run here; choose one by --redis-url: {listed}")
        return found[0]

    def _forget_old_runs(self) -> None:
        import shutil

        used = {note.run_dir for note in self.living()}
        old = sorted((path for path in self._runs.iterdir() if path.is_dir()), reverse=True)[KEPT_RUNS - 1 :]
        for path in old:
            if str(path) not in used:
                shutil.rmtree(path, ignore_errors=True)


def own_creation_s(pid: int) -> float:
    """When this process began, Unix time."""
    return float(psutil.Process(pid).create_time())


def is_alive(note: FleetNote) -> bool:
    """Whether the very process of the note still runs."""
    try:
        process = psutil.Process(note.pid)
        same = abs(process.create_time() - note.created_s) < _CLOCK_SLACK_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _read(path: Path) -> FleetNote | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=FleetNote)
    except (OSError, msgspec.DecodeError):
        return None
