"""`baton keys` on a real Redis, named or found through the note of a running fleet."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest
import redis as blocking_redis
from support.redis_server import RedisServer

from baton.cli import main
from baton.notes import KEPT_RUNS, FleetNote, NoteBook, own_creation_s
from fleet.keys import ApiKey, KeyRegistry, hash_secret
from fleet.redis_client import connect


@pytest.fixture
def url(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """An empty Redis, and a user without settings and without running fleets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("BATON_REDIS_URL", raising=False)
    with blocking_redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def notes(tmp_path: Path) -> NoteBook:
    return NoteBook(tmp_path / "state" / "baton")


def _stored(url: str, namespace: str = "baton") -> dict[str, ApiKey]:
    async def read() -> dict[str, ApiKey]:
        client = connect(url)
        try:
            return await KeyRegistry(client, namespace=namespace).by_hash()
        finally:
            await client.aclose()

    return asyncio.run(read())


def _note(url: str, pid: int | None = None, created_s: float | None = None) -> FleetNote:
    pid = os.getpid() if pid is None else pid
    created_s = own_creation_s(os.getpid()) if created_s is None else created_s
    return FleetNote(
        pid=pid, created_s=created_s, redis_url=url, namespace="mine", api_url="http://h/v1", run_dir="/nowhere"
    )


def test_create_list_and_revoke(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--redis-url", url]
    assert main(["keys", "create", "bob", "--rpm", "10", "--tpm", "99", "--models", "a, b", *at]) == 0
    secret = capsys.readouterr().out.splitlines()[0]
    key = _stored(url)[hash_secret(secret)]
    assert (key.name, key.requests_per_minute, key.tokens_per_minute, key.models) == ("bob", 10, 99, ("a", "b"))
    assert main(["keys", "list", *at]) == 0
    listed = capsys.readouterr().out
    assert key.key_id in listed
    assert "bob" in listed
    assert secret not in listed
    assert main(["keys", "revoke", key.key_id, *at]) == 0
    assert _stored(url) == {}
    assert main(["keys", "revoke", key.key_id, *at]) == 1
    assert f"there is no key {key.key_id}" in capsys.readouterr().err


def test_a_key_may_have_the_admin_scope(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "ann", "--admin", "--redis-url", url]) == 0
    (key,) = _stored(url).values()
    assert key.admin
    capsys.readouterr()
    assert main(["keys", "list", "--redis-url", url]) == 0
    assert "admin" in capsys.readouterr().out


def test_json_for_scripts(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "bob", "--json", "--redis-url", url]) == 0
    made = msgspec.json.decode(capsys.readouterr().out)
    assert hash_secret(made["secret"]) in _stored(url)
    assert main(["keys", "list", "--json", "--redis-url", url]) == 0
    assert [key["key_id"] for key in msgspec.json.decode(capsys.readouterr().out)] == [made["key_id"]]


def test_a_running_fleet_is_found_by_its_note(url: str, notes: NoteBook, capsys: pytest.CaptureFixture[str]) -> None:
    notes.write(_note(url))
    assert (notes.path(os.getpid()).stat().st_mode & 0o777) == 0o600
    assert main(["keys", "create", "bob"]) == 0
    assert len(_stored(url, "mine")) == 1
    assert "only time" in capsys.readouterr().out


@pytest.mark.usefixtures("url")
def test_without_redis_and_fleet_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "list"]) == 1
    assert "no running `baton up` found: start one, or name a Redis" in capsys.readouterr().err


@pytest.mark.usefixtures("url")
def test_a_silent_redis_is_an_error_not_a_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["keys", "list", "--redis-url", f"unix://{tmp_path}/no.sock"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_several_fleets_have_to_be_told_apart(url: str, notes: NoteBook, capsys: pytest.CaptureFixture[str]) -> None:
    parent = os.getppid()
    notes.write(_note(url))
    notes.write(_note("unix:///other", parent, own_creation_s(parent)))
    assert main(["keys", "list"]) == 1
    assert "several fleets run here; choose one by --redis-url" in capsys.readouterr().err


def test_notes_of_dead_processes_are_removed(url: str, notes: NoteBook) -> None:
    notes.write(_note(url, created_s=own_creation_s(os.getpid()) - 100))
    (notes.path(1).parent / "garbage.json").write_text("{")
    assert notes.living() == []
    assert list(notes.path(1).parent.iterdir()) == []


def test_only_the_last_runs_keep_their_logs(notes: NoteBook) -> None:
    made = [notes.new_run_dir(pid) for pid in range(KEPT_RUNS + 3)]
    assert sorted(made[0].parent.iterdir()) == sorted(made)[-KEPT_RUNS:]
