"""The models that the fleet serves, each with the card that its workers published."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable

from fleet.logs import get_logger
from fleet.model_files import ModelFiles
from fleet.redis_client import UNAVAILABLE
from fleet.types import Role, WorkerRecord
from gateway.directory import Directory, Worker
from gateway.errors import CardError
from gateway.pipeline import ModelReadiness, Readiness, ServedModel
from gateway.text.card import ModelCard
from gateway.text.message_syntax import SyntaxChoices

RETRY_S = 0.5

_log = get_logger("catalog")


class Catalog:
    """Served models by name. A model stays known when its workers leave, so that its clients hear 503 and not 404."""

    def __init__(self, directory: Directory, files: ModelFiles, syntaxes: SyntaxChoices) -> None:
        self._directory = directory
        self._files = files
        self._syntaxes = syntaxes
        self._models: dict[str, ServedModel] = {}
        self._digests: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._wanted: asyncio.Queue[WorkerRecord] = asyncio.Queue()

    def models(self) -> list[ServedModel]:
        """All known models, by name."""
        return [self._as_of_now(self._models[name]) for name in sorted(self._models)]

    def model(self, name: str) -> ServedModel | None:
        """The model of this name or alias."""
        found = self._models.get(self._names.get(name, ""))
        return self._as_of_now(found) if found is not None else None

    def _as_of_now(self, model: ServedModel) -> ServedModel:
        """With readiness and length of the workers that live now: the shortest of them is what can be promised."""
        workers = self._directory.workers(model=model.name)
        return ServedModel(
            name=model.name,
            created=model.created,
            max_model_len=min((w.record.max_model_len for w in workers), default=model.max_model_len),
            card=model.card,
            aliases=model.aliases,
            ready=_count(model.name, workers).ready,
        )

    def readiness(self) -> Readiness:
        """Workers per known model."""
        return Readiness(
            models=tuple(_count(name, self._directory.workers(model=name)) for name in sorted(self._models))
        )

    def want(self, record: WorkerRecord) -> None:
        """A worker joined; have its model's card loaded soon."""
        if self._digests.get(record.model) != record.model_files:
            self._wanted.put_nowait(record)

    async def run(self) -> None:
        """Load wanted cards until cancelled; a task of the service's group."""
        while True:
            record = await self._wanted.get()
            if self._digests.get(record.model) == record.model_files:
                continue
            try:
                published = await self._files.fetch(record.model_files)
            except UNAVAILABLE:
                published = {}
            if not published:
                await asyncio.sleep(RETRY_S)
                if self._directory.get(record.peer) is not None:
                    self._wanted.put_nowait(record)
                continue
            await self._load(record, published)

    async def _load(self, record: WorkerRecord, published: dict[str, bytes]) -> None:
        try:
            card = await asyncio.to_thread(ModelCard.from_files, published, self._syntaxes.of(record.model))
        except CardError as error:
            _log.error("model cannot be offered", model=record.model, error=str(error))
            return
        self._models[record.model] = ServedModel(
            name=record.model,
            created=int(record.started_at_s or time.time()),
            max_model_len=record.max_model_len,
            card=card,
            aliases=record.aliases,
        )
        self._digests[record.model] = record.model_files
        for name in (record.model, *record.aliases):
            self._names[name] = record.model
        _log.info("model offered", model=record.model)


def _count(model: str, workers: Iterable[Worker]) -> ModelReadiness:
    roles = Counter(worker.record.role for worker in workers)
    return ModelReadiness(model=model, num_prefill=roles[Role.PREFILL], num_decode=roles[Role.DECODE])
