"""`GET /`: the chat page for people. Static files alone: what it knows it asks this API for, with the visitor's key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litestar import MediaType, Response, Router, get
from litestar.datastructures import CacheControlHeader
from litestar.response import File
from litestar.static_files import create_static_files_router

from gateway.api.auth import OPEN

FILES = Path(__file__).parents[1] / "page"

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def _guarded(response: Response[Any]) -> Response[Any]:
    response.headers.update(HEADERS)
    return response


@get("/", opt={OPEN: True}, include_in_schema=False, after_request=_guarded)
async def page() -> File:
    """The page itself."""
    return File(
        FILES / "index.html",
        media_type=MediaType.HTML,
        content_disposition_type="inline",
        headers={"cache-control": "no-cache"},
    )


def page_files() -> Router:
    """Its styles and scripts, below `/page`."""
    return create_static_files_router(
        "/page",
        [FILES],
        name="page",
        opt={OPEN: True},
        cache_control=CacheControlHeader(no_cache=True),
        after_request=_guarded,
    )
