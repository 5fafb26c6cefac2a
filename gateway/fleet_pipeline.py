"""The pipeline as the HTTP half sees it, made of catalog and request table."""

from __future__ import annotations

from collections.abc import Sequence

from fleet.types import Passport, PeerRef, Pooling, SamplingParams
from gateway.catalog import Catalog
from gateway.pipeline import Generation, Readiness, ServedModel
from gateway.requests import RequestTable


class FleetPipeline:
    """Implements `gateway.pipeline.Pipeline`."""

    def __init__(self, *, me: PeerRef, catalog: Catalog, table: RequestTable) -> None:
        self._me = me
        self._catalog = catalog
        self._table = table

    def models(self) -> Sequence[ServedModel]:
        """Every model known, ready or not."""
        return self._catalog.models()

    def model(self, name: str) -> ServedModel | None:
        """The model of this name or alias."""
        return self._catalog.model(name)

    def check_room(self, model: ServedModel, num_sequences: int, *, priority: int) -> None:
        """Refuse early what would be refused; see the Protocol."""
        self._table.check_room(model.name, num_sequences, priority=priority)

    def require_room(self, model: ServedModel, num_sequences: int, *, priority: int) -> None:
        """See that so many sequences would be admitted now; see the Protocol."""
        self._table.require_room(model.name, num_sequences, priority=priority)

    async def submit(
        self,
        *,
        model: ServedModel,
        prompt_ids: list[int],
        params: SamplingParams,
        request_id: str,
        cache_salt: str = "",
        priority: int = 0,
        pooling: Pooling | None = None,
        output_ids: Sequence[int] = (),
        affinity: str = "",
    ) -> Generation:
        """Admit one sequence and start it; see the Protocol."""
        passport = Passport(
            request_id=request_id,
            epoch=0,
            model=model.name,
            token_ids=[*prompt_ids, *output_ids] if output_ids else prompt_ids,
            prompt_len=len(prompt_ids),
            params=params,
            gateway=self._me,
            cache_salt=cache_salt,
            priority=priority,
            pooling=pooling,
        )
        return self._table.admit(passport, affinity=affinity)

    def readiness(self) -> Readiness:
        """Worker counts per model."""
        return self._catalog.readiness()
