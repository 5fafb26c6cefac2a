"""`/schema`: the API described in OpenAPI, readable without reaching any other server.

Bodies are decoded by our own strict decoders instead of Litestar's, so their schemas are attached here.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from litestar import Litestar, Response, Router
from litestar.connection import Request
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig, ResponseSpec
from litestar.openapi.plugins import (
    JsonRenderPlugin,
    OpenAPIRenderPlugin,
    ScalarRenderPlugin,
    SwaggerRenderPlugin,
    YamlRenderPlugin,
)
from litestar.openapi.spec import (
    Components,
    OpenAPIMediaType,
    Operation,
    Reference,
    RequestBody,
    Schema,
    SecurityScheme,
)

from gateway.api.anthropic_api.requests import CountMessageTokensRequest, CreateMessageRequest
from gateway.api.auth import KEY_HEADER, OPEN
from gateway.api.replies import as_api_error, error_reply
from gateway.api.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from gateway.api.responses import ErrorBody
from gateway.api.responses_api.requests import CreateResponseRequest, InputTokensRequest

_TEMPLATE = "#/components/schemas/{name}"
_BODIES = (
    ChatCompletionRequest,
    CompletionRequest,
    CountMessageTokensRequest,
    CreateMessageRequest,
    CreateResponseRequest,
    EmbeddingRequest,
    InputTokensRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def body_of(body: type[msgspec.Struct]) -> type[Operation]:
    """An operation class that documents a JSON request body."""
    schema = Reference(ref=_TEMPLATE.format(name=body.__name__))

    @dataclass
    class DocumentedOperation(Operation):
        """Litestar makes one of these per handler."""

        def __post_init__(self) -> None:
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=schema)}, required=True
            )

    return DocumentedOperation


_FAILURES = {
    400: "The request is wrong; `param` names the field",
    401: "No API key, or not one of ours",
    404: "No such model, or none that this key may use",
    429: "Too much for now; see `retry-after`",
    503: "Nobody can serve this now; see `retry-after`",
}
_RARER_FAILURES = {
    403: "This API key may not do that",
    409: "It is under way already",
    413: "The body is too large",
    415: "The body is not declared as JSON",
}


def answers(
    success: type[msgspec.Struct], *rarer: int, failure: type[msgspec.Struct] = ErrorBody
) -> dict[int, ResponseSpec]:
    """The documented answers of a handler: success, the usual failures, and the rarer ones named."""
    specs = {200: ResponseSpec(success, generate_examples=False, description="Success")}
    for status, description in {**_FAILURES, **{status: _RARER_FAILURES[status] for status in rarer}}.items():
        specs[status] = ResponseSpec(failure, generate_examples=False, description=description)
    return specs


def openapi_config(version: str) -> OpenAPIConfig:
    """Litestar's OpenAPI configuration: our own page at `/schema`, JSON, YAML, and two that need the internet."""
    bearer = SecurityScheme(type="http", scheme="bearer", description="An API key")
    header = SecurityScheme(
        type="apiKey", name=KEY_HEADER, security_scheme_in="header", description="The same, as Anthropic's SDKs send it"
    )
    return OpenAPIConfig(
        title="Baton",
        version=version,
        description="OpenAI-compatible API of a disaggregated language-model server.",
        components=Components(security_schemes={"apiKey": bearer, "apiKeyHeader": header}),
        security=[{"apiKey": []}, {"apiKeyHeader": []}],
        openapi_router=Router(
            "/schema", route_handlers=[], opt={OPEN: True}, include_in_schema=False, after_request=_plain_not_found
        ),
        render_plugins=[
            PlainPage(path="/"),
            JsonRenderPlugin(),
            YamlRenderPlugin(),
            ScalarRenderPlugin(path="/scalar"),
            SwaggerRenderPlugin(path="/swagger"),
        ],
    )


def _plain_not_found(response: Response[Any]) -> Response[Any]:
    """Litestar has an HTML page for unknown paths below `/schema`; here they are errors like any other."""
    return error_reply(as_api_error(NotFoundException())) if response.status_code == 404 else response


def document_bodies(app: Litestar) -> None:
    """Add the schemas of request bodies to those that Litestar has found. Mutates: the app's OpenAPI document."""
    _, schemas = msgspec.json.schema_components(_BODIES, ref_template=_TEMPLATE)
    components = app.openapi_schema.components
    components.schemas = {**(components.schemas or {}), **cast("dict[str, Schema]", schemas)}


class PlainPage(OpenAPIRenderPlugin):
    """Operations and schemas as one HTML page without scripts or foreign resources."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """Render the page."""
        title = html.escape(f"{openapi_schema['info']['title']} {openapi_schema['info']['version']}")
        base = request.url.path.rstrip("/")
        links = " · ".join(
            f'<a href="{base}/{name}">{label}</a>'
            for name, label in (
                ("openapi.json", "JSON"),
                ("openapi.yaml", "YAML"),
                ("scalar", "Scalar (needs the internet)"),
                ("swagger", "Swagger UI (needs the internet)"),
            )
        )
        operations = "".join(
            _operation_html(path, method, operation)
            for path, item in sorted(openapi_schema["paths"].items())
            for method, operation in item.items()
            if isinstance(operation, dict)
        )
        schemas = "".join(
            f"<details id='{html.escape(name)}'><summary>{html.escape(name)}</summary>{_json_html(schema)}</details>"
            for name, schema in sorted(openapi_schema["components"]["schemas"].items())
        )
        return (
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<title>{title}</title><style>body{{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto}}"
            "pre{background:#f4f4f4;padding:1rem;overflow:auto}summary{cursor:pointer}</style></head>"
            f"<body><h1>{title}</h1><p>{html.escape(openapi_schema['info'].get('description', ''))}</p><p>{links}</p>"
            f"<h2>Operations</h2>{operations}<h2>Schemas</h2>{schemas}</body></html>"
        ).encode()


def _operation_html(path: str, method: str, operation: dict[str, Any]) -> str:
    head = f"<b>{html.escape(method.upper())}</b> <code>{html.escape(path)}</code>"
    summary = html.escape(operation.get("summary") or "")
    return f"<details><summary>{head} {summary}</summary>{_json_html(operation)}</details>"


def _json_html(value: Any) -> str:
    return f"<pre>{html.escape(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())}</pre>"
