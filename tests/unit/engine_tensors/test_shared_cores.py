"""Cores that workers lend each other: counted, given back, and never lent to the dead."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.activity import Activity
from engine.cpu.shared_cores import SharedCores
from engine.plan import StepPlan
from fleet.errors import SettingsError

NEIGHBOUR = """
import sys
from pathlib import Path
from engine.cpu.shared_cores import SharedCores
cores = SharedCores(Path(sys.argv[1]), 1)
for line in sys.stdin:
    getattr(cores, line.strip())()
    print("done", flush=True)
"""


class Neighbour:
    """Another worker of the machine, told what to do."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, what: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def shared(tmp_path: Path, cores: int) -> Path:
    path = tmp_path / "cores"
    path.write_text(str(cores))
    return path


def test_an_idle_core_is_lent_and_comes_back_when_its_worker_has_work_or_is_dead(tmp_path: Path) -> None:
    path = shared(tmp_path, 4)
    ours, other, third = SharedCores(path, 1), Neighbour(path), Neighbour(path)

    def seen() -> int:
        ours.refresh()
        return torch.get_num_threads()

    try:
        ours.work()
        assert seen() == 4
        other.do("work")
        assert seen() == 2
        third.do("work")
        assert seen() == 1
        other.do("rest")
        assert seen() == 2
        third.end()
        assert seen() == 4
    finally:
        ours.close()
        other.end()
        third.end()


def test_what_can_wait_waits_for_every_worker_of_the_machine(tmp_path: Path) -> None:
    path = shared(tmp_path, 2)
    ours, other = Activity(SharedCores(path, 1)), Neighbour(path)
    try:
        assert not ours.is_any()
        ours.show(StepPlan(()))
        assert ours.is_any()
        other.do("work")
        ours.show(None)
        assert ours.is_any()
        other.do("rest")
        assert not ours.is_any()
    finally:
        ours.close()
        other.end()
    alone = Activity(None)
    alone.show(StepPlan(()))
    assert alone.is_any()
    alone.show(None)
    assert not alone.is_any()
    alone.close()


def test_nobody_gets_less_than_what_is_its_own(tmp_path: Path) -> None:
    path = shared(tmp_path, 2)
    ours, other = SharedCores(path, 2), Neighbour(path)
    try:
        other.do("work")
        ours.work()
        ours.refresh()
        assert torch.get_num_threads() == 2
    finally:
        ours.close()
        other.end()


@pytest.mark.parametrize("content", [None, "many"])
def test_a_file_that_says_no_number_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "cores"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match="BATON_SHARED_CORES"):
        SharedCores(path, 1)
