"""How routes that are read are declared: what answers GET answers HEAD too, which load balancers and caches ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litestar import route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler


def readable(path: str | Sequence[str], **options: Any) -> HTTPRouteHandler:
    """Litestar's `get`, for HEAD as well; the server leaves the body out (RFC 9110, section 9.3.2)."""
    return route(path, http_method=[HttpMethod.GET, HttpMethod.HEAD], **options)
