"""What every request passes: ids, Host and Origin, CORS, routes and methods, and the health routes."""

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import FakeHealth, Served, chat

PATH = "/v1/chat/completions"


@pytest.mark.parametrize("given", ["a", "A-z_0.9:x", "x" * 256])
async def test_a_harmless_request_id_is_kept(served: Served, given: str) -> None:
    _, headers, _ = await served.get("/livez", headers={"x-request-id": given})
    assert headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 257, "a b", "a/b", "é", "<b>"])
async def test_any_other_request_id_is_replaced(served: Served, given: str) -> None:
    _, headers, _ = await served.get("/livez", headers={"x-request-id": given})
    assert headers["x-request-id"] != given and len(headers["x-request-id"]) == 24


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:80", "app.localhost", "192.168.0.7:8000"])
async def test_hosts_that_no_page_can_forge(served: Served, host: str) -> None:
    assert (await served.get("/livez", headers={"Host": host}))[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[", "a@b:c"])
async def test_a_foreign_host_is_refused_on_loopback(served: Served, host: str) -> None:
    status, headers, body = await served.get("/v1/models", headers={"Host": host})
    assert (status, json.loads(body)["error"]["code"]) == (403, "host_not_allowed")
    assert "x-request-id" in headers


async def test_the_host_of_an_allowed_origin_is_no_foreign_one(start: Any) -> None:
    served = await start(server__allowed_origins=("https://chat.example",))
    assert (await served.get("/livez", headers={"Host": "chat.example"}))[0] == 200
    assert (await served.get("/livez", headers={"Host": "evil.example"}))[0] == 403


async def test_origins(start: Any) -> None:
    served = await start(server__allowed_origins=("https://chat.example",))
    own = f"http://127.0.0.1:{served.port}"
    for origin, status in ((own, 200), ("https://chat.example", 200), ("https://evil.example", 403), ("null", 403)):
        got, headers, body = await served.post(PATH, chat(max_tokens=1), headers={"Origin": origin})
        assert got == status, origin
        assert headers.get("Access-Control-Allow-Origin") == ("https://chat.example" if "chat" in origin else None)
        assert (headers.get("Vary") == "Origin") is ("chat" in origin)
        if status == 403:
            assert (body["error"]["code"], body["error"]["type"]) == ("origin_not_allowed", "permission_error")
    assert len(served.runtime.submits) == 2


async def test_any_origin(start: Any) -> None:
    served = await start(server__allowed_origins=("*",))
    _, headers, _ = await served.get("/v1/models", headers={"Origin": "https://any.example", "Host": "our.example"})
    assert headers["Access-Control-Allow-Origin"] == "https://any.example"


async def test_streams_carry_cors_headers_too(start: Any) -> None:
    served = await start(server__allowed_origins=("https://chat.example",))
    body = json.dumps(chat(stream=True)).encode()
    _, headers, _ = await served.raw(PATH, body, headers={"Origin": "https://chat.example"})
    assert headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert "x-request-id" in headers["Access-Control-Expose-Headers"]


async def test_preflight(start: Any) -> None:
    served = await start(server__allowed_origins=("https://chat.example",))
    ask = {
        "Origin": "https://chat.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-stainless-os",
    }
    async with served.client.options(served.url + PATH, headers=ask) as reply:
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert "POST" in reply.headers["Access-Control-Allow-Methods"]
        assert reply.headers["Access-Control-Allow-Headers"] == "content-type,x-stainless-os"
    async with served.client.options(served.url + PATH, headers={**ask, "Origin": "https://evil.example"}) as reply:
        assert reply.status == 403
    async with served.client.options(served.url + PATH) as reply:
        assert (reply.status, reply.headers["Allow"]) == (204, "POST, OPTIONS")
    async with served.client.options(served.url + "/none") as reply:
        assert reply.status == 404


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", PATH, 405, "method_not_allowed"),
        ("DELETE", PATH, 405, "method_not_allowed"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/models/../../etc/passwd", 404, "not_found"),
        ("GET", "/v1/ws", 400, "not_a_websocket"),
        ("GET", "/assets/none.js", 404, "not_found"),
    ],
)
async def test_errors_of_routing_are_objects(served: Served, method: str, path: str, status: int, code: str) -> None:
    async with served.client.request(method, served.url + path) as reply:
        body = await reply.json()
        assert (reply.status, body["error"]["code"]) == (status, code)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert (status == 405) == ("Allow" in reply.headers)


async def test_head(served: Served) -> None:
    async with served.client.head(served.url + "/v1/models") as reply:
        assert (reply.status, await reply.read()) == (200, b"") and int(reply.headers["Content-Length"]) > 0
    async with served.client.head(served.url + PATH) as reply:
        assert (reply.status, await reply.read()) == (405, b"")


async def test_models(served: Served) -> None:
    _, _, body = await served.get("/v1/models")
    model = {
        "id": "fake/model:1",
        "object": "model",
        "created": served.runtime.created,
        "owned_by": "millrace",
        "root": "fake/model:1",
        "parent": None,
        "max_model_len": 4096,
        "permission": [],
    }
    assert json.loads(body) == {"object": "list", "data": [model]}
    assert json.loads((await served.get("/v1/models/fake/model:1"))[2]) == model


@pytest.mark.parametrize(
    ("health", "status"),
    [
        (FakeHealth("ready", True), 200),
        (FakeHealth("ready", False, "no step for 60 s", 3, 4, 60.0), 503),
        (FakeHealth("starting", True), 503),
        (FakeHealth("draining", True), 503),
        (FakeHealth("failed", False, "the engine failed"), 503),
    ],
)
async def test_health(served: Served, health: FakeHealth, status: int) -> None:
    served.runtime.state = health
    for path in ("/readyz", "/health"):
        got, headers, body = await served.get(path)
        assert (got, "Retry-After" in headers) == (status, status == 503)
        assert health.reason in body.decode()
    figures = json.loads(body)
    assert (figures["state"], figures["running"], figures["waiting"]) == (health.state, health.running, health.waiting)
    assert (await served.get("/livez"))[0] == 200


async def test_metrics_are_valid_and_hold_the_runtimes_own(served: Served) -> None:
    await served.post(PATH, chat(max_tokens=5))
    await served.get("/none")
    _, headers, body = await served.get("/metrics")
    assert headers["Content-Type"].startswith("text/plain")
    families = list(text_string_to_metric_families(body.decode()))
    assert len({family.name for family in families}) == len(families)
    samples = {(s.name, s.labels.get("route"), s.labels.get("status")): s.value for f in families for s in f.samples}
    assert samples["millrace_tokens_generated_total", None, None] == 5
    assert samples["millrace_http_responses_total", PATH, "200"] == 1
    assert samples["millrace_http_responses_total", "unmatched", "404"] == 1


async def test_nothing_names_the_software_below(served: Served) -> None:
    _, headers, _ = await served.get("/livez")
    assert headers["Server"] == "millrace"
    assert headers["X-Content-Type-Options"] == "nosniff"


async def test_the_page_is_served(served: Served) -> None:
    status, headers, body = await served.get("/")
    assert status == 200 and b"<html" in body
    assert "Content-Security-Policy" in headers
