"""Fleets of a bench, by stand-ins for `python -m baton` and `python -m loadtest`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import child_process
import psutil
import pytest
from fleet_process import Fleets, FleetSpec, HandOffs
from stage_results import Fault
from stages import Clock

FAKE_BATON = '''
import os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

if "--broken" in sys.argv:
    log = Path(os.environ["XDG_STATE_HOME"], "baton", "runs", "one", "decode-0.log")
    log.parent.mkdir(parents=True)
    log.write_text('[error] service failed error="no kernel image" kind=RuntimeError')
    sys.exit("decode-0 ended before it was ready")
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)  # a worker

class Gateway(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"/metrics": b"""baton_worker_hand_offs_total{outcome="given",transport="cuda_ipc",worker="a"} 3
baton_worker_hand_offs_total{outcome="given",transport="cuda_ipc",worker="b"} 1
baton_worker_hand_off_bytes_total{transport="cuda_ipc"} 5e+06
baton_worker_hand_off_copy_seconds_total{transport="cuda_ipc"} 0.25
baton_worker_hand_offs_total{outcome="refused",transport="tcp"} 2
baton_worker_hand_offs_total{outcome="given",transport="shm"} 0
"""}.get(self.path, b""))

    def do_POST(self):
        self.answer(b"{}", 500 if "--silent" in sys.argv else 200)

    def answer(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Gateway).serve_forever()
'''
FAKE_LOADTEST = """
import json, sys
sent, ok = map(int, sys.argv[1:3])
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    errors = {"timeout": sent - ok}
    json.dump({"summary": {"num_sent": sent, "num_ok": ok, "errors": errors, "output_tokens_per_s": 9.6}}, file)
"""


@pytest.fixture
def fleets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleets]:
    for name, code in (("baton", FAKE_BATON), ("loadtest", FAKE_LOADTEST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").write_text(code)
    monkeypatch.setattr(child_process, "ROOT", tmp_path)
    monkeypatch.setattr("fleet_process._STOP_S", 1.0)
    (tmp_path / "logs").mkdir()
    made = Fleets(tmp_path / "logs", {})
    yield made
    made.close()


def spec(name: str, *flags: str) -> FleetSpec:
    return FleetSpec(name, Path("/model"), flags)


def workers() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_fleet_stays_for_the_next_stage_and_ends_with_all_it_started(fleets: Fleets) -> None:
    before = workers()
    assert fleets.need(spec("main"), Clock(20)) is not None
    assert fleets.need(spec("main"), Clock(20)) is None
    assert fleets.load(Clock(20), "4", "4")["summary"]["num_ok"] == 4
    assert fleets.hand_offs() == {"cuda_ipc": HandOffs(4.0, 5e6, 0.25)}
    first = workers() - before
    assert len(first) == 2
    assert fleets.need(spec("other"), Clock(20)) is not None
    assert not first & workers()
    fleets.close()
    assert workers() == before
    with pytest.raises(Fault, match="no fleet runs"):
        fleets.load(Clock(20), "1", "1")


def test_one_that_does_not_come_up_is_tried_once(fleets: Fleets) -> None:
    with pytest.raises(Fault, match=r'(?s)main did not come up in \d+ s: "no kernel image"\n.*-- decode-0:'):
        fleets.need(spec("main", "--broken"), Clock(20))
    with pytest.raises(Fault, match="did not come up for an earlier stage"):
        fleets.need(spec("main", "--broken"), Clock(20))
    assert fleets.need(spec("other"), Clock(20)) is not None


@pytest.mark.parametrize(("flags", "is_replaced"), [((), False), (("--silent",), True)])
def test_one_that_failed_its_client_is_replaced_unless_it_answers(
    fleets: Fleets, flags: tuple[str, ...], is_replaced: bool
) -> None:
    fleets.need(spec("main", *flags), Clock(20))
    with pytest.raises(Fault, match=r"3 of 4 requests succeeded: \{'timeout': 1\}; 10 tokens/s"):
        fleets.load(Clock(20), "4", "3")
    assert (fleets.need(spec("main", *flags), Clock(20)) is not None) == is_replaced
