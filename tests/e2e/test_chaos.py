"""A short, seeded round of `make chaos`: the faults that nothing else here plays, with everything taken stock of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chaos.__main__ import main

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

FAULTS = (
    "kill -9 (decode)",
    "kill -9 at Commit (prefill)",
    "link silent (decode)",
    "Redis killed",
    "abort storm",
)


def test_nothing_is_lost_and_nothing_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "chaos.json"
    options = ["--seed", "7", "--rounds", "1", "--storm", "120", "--tokens", "80", "--json", str(record)]
    code = main([*options, "--faults", ",".join(FAULTS)])
    assert code == 0, capsys.readouterr().out
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    assert {row["fault"].partition(",")[0] for row in rows} == set(FAULTS)
    for row in rows:
        assert row["finished"] == row["streams"] == 16
        assert row["hit"] > 0
        assert (row["lost"], row["repeated"], row["pages leaked"], row["other leaks"]) == (0, 0, 0, 0)
    assert next(row for row in rows if row["fault"] == FAULTS[0])["replayed"] > 0
