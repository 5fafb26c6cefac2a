"""Models, health, metrics, documentation, and what importing the gateway costs."""

from __future__ import annotations

import subprocess
import sys

from gateway_kit import MODEL, FakePipeline, make_app, tiny_model
from litestar import Litestar
from litestar.testing import AsyncTestClient
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.parser import text_string_to_metric_families

Client = AsyncTestClient[Litestar]


async def test_models_and_their_aliases(client: Client, pipeline: FakePipeline) -> None:
    pipeline.served.append(tiny_model(name="second", aliases=("nick name",)))
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [entry["id"] for entry in body["data"]] == [MODEL, "second", "nick name"]
    for entry in body["data"]:
        assert (entry["object"], entry["created"], entry["owned_by"]) == ("model", 1_700_000_000, "baton")
        quoted = entry["id"].replace("/", "%2F").replace(" ", "%20")
        assert (await client.get(f"/v1/models/{quoted}")).json() == entry
    answer = await client.post("/v1/completions", json={"model": "nick name", "prompt": "x"})
    assert answer.json()["model"] == "nick name"


async def test_ready_needs_both_halves_of_a_model(client: Client, pipeline: FakePipeline) -> None:
    for counts, status in (((1, 1), 200), ((1, 0), 503), ((0, 1), 503), ((0, 0), 503), ((2, 3), 200)):
        pipeline.counts = counts
        for path in ("/health/ready", "/health"):
            response = await client.get(path)
            assert response.status_code == status
            models = response.json()["models"]
            assert (models[0]["prefill_workers"], models[0]["decode_workers"]) == counts
            if status == 503:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
                assert response.headers["retry-after"] == "1"
        assert (await client.get("/health/live")).status_code == 200


async def test_metrics_show_the_given_registry_and_http_figures(pipeline: FakePipeline) -> None:
    registry = CollectorRegistry()
    Gauge("baton_something", "Made up", registry=registry).set(3)
    async with AsyncTestClient(make_app(pipeline, registry=registry)) as client:
        await client.post("/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
        await client.post("/v1/completions", json={"model": MODEL, "prompt": ""})
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    assert samples["baton_something",] == 3
    assert samples["baton_http_requests_total", "/v1/completions", "200", "POST"] == 1
    assert samples["baton_http_requests_total", "/v1/completions", "400", "POST"] == 1
    assert samples["baton_http_requests_in_progress", "/v1/completions", "POST"] == 0


async def test_the_schema_describes_requests_and_needs_no_internet(client: Client) -> None:
    schema = (await client.get("/schema/openapi.json")).json()
    paths = schema["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/health"} <= set(paths)
    chat = paths["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatCompletionRequest")
    assert chat["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatCompletion")
    components = schema["components"]["schemas"]
    assert components["ChatCompletionRequest"]["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    text = str(schema)
    for part in text.split("#/components/schemas/")[1:]:
        assert part.split("'")[0] in components
    page = await client.get("/schema")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in page.text
    assert "<script" not in page.text
    assert "https://" not in page.text.partition("<h2>Operations")[0]


async def test_browsers_may_call_where_origins_are_configured(pipeline: FakePipeline, client: Client) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    async with AsyncTestClient(make_app(pipeline, cors_origins=("https://a.example",))) as open_client:
        preflight = await open_client.options("/v1/chat/completions", headers=asked)
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in (await client.get("/v1/models", headers=asked)).headers


def test_importing_the_gateway_brings_no_torch_and_is_quick() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "import gateway.app, gateway.service\n"
        "heavy = {'torch', 'triton', 'cupy', 'transformers', 'numpy', 'llguidance'} & set(sys.modules)\n"
        "print(sorted(heavy), time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    heavy, _, cpu_s = done.stdout.partition("] ")
    assert heavy == "["
    assert float(cpu_s) < 1.5  # CPU time, so that a busy machine does not matter; about 0.4 s
