"""The page's files as the gateway serves them; `tests/e2e/test_page.py` opens it in a browser."""

from __future__ import annotations

import re

from gateway_kit import FakePipeline, make_app
from litestar.testing import AsyncTestClient

from gateway.api.auth import MemoryKeyStore
from gateway.api.page import FILES


async def test_it_is_served_to_strangers_under_a_strict_policy_and_tells_them_nothing(pipeline: FakePipeline) -> None:
    async with AsyncTestClient(make_app(pipeline, keys=MemoryKeyStore({}))) as client:
        answer = await client.get("/")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.content == (FILES / "index.html").read_bytes()
        linked = re.findall(r'(?:href|src)="([^"]+)"', answer.text)
        assert {f"page/{path.name}" for path in FILES.iterdir()} >= set(linked)
        for path in ("", *(f"page/{path.name}" for path in FILES.iterdir())):
            file = await client.get(f"/{path}")
            assert file.status_code == 200
            policy = file.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert file.headers["x-content-type-options"] == "nosniff"
            assert file.headers["x-request-id"]
        assert (await client.get("/v1/models")).status_code == 401
        for outside in ("nope.js", "../app.py", "..%2fapp.py", "%2e%2e/app.py"):
            missing = await client.get(f"/page/{outside}")
            assert missing.status_code == 404
            assert missing.json()["error"]["code"] == "unknown_url"


def test_it_fetches_nothing_from_elsewhere_and_holds_no_inline_code() -> None:
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//cdn" not in text
        assert not re.search(r"https?://", text), path.name
        assert not re.search(r"\.(innerHTML|outerHTML|insertAdjacentHTML)\b|\beval\(", text), path.name
    html = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
