"""The ASGI application, put together from its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from litestar import Litestar
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.middleware import ASGIMiddleware
from prometheus_client import CollectorRegistry

from fleet.usage import MemoryUsage
from gateway.api import endpoints, operations
from gateway.api.answer_headers import add_headers
from gateway.api.anthropic_api.endpoints import messages_router
from gateway.api.auth import KeyGuard, KeyStore
from gateway.api.config import ApiConfig
from gateway.api.context import ApiContext, UsageLedger
from gateway.api.documentation import document_bodies, openapi_config
from gateway.api.embeddings import embeddings
from gateway.api.http_metrics import HttpMetrics
from gateway.api.page import page, page_files
from gateway.api.rate_limit import RateLimiter
from gateway.api.replies import exception_handlers
from gateway.api.request_status import NoStatuses, RequestStatuses, request_status
from gateway.api.responses_api import endpoints as responses_endpoints
from gateway.api.responses_api.background import BackgroundRuns
from gateway.api.responses_api.store import ResponseStore
from gateway.api.usage import list_usage
from gateway.pipeline import Pipeline

EXPOSED_HEADERS = [
    "x-request-id",
    "request-id",
    "retry-after",
    "x-should-retry",
    *(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset")),
]
"""What scripts of other origins may read besides the few headers that browsers always show."""

Lifespan = Callable[[Litestar], AbstractAsyncContextManager[None]]


def create_app(
    pipeline: Pipeline,
    config: ApiConfig,
    *,
    keys: KeyStore | None = None,
    limiter: RateLimiter | None = None,
    usage: UsageLedger | None = None,
    registry: CollectorRegistry | None = None,
    statuses: RequestStatuses | None = None,
    responses: ResponseStore | None = None,
    lifespan: Sequence[Lifespan] = (),
) -> Litestar:
    """Make the application.

    Args:
        pipeline: where tokens come from.
        config: what the HTTP half needs to be told.
        keys: where API keys are known and whether they are needed; None: open to all.
        limiter: counts per-key quotas; in this process alone by default.
        responses: where responses are kept; None: nowhere, and none runs in the background.
        usage: counts what keys use; in this process alone by default.
        registry: shown on `/metrics`, and given the HTTP figures. A fresh one by default.
        statuses: where requests are remembered; nowhere by default.
        lifespan: entered in order at start, left in reverse at shutdown.
    """
    context = ApiContext(pipeline, config, limiter or RateLimiter.in_memory(), usage or MemoryUsage())
    entered = list(lifespan)
    if responses is not None:
        context.responses = responses
        context.background = BackgroundRuns(context, responses, lease_s=config.lease_s)
        entered.append(context.background.lifespan)
    shown = registry or CollectorRegistry()
    metering: list[ASGIMiddleware] = [HttpMetrics(shown)]
    app = Litestar(
        route_handlers=[
            endpoints.chat_completions,
            endpoints.completions,
            embeddings,
            messages_router(),
            responses_endpoints.create_response,
            responses_endpoints.count_input_tokens,
            responses_endpoints.get_response,
            responses_endpoints.delete_response,
            responses_endpoints.cancel_response,
            responses_endpoints.list_input_items,
            endpoints.list_models,
            endpoints.get_model,
            endpoints.tokenize,
            endpoints.detokenize,
            request_status,
            page,
            page_files(),
            list_usage,
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
        before_send=[add_headers],
        request_max_body_size=config.max_body_bytes,
        openapi_config=openapi_config(config.version),
        cors_config=_cors(config.cors_origins),
        lifespan=entered,
        logging_config=None,
    )
    document_bodies(app)
    return app


def _cors(origins: Sequence[str]) -> CORSConfig | None:
    if not origins:
        return None
    return CORSConfig(
        allow_origins=list(origins),
        allow_methods=["GET", "HEAD", "POST", "DELETE", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
