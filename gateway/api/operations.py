"""Health and metrics: for load balancers and Prometheus, without a key."""

from __future__ import annotations

import msgspec
from litestar import Response
from litestar.di import NamedDependency
from litestar.params import SkipValidation
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from gateway.api.auth import OPEN
from gateway.api.context import Api, ApiContext
from gateway.api.documentation import answers
from gateway.api.replies import json_reply
from gateway.api.responses import ErrorObject
from gateway.api.routes import readable
from gateway.errors import retry_after

Registry = NamedDependency[SkipValidation[CollectorRegistry]]


class Liveness(msgspec.Struct):
    """The process answers."""

    status: str = "alive"


class ModelHealth(msgspec.Struct):
    """Live workers of one model."""

    model: str
    ready: bool
    prefill_workers: int
    decode_workers: int


class Health(msgspec.Struct):
    """Whether at least one model can be served from end to end; `error` says why not."""

    status: str
    models: list[ModelHealth]
    error: ErrorObject | None = None


@readable("/health/live", opt={OPEN: True}, summary="Is the process alive", tags=["Operations"])
async def live() -> Liveness:
    """200 as long as the gateway answers at all."""
    return Liveness()


@readable(
    ["/health/ready", "/health"],
    opt={OPEN: True},
    summary="Can requests be served",
    tags=["Operations"],
    responses=answers(Health),
)
async def ready(api: Api) -> Response[bytes]:
    """200 while some model has a prefill and a decode worker, else 503 with `retry-after`."""
    health = _health(api)
    if health.error is None:
        return json_reply(health)
    return json_reply(health, status=503, headers=retry_after(1))


@readable("/metrics", opt={OPEN: True}, summary="Prometheus metrics", tags=["Operations"], media_type="text/plain")
async def metrics(registry: Registry) -> Response[bytes]:
    """Metrics of this gateway and, through their heartbeats, of all workers."""
    return Response(content=generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})


def _health(api: ApiContext) -> Health:
    readiness = api.pipeline.readiness()
    models = [ModelHealth(entry.model, entry.ready, entry.num_prefill, entry.num_decode) for entry in readiness.models]
    if readiness.ready:
        return Health("ready", models)
    return Health(
        "unavailable",
        models,
        ErrorObject(
            "No model has both a prefill and a decode worker.", type="server_error", code="service_unavailable"
        ),
    )
