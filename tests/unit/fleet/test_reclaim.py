"""Reclaim notices as the clouds word them, the admin socket, and what they make of a worker's departure."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from litestar.testing import TestClient
from support.records import make_record

from fleet import reclaim
from fleet.admin import admin_token, build_app, serve_admin
from fleet.departure import Departure
from fleet.errors import SettingsError
from fleet.messages import MoveReason
from fleet.reclaim import AwsSource, AzureSource, FileSource, GcpSource, Notice, UrlSource, parse_time
from fleet.service_settings import DecodeSettings
from fleet.types import PeerRef

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
RECORD = make_record(PeerRef("d", 1, "tcp://d"))


def http(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.MockTransport(answer))


def departure(grace_s: float = 30.0) -> Departure:
    return Departure(asyncio.Event(), grace_s=grace_s)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2030-01-01T12:00:00Z", NOON),
        ('{"action": "terminate", "time": "2030-01-01T12:00:00Z"}', NOON),
        (format_datetime(NOON, usegmt=True), NOON),
        ("2030-01-01 12:00", NOON),
        ("soon", None),
        ("", None),
        ('{"time": 5}', None),
        ("[1]", None),
    ],
)
def test_times_that_notices_name(text: str, moment: datetime | None) -> None:
    assert parse_time(text) == (None if moment is None else moment.timestamp())


async def test_aws_asks_for_a_token_first_and_again_when_it_has_expired() -> None:
    tokens = iter(["old", "new"])
    notice = {"action": "terminate", "time": "2030-01-01T12:00:00Z"}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            assert request.url.path == "/latest/api/token"
            assert request.headers["x-aws-ec2-metadata-token-ttl-seconds"] == "21600"
            return httpx.Response(200, text=next(tokens))
        assert request.url.path == "/latest/meta-data/spot/instance-action"
        if request.headers["x-aws-ec2-metadata-token"] == "old":
            return next(old)
        return httpx.Response(200, json=notice)

    old = iter([httpx.Response(404), httpx.Response(401)])
    async with http(answer) as client:
        source = AwsSource(client, "http://imds")
        assert await source.ask() is None
        assert await source.ask() is None
        assert await source.ask() == Notice("aws: terminate", NOON.timestamp())


async def test_gcp_says_true_thirty_seconds_before() -> None:
    words = iter(["FALSE", "TRUE"])

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["metadata-flavor"] == "Google"
        return httpx.Response(200, text=next(words))

    async with http(answer) as client:
        source = GcpSource(client, "http://metadata")
        assert await source.ask() is None
        notice = await source.ask()
    assert notice is not None
    assert notice.at_s == pytest.approx(time.time() + 30, abs=5)


async def test_azure_minds_its_own_machine_alone() -> None:
    event = {"EventType": "Preempt", "Resources": ["other"], "NotBefore": format_datetime(NOON, usegmt=True)}
    events = iter(
        [[], [event], [{**event, "EventType": "Freeze", "Resources": ["me"]}], [{**event, "Resources": ["me"]}]]
    )

    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["metadata"] == "true"
        if request.url.path.endswith("/compute/name"):
            return httpx.Response(200, text="me")
        return httpx.Response(200, json={"DocumentIncarnation": 1, "Events": next(events)})

    async with http(answer) as client:
        source = AzureSource(client, "http://imds")
        assert [await source.ask() for _ in range(3)] == [None, None, None]
        assert await source.ask() == Notice("azure: Preempt", NOON.timestamp())


async def test_a_url_or_a_file_says_it_with_a_body_or_by_being_there(tmp_path: Path) -> None:
    answers = iter([httpx.Response(404), httpx.Response(200, text=""), httpx.Response(200, text="going")])
    async with http(lambda _: next(answers)) as client:
        source = UrlSource(client, "http://any/where")
        assert [await source.ask() for _ in range(2)] == [None, None]
        assert await source.ask() == Notice("reclaim URL", None)
    path = tmp_path / "notice"
    assert await FileSource(path).ask() is None
    path.write_text(json.dumps({"time": "2030-01-01T12:00:00Z"}))
    assert await FileSource(path).ask() == Notice(f"file {path}", NOON.timestamp())


async def test_a_notice_makes_the_worker_leave_by_its_own_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reclaim, "POLL_S", 0.01)
    path = tmp_path / "notice"
    leaving = departure()
    watching = asyncio.create_task(reclaim.watch(DecodeSettings(reclaim_file=str(path)), leaving))
    path.mkdir()  # cannot be read: said, and asked again
    await asyncio.sleep(0.05)
    assert not leaving.is_asked
    path.rmdir()
    path.write_text(datetime.fromtimestamp(time.time() + 11, UTC).isoformat())
    await asyncio.wait_for(leaving.wait(), 5)
    await watching
    assert leaving.reason is MoveReason.RECLAIM
    assert leaving.left_s == pytest.approx(10, abs=2)
    leaving.ask("baton drain", within_s=60)
    assert leaving.left_s < 12
    leaving.ask("in a hurry", within_s=3)
    assert leaving.left_s < 4
    assert leaving.reason is MoveReason.RECLAIM


def test_settings_that_do_not_fit_name_themselves() -> None:
    for settings, named in (
        (DecodeSettings(reclaim_notice="azur"), "BATON_RECLAIM_NOTICE"),
        (DecodeSettings(reclaim_notice="url"), "BATON_RECLAIM_URL"),
    ):
        with pytest.raises(SettingsError, match=named):
            reclaim.check(settings)
    for cloud in ("aws", "gcp", "azure"):
        reclaim.check(DecodeSettings(reclaim_notice=cloud))


@pytest.mark.parametrize("address", ["9000", "nowhere:port", "0.0.0.0:0"])
async def test_an_admin_address_that_cannot_be_stops_the_start(address: str) -> None:
    with pytest.raises(SettingsError, match="BATON_ADMIN_ADDRESS"):
        await serve_admin(DecodeSettings(admin_address=address), lambda: RECORD, departure())


def test_the_admin_socket_shows_and_drains_whoever_may_ask() -> None:
    leaving = departure()
    token = admin_token("a secret of the cluster, long enough")
    with TestClient(build_app(lambda: RECORD, leaving, token=token)) as client:
        assert client.get("/status").status_code == 401
        assert client.post("/drain", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert not leaving.is_asked
        client.headers["authorization"] = f"Bearer {token}"
        assert client.get("/status").json()["draining"] is False
        assert client.post("/drain", json={"within_s": -1}).status_code == 400
        assert client.post("/drain", json={"untold": 1}).status_code == 400
        answer = client.post("/drain", json={"reason": "spot", "within_s": 12, "reclaim": True})
    assert (answer.status_code, answer.json()["draining"]) == (202, True)
    assert leaving.left_s <= 12
    assert leaving.reason is MoveReason.RECLAIM
