"""Processes of a bench: bounded, heard, and gone afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import child_process
import psutil
import pytest
from stage_results import Fault
from stages import Clock

BENCH = Path(child_process.__file__).parent


def gone(pid: int, within_s: float = 10.0) -> bool:
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_lines_are_heard_as_they_come_and_the_end_too(tmp_path: Path) -> None:
    heard: list[str] = []
    words = ["-c", "print('one', flush=True); print('two'); print('three', end='')"]
    said = child_process.run(words, Clock(30), tmp_path / "log", on_line=heard.append)
    assert heard == ["one", "two", "three"]
    assert said.split() == heard


def test_json_is_found_before_a_librarys_last_words(tmp_path: Path) -> None:
    words = ["-c", "import sys; print('{\"a\": 1}', flush=True); print('[W] profiler: bye', file=sys.stderr)"]
    assert child_process.run_for_json(words, Clock(30), tmp_path / "log") == {"a": 1}
    with pytest.raises(Fault, match="no line of JSON"):
        child_process.run_for_json(["-c", "print('hello')"], Clock(30), tmp_path / "log")


def test_a_failure_brings_the_end_of_what_was_said(tmp_path: Path) -> None:
    with pytest.raises(Fault, match=r"exit status 1(.|\n)*no such kernel"):
        child_process.run(["-c", "print('x' * 9000); raise SystemExit('no such kernel')"], Clock(30), tmp_path / "log")


def test_out_of_time_a_process_ends_with_what_it_started(tmp_path: Path) -> None:
    pids: list[int] = []
    code = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    code += "start_new_session=True); print(child.pid, flush=True); child.wait()"

    class UntilSpoken(Clock):
        @property
        def left_s(self) -> float:
            return 0.0 if pids else super().left_s

    with pytest.raises(Fault, match="time was up"):
        child_process.run(["-c", code], UntilSpoken(60), tmp_path / "log", on_line=lambda line: pids.append(int(line)))
    assert gone(pids[0])


@pytest.mark.parametrize("hint", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_bench_however_it_ends(tmp_path: Path, hint: signal.Signals) -> None:
    bench = tmp_path / "bench.py"
    bench.write_text(
        f"""
import signal, sys
sys.path.insert(0, {str(BENCH)!r})
import child_process
from pathlib import Path
from stages import Clock

def leave(*_):
    raise SystemExit(143)

child_process.adopt_orphans()
signal.signal(signal.SIGTERM, leave)
words = ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
try:
    child_process.run(words, Clock(60), Path({str(tmp_path / "log")!r}), on_line=lambda line: print(line, flush=True))
finally:
    child_process.end_all()
"""
    )
    with subprocess.Popen([sys.executable, str(bench)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(hint)
        assert process.wait(20) in (143, -signal.SIGKILL)
    assert gone(child)


def test_orphans_are_ended_with_the_rest(tmp_path: Path) -> None:
    bench = tmp_path / "bench.py"
    bench.write_text(
        f"""
import subprocess, sys
sys.path.insert(0, {str(BENCH)!r})
import child_process, psutil

child_process.adopt_orphans()
sleeper = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
sleeper += "start_new_session=True, stdout=-3, stderr=-3).pid)"
said = subprocess.run([sys.executable, "-c", sleeper], capture_output=True, text=True).stdout  # it has left an orphan
assert psutil.pid_exists(int(said))
child_process.end_all()
print(psutil.pid_exists(int(said)))
"""
    )
    done = subprocess.run([sys.executable, str(bench)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False"]
