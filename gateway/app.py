"""The ASGI application, put together from its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.middleware import ASGIMiddleware
from prometheus_client import CollectorRegistry

from gateway.api import endpoints, operations
from gateway.api.auth import KeyGuard, KeyStore
from gateway.api.config import ApiConfig
from gateway.api.context import ApiContext
from gateway.api.documentation import document_bodies, openapi_config
from gateway.api.embeddings import embeddings
from gateway.api.http_metrics import HttpMetrics
from gateway.api.rate_limit import RateLimiter
from gateway.api.replies import exception_handlers
from gateway.api.request_ids import add_request_id
from gateway.api.request_status import NoStatuses, RequestStatuses, request_status
from gateway.pipeline import Pipeline

Lifespan = Callable[[Litestar], AbstractAsyncContextManager[None]]


def create_app(
    pipeline: Pipeline,
    config: ApiConfig,
    *,
    keys: KeyStore | None = None,
    limiter: RateLimiter | None = None,
    registry: CollectorRegistry | None = None,
    statuses: RequestStatuses | None = None,
    lifespan: Sequence[Lifespan] = (),
) -> Litestar:
    """Make the application.

    Args:
        pipeline: where tokens come from.
        config: what the HTTP half needs to be told.
        keys: where API keys are known and whether they are needed; None: open to all.
        limiter: counts per-key quotas; in this process alone by default.
        registry: shown on `/metrics`, and given the HTTP figures. A fresh one by default.
        statuses: where requests are remembered; nowhere by default.
        lifespan: entered in order at start, left in reverse at shutdown.
    """
    context = ApiContext(pipeline, config, limiter or RateLimiter.in_memory())
    shown = registry or CollectorRegistry()
    metering: list[ASGIMiddleware] = [HttpMetrics(shown)]
    app = Litestar(
        route_handlers=[
            endpoints.chat_completions,
            endpoints.completions,
            embeddings,
            endpoints.list_models,
            endpoints.get_model,
            endpoints.tokenize,
            endpoints.detokenize,
            request_status,
            operations.live,
            operations.ready,
            operations.metrics,
        ],
        dependencies={
            "api": Provide(lambda: context, sync_to_thread=False),
            "statuses": Provide(lambda: statuses or NoStatuses(), sync_to_thread=False),
            "registry": Provide(lambda: shown, sync_to_thread=False),
        },
        guards=[KeyGuard(keys)],
        middleware=metering,
        exception_handlers=exception_handlers(),
        before_send=[add_request_id],
        request_max_body_size=config.max_body_bytes,
        openapi_config=openapi_config(config.version),
        cors_config=_cors(config.cors_origins),
        lifespan=list(lifespan),
        logging_config=None,
    )
    document_bodies(app)
    return app


def _cors(origins: Sequence[str]) -> CORSConfig | None:
    if not origins:
        return None
    return CORSConfig(allow_origins=list(origins), expose_headers=["x-request-id", "retry-after"], allow_headers=["*"])
