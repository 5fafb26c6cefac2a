"""Reclaim notices: the provider says that it will take this machine back, and mostly when.

Each cloud says so at an address that only its own machines reach, and that must be asked again and again:

- aws: spot instance action, by instance metadata version 2 (a session token first)
  https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
- gcp: `preempted`, 30 s before the end
  https://cloud.google.com/compute/docs/instances/create-use-spot
- azure: scheduled events of this very machine
  https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
- url: any address that answers 200 with a body once the machine is to go; a time in it is the deadline
- a file that appears; likewise
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fleet.departure import Departure
from fleet.errors import SettingsError
from fleet.logs import get_logger
from fleet.messages import MoveReason
from fleet.service_settings import WorkerSettings

if TYPE_CHECKING:
    import httpx

POLL_S = 1.0
ANSWER_S = 2.0
MARGIN_S = 1.0
"""Taken off a deadline, for saying goodbye and for clocks that differ."""
GCP_GRACE_S = 30.0
TOKEN_TTL_S = 21_600
_AZURE_ENDS = {"Preempt", "Terminate", "Reboot", "Redeploy"}

_log = get_logger("reclaim")


class Notice(NamedTuple):
    """The machine will go, at `at_s` (Unix time) if the notice says when."""

    text: str
    at_s: float | None


class Source(Protocol):
    """Somewhere to ask."""

    async def ask(self) -> Notice | None:
        """The notice, if there is one by now. Raises OSError, ValueError or httpx.HTTPError if there is no telling."""


def parse_time(text: str) -> float | None:
    """The Unix time that a notice names: ISO 8601, RFC 9110, or the key `time` of a JSON object; else None."""
    text = text.strip()
    try:
        loaded = json.loads(text)
    except ValueError:
        loaded = text
    if isinstance(loaded, dict):
        loaded = loaded.get("time")
    if isinstance(loaded, str):
        for parse in (datetime.fromisoformat, parsedate_to_datetime):
            try:
                moment = parse(loaded)
            except ValueError:
                continue
            return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
    return None


class FileSource:
    """A file that appears, such as one that a node's agent writes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def ask(self) -> Notice | None:
        """See `Source`."""
        try:
            text = await asyncio.to_thread(self._path.read_text, encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None
        return Notice(f"file {self._path}", parse_time(text[:4096]))


class UrlSource:
    """Any address that answers 200 with a body once the machine is to go."""

    def __init__(self, http: httpx.AsyncClient, url: str) -> None:
        self._http = http
        self._url = url

    async def ask(self) -> Notice | None:
        """See `Source`."""
        answer = await self._http.get(self._url)
        if answer.status_code == 200 and answer.text.strip():
            return Notice("reclaim URL", parse_time(answer.text))
        return None


class AwsSource:
    """Spot instance action; 404 until there is one."""

    def __init__(self, http: httpx.AsyncClient, base: str) -> None:
        self._http = http
        self._base = base
        self._token = ""

    async def ask(self) -> Notice | None:
        """See `Source`."""
        if not self._token:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
            granted = await self._http.put(f"{self._base}/latest/api/token", headers=header)
            granted.raise_for_status()
            self._token = granted.text
        answer = await self._http.get(
            f"{self._base}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": self._token}
        )
        if answer.status_code == 401:
            self._token = ""
        if answer.status_code != 200:
            return None
        return Notice(f"aws: {answer.json().get('action')}", parse_time(answer.text))


class GcpSource:
    """`preempted`: TRUE from the notice on."""

    def __init__(self, http: httpx.AsyncClient, base: str) -> None:
        self._http = http
        self._base = base

    async def ask(self) -> Notice | None:
        """See `Source`."""
        url = f"{self._base}/computeMetadata/v1/instance/preempted"
        answer = await self._http.get(url, headers={"Metadata-Flavor": "Google"})
        if answer.status_code == 200 and answer.text.strip() == "TRUE":
            return Notice("gcp: preempted", time.time() + GCP_GRACE_S)
        return None


class AzureSource:
    """Scheduled events. They are of a whole set of machines; only those of this one count."""

    def __init__(self, http: httpx.AsyncClient, base: str) -> None:
        self._http = http
        self._base = base
        self._me = ""

    async def ask(self) -> Notice | None:
        """See `Source`."""
        header = {"Metadata": "true"}
        if not self._me:
            url = f"{self._base}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            named = await self._http.get(url, headers=header)
            named.raise_for_status()
            self._me = named.text.strip()
        url = f"{self._base}/metadata/scheduledevents?api-version=2020-07-01"
        answer = await self._http.get(url, headers=header)
        answer.raise_for_status()
        for event in answer.json().get("Events", []):
            if event.get("EventType") in _AZURE_ENDS and self._me in event.get("Resources", []):
                not_before: Any = event.get("NotBefore") or ""
                return Notice(f"azure: {event['EventType']}", parse_time(not_before))
        return None


_CLOUDS: Mapping[str, tuple[type[AwsSource | GcpSource | AzureSource | UrlSource], str]] = {
    "aws": (AwsSource, "http://169.254.169.254"),
    "gcp": (GcpSource, "http://metadata.google.internal"),
    "azure": (AzureSource, "http://169.254.169.254"),
    "url": (UrlSource, ""),
}


async def watch(settings: WorkerSettings, departure: Departure) -> None:
    """Ask every configured source until one has a notice, then ask the worker to leave. Ends without sources.

    A source that cannot be asked is said once and asked again. A task of the service's group.
    """
    async with AsyncExitStack() as stack:
        sources: list[Source] = [FileSource(Path(settings.reclaim_file))] if settings.reclaim_file else []
        if settings.reclaim_notice:
            import httpx  # workers without this setting start without it

            kind, base = _CLOUDS[settings.reclaim_notice]
            # Metadata services must be reached directly, whatever proxy the environment names.
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=ANSWER_S, trust_env=False))
            sources.append(kind(http, (settings.reclaim_url or base).rstrip("/")))
        troubled: set[int] = set()
        while sources:
            for number, source in enumerate(sources):
                notice = await _ask(source, number, troubled)
                if notice is not None:
                    within_s = None if notice.at_s is None else notice.at_s - time.time() - MARGIN_S
                    departure.ask(f"reclaim notice, {notice.text}", reason=MoveReason.RECLAIM, within_s=within_s)
                    return
            await asyncio.sleep(POLL_S)


async def _ask(source: Source, number: int, troubled: set[int]) -> Notice | None:
    try:
        notice = await source.ask()
    except Exception as error:  # noqa: BLE001 - whatever a metadata service answers, the worker works on
        if number not in troubled:
            _log.warning("cannot ask for reclaim notices", source=type(source).__name__, error=repr(error))
        troubled.add(number)
        return None
    troubled.discard(number)
    return notice


def check(settings: WorkerSettings) -> None:
    """Whether the settings of notices fit together.

    Raises:
        SettingsError: they do not; the message names the variable.
    """
    if settings.reclaim_notice and settings.reclaim_notice not in _CLOUDS:
        known = ", ".join(_CLOUDS)
        raise SettingsError(f"BATON_RECLAIM_NOTICE = {settings.reclaim_notice!r} is none of {known}")
    if settings.reclaim_notice == "url" and not settings.reclaim_url:
        raise SettingsError("BATON_RECLAIM_NOTICE = 'url' needs BATON_RECLAIM_URL")
