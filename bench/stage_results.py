"""What the stages of a bench found, in a file that is complete after every figure."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DONE, FAILED, RUNNING = "done", "failed", "running"
_FAULT_CHARS, _HEAD_CHARS = 8000, 500
_PER_STAGE = ("commit", "sharing")
"""Facts of the machine that may differ between stages of one file."""


class Fault(Exception):
    """What kept a stage from its figures: a line, then the end of a log."""


class Booking:
    """Figures, lines and faults of one stage; each is in the file at once."""

    def __init__(self, results: Results, entry: dict[str, Any]) -> None:
        self._results = results
        self._entry = entry

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        limit: float | None = None,
        target: float | None = None,
        at_most: bool = False,
    ) -> None:
        """Book a figure. `limit`: measured in the same run. `at_most`: the target is an upper bound."""
        met = None if target is None else (value <= target if at_most else value >= target)
        row = {"name": name, "value": value, "unit": unit, "limit": limit, "target": target, "met": met}
        self._entry["rows"].append(row)
        print(line_of(row), flush=True)
        self._results.save()

    def say(self, line: str) -> None:
        """Book and print a line of text."""
        self._entry["lines"].append(line)
        print(line, flush=True)
        self._results.save()

    def fault(self, text: str) -> None:
        """Book what went wrong, of a long text the first line and the end; the stage counts as failed."""
        if len(text) > _FAULT_CHARS:
            head = text.partition("\n")[0][:_HEAD_CHARS]
            text = f"{head}\n…{text[-_FAULT_CHARS:]}"
        self._entry["faults"].append(text)
        print(f"FAULT: {text}", flush=True)
        self._results.save()


class Results:
    """The result file: the machine, and by name of stage its state, figures, lines and faults.

    Args:
        path: of the file.
        machine: facts; those of an earlier run are replaced.
        resume: keep what the file holds of other stages.

    Raises:
        ValueError: `resume`, and the file holds something else.
    """

    def __init__(self, path: Path, machine: dict[str, Any], *, resume: bool = False) -> None:
        self._path = path
        self._stages: dict[str, dict[str, Any]] = {}
        self.machine = machine
        if resume and path.is_file():
            found = json.loads(path.read_text())
            if not isinstance(found, dict) or not isinstance(found.get("stages"), dict):
                raise ValueError(f"{path} is no result file of this bench: run without --resume")
            self._stages = found["stages"]

    def is_done(self, name: str) -> bool:
        """Whether the stage ran through without a fault."""
        return self._stages.get(name, {}).get("state") == DONE

    @property
    def failed(self) -> list[str]:
        """Stages that have faults or never came to an end."""
        return [name for name, entry in self._stages.items() if entry["state"] != DONE]

    def value(self, stage: str, name: str) -> float | None:
        """A figure that is booked, of this run or an earlier one."""
        for row in self._stages.get(stage, {}).get("rows", []):
            if row["name"] == name:
                return float(row["value"])
        return None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Booking]:
        """Book what is done within; an exception becomes a fault, but for those that end the program."""
        self._stages.pop(name, None)  # so that a stage that is run again stands at the end
        entry: dict[str, Any] = {"state": RUNNING, "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds")}
        entry |= {key: self.machine[key] for key in _PER_STAGE if key in self.machine}
        entry |= {"rows": [], "lines": [], "faults": []}
        self._stages[name] = entry
        print(f"== {name}", flush=True)
        booking, began_s = Booking(self, entry), time.monotonic()
        self.save()
        try:
            yield booking
        except Exception as error:  # noqa: BLE001 - whatever it is, the next stage may do better
            booking.fault(_in_words(error))
        except BaseException as error:
            booking.fault(f"interrupted: {type(error).__name__}")
            raise
        finally:
            entry["took_s"] = round(time.monotonic() - began_s, 1)
            entry["state"] = FAILED if entry["faults"] else DONE
            self.save()

    def save(self) -> None:
        """Write the file; whoever reads it sees all of the old or all of the new."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"machine": self.machine, "stages": self._stages}, indent=1) + "\n")
        os.replace(unfinished, self._path)  # noqa: PTH105 - the rename that replaces, everywhere

    def table(self) -> str:
        """All figures, and the first line of each fault."""
        lines = []
        for name, entry in self._stages.items():
            lines.append(f"{name}: {entry['state']}, {entry.get('took_s', '?')} s")
            lines += [f"  {line_of(row)}" for row in entry["rows"]]
            lines += [f"  FAULT: {fault.splitlines()[0]}" for fault in entry["faults"] if fault]
        return "\n".join(lines)


def line_of(row: dict[str, Any]) -> str:
    """A figure beside its limit and its target."""
    limit, target = row["limit"], row["target"]
    share = f"  {row['value'] / limit:5.0%} of {limit:.4g}" if limit else ""
    verdict = "" if target is None else f"  {'meets' if row['met'] else 'MISSES'} {target:.4g}"
    return f"{row['name']:52} {row['value']:10.4g} {row['unit']}{share}{verdict}"


def _in_words(error: Exception) -> str:
    """A fault's own words, or what an unforeseen error says of itself."""
    return str(error) if isinstance(error, Fault) else "".join(traceback.format_exception(error))
