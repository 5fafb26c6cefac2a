"""MPS where it may run, by a stand-in for NVIDIA's control program."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import card_sharing
import pytest

WORKS, FAILS = (sys.executable, "-c", ""), (sys.executable, "-c", "raise SystemExit('CUDA error 805')")


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program whose daemon keeps its standard output open, as one may that never lets a pipe's reader go."""
    program = tmp_path / card_sharing.CONTROL
    program.write_text(
        """#!/bin/sh
if [ "$1" = -d ]; then
    (while ! [ -e "$CUDA_MPS_PIPE_DIRECTORY/quit" ] && [ -d "$CUDA_MPS_PIPE_DIRECTORY" ]; do sleep 0.05; done) &
else
    cat > "$CUDA_MPS_PIPE_DIRECTORY/quit"
    cp "$CUDA_MPS_PIPE_DIRECTORY/quit" "$(dirname "$0")/said"
fi
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return program


def test_the_service_is_used_and_ended(control: Path) -> None:
    with card_sharing.shared_card(trial=WORKS) as (environment, sharing):
        assert sharing == "MPS"
        assert Path(environment["CUDA_MPS_PIPE_DIRECTORY"]).is_dir()
    assert control.with_name("said").read_text() == "quit -t 5\n"
    assert not Path(environment["CUDA_MPS_PIPE_DIRECTORY"]).exists()


def test_where_it_does_not_work_processes_take_turns(control: Path) -> None:
    with card_sharing.shared_card(trial=FAILS) as (environment, sharing):
        assert sharing == "time slices (MPS: CUDA error 805)"
        assert "CUDA_MPS_PIPE_DIRECTORY" not in environment
    assert control.with_name("said").exists()  # the half that ran is ended
    with pytest.raises(card_sharing.SharingRefused, match="805"), card_sharing.shared_card("mps", trial=FAILS):
        pass


def test_a_program_that_fails_or_is_not_there_is_a_reason(control: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control.write_text("#!/bin/sh\necho 'Insufficient permissions'\nexit 1\n")
    with card_sharing.shared_card(trial=WORKS) as (_, sharing):
        assert sharing == "time slices (MPS: Insufficient permissions)"
    control.unlink()
    with card_sharing.shared_card(trial=WORKS) as (_, sharing):
        assert "is not here" in sharing
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    with card_sharing.shared_card(trial=WORKS) as (_, sharing):
        assert sharing == "MPS, found running"
    with card_sharing.shared_card("time-slices", trial=WORKS) as (_, sharing):
        assert sharing == "time slices"
