"""Stages of a bench: one's fault is not the next one's, and the result file holds whatever was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_results import Booking, Fault, Results
from stages import LEAST_S, Clock, Stage, choose, run

Work = Callable[[Booking, Clock], None]
MACHINE = {"gpu": "none", "sharing": "time slices"}


def figure(value: float) -> Work:
    return lambda booking, _clock: booking.add("speed", value, "tokens/s", limit=10.0, target=5.0)


def fail(error: BaseException) -> Work:
    def work(booking: Booking, _clock: Clock) -> None:
        booking.add("before", 1.0, "s")
        raise error

    return work


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "gpu.json"


def stages_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())["stages"]
    return found


def test_a_fault_is_booked_and_the_next_stage_goes_on(path: Path) -> None:
    results = Results(path, MACHINE)
    stages = [
        Stage("first", 9, fail(Fault("no such kernel\nits log"))),
        Stage("second", 9, fail(RuntimeError("unforeseen"))),
        Stage("third", 9, figure(6.0)),
    ]
    run(stages, results, Clock(60))
    found = stages_of(path)
    assert [entry["state"] for entry in found.values()] == ["failed", "failed", "done"]
    assert found["first"]["faults"] == ["no such kernel\nits log"]
    assert found["first"]["rows"][0]["name"] == "before"
    assert "Traceback" in found["second"]["faults"][0]
    assert found["third"]["rows"][0] == {
        "name": "speed", "value": 6.0, "unit": "tokens/s", "limit": 10.0, "target": 5.0, "met": True
    }  # fmt: skip
    assert found["third"]["sharing"] == "time slices"
    assert results.failed == ["first", "second"]
    assert "FAULT: no such kernel" in results.table()
    assert "60% of 10  meets 5" in results.table()


def test_the_file_holds_a_figure_while_its_stage_still_runs(path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def work(booking: Booking, _clock: Clock) -> None:
        booking.add("speed", 1.0, "s")
        booking.say("a line")
        seen.append(stages_of(path)["only"])

    run([Stage("only", 9, work)], Results(path, MACHINE), Clock(60))
    assert (seen[0]["state"], seen[0]["rows"][0]["value"], seen[0]["lines"]) == ("running", 1.0, ["a line"])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run_leaves_what_it_had(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run([Stage("first", 9, figure(1.0)), Stage("second", 9, fail(error))], Results(path, MACHINE), Clock(60))
    found = stages_of(path)
    assert found["first"]["state"] == "done"
    assert found["second"]["state"] == "failed"
    assert found["second"]["faults"] == [f"interrupted: {type(error).__name__}"]


def test_limits_are_a_stages_own_within_the_budget(path: Path) -> None:
    left: dict[str, float] = {}

    def work(name: str) -> Work:
        return lambda _booking, clock: left.update({name: clock.left_s})

    def prepare(clock: Clock) -> None:
        left["prepared"] = clock.left_s

    stages = [Stage("short", 7, work("short"), (prepare, 11)), Stage("long", 1000, work("long"))]
    run(stages, Results(path, MACHINE), Clock(50))
    assert left["short"] == pytest.approx(7, abs=1)
    assert left["prepared"] == pytest.approx(11, abs=1)
    assert left["long"] == pytest.approx(50, abs=2)


def test_what_the_budget_leaves_no_time_for_is_said_and_resumed(path: Path) -> None:
    ran: list[str] = []

    def work(name: str) -> Work:
        return lambda _booking, _clock: ran.append(name)

    stages = [Stage("first", 9, work("first")), Stage("second", 9, work("second"))]
    run(stages, Results(path, MACHINE), Clock(LEAST_S / 2))
    assert ran == []
    assert "--resume" in stages_of(path)["first"]["faults"][0]
    results = Results(path, MACHINE, resume=True)
    run(choose(stages, results, only=[], skip=["second"]), results, Clock(60))
    results = Results(path, MACHINE, resume=True)
    run(choose(stages, results, only=[], skip=[]), results, Clock(60))
    assert ran == ["first", "second"]
    assert Results(path, MACHINE, resume=True).failed == []


def test_what_a_stage_needs_and_does_not_get_is_its_fault(path: Path) -> None:
    def refuse(_clock: Clock) -> None:
        raise Fault("no fleet")

    run([Stage("first", 9, figure(1.0), (refuse, 5))], Results(path, MACHINE), Clock(60))
    assert stages_of(path)["first"]["faults"] == ["no fleet"]
    assert stages_of(path)["first"]["rows"] == []


def test_resuming_replaces_named_stages_and_keeps_the_others(path: Path) -> None:
    stages = [Stage("first", 9, figure(1.0)), Stage("second", 9, figure(2.0))]
    run(stages, Results(path, MACHINE), Clock(60))
    again = [Stage("first", 9, figure(7.0)), Stage("second", 9, figure(8.0))]
    results = Results(path, {"gpu": "same"}, resume=True)
    assert choose(again, results, only=[], skip=[]) == []
    run(choose(again, results, only=["first"], skip=[]), results, Clock(60))
    assert results.value("first", "speed") == 7.0
    assert results.value("second", "speed") == 2.0
    assert results.value("third", "speed") is None
    assert json.loads(path.read_text())["machine"] == {"gpu": "same"}
    fresh = Results(path, MACHINE)
    assert choose(again, fresh, only=[], skip=["first"]) == again[1:]
    with pytest.raises(ValueError, match="no stage thrid; there are first, second"):
        choose(again, fresh, only=["thrid"], skip=[])


def test_a_file_of_another_kind_is_not_resumed(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no result file"):
        Results(path, MACHINE, resume=True)
