"""Every route of Ollama, method by method, through the router (`ollama-wire.md` 1.2 and 3.1): answered here, merged, routed, fanned out or
refused; and the paths that are none. The node behind it is a simulated Ollama; what it says itself is compared with what comes through."""

from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest

from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, open_fleet
from tests.fleet.rawhttp import Answer, ask

MODEL = "llama3.2:3b"
JSON = "application/json; charset=utf-8"
BARE_JSON = "application/json"
LINES = "application/x-ndjson"
EVENTS = "text/event-stream"
TEXT = "text/plain; charset=utf-8"
MESSAGES = [{"role": "user", "content": "hi"}]
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Row(NamedTuple):
    """One row of the table: a request that is in order, and what it comes to."""

    path: str
    methods: tuple[str, ...]
    """In the order of Ollama's `Allow`; the last is the one that is tried."""
    body: Any
    status: int
    kind: str | None
    shows: bytes = b""


TABLE = (
    Row("/", ("HEAD", "GET"), None, 200, TEXT, b"Ollama is running"),
    Row("/api/version", ("HEAD", "GET"), None, 200, JSON, b'{"version":"0.33.0"}'),
    Row("/api/status", ("GET",), None, 200, JSON, b'{"cloud":{"disabled":true,"source":"config"}}'),
    Row("/api/tags", ("HEAD", "GET"), None, 200, JSON, b'"name":"llama3.2:3b"'),
    Row("/api/ps", ("GET",), None, 200, JSON, b'{"models":['),
    Row("/api/show", ("POST",), {"model": MODEL}, 200, JSON, b'"model_info":{'),
    Row("/api/generate", ("POST",), {"model": MODEL, "prompt": "hi"}, 200, LINES, b'"done":true'),
    Row("/api/chat", ("POST",), {"model": MODEL, "messages": MESSAGES}, 200, LINES, b'"done":true'),
    Row("/api/embed", ("POST",), {"model": "nomic-embed-text", "input": "hi"}, 200, JSON, b'"embeddings":[['),
    Row("/api/embeddings", ("POST",), {"model": "nomic-embed-text", "prompt": "hi"}, 200, JSON, b'"embedding":['),
    Row("/api/pull", ("POST",), {"model": MODEL}, 200, LINES, b'{"status":"success"}\n'),
    Row("/api/push", ("POST",), {"model": MODEL}, 403, JSON, b"not pushed through the router"),
    Row("/api/create", ("POST",), {"model": "x", "from": MODEL}, 403, JSON, b"not created through the router"),
    Row("/api/blobs/sha256:00", ("HEAD", "POST"), b"x", 403, JSON, b"not created through the router"),
    Row("/api/copy", ("POST",), {"source": MODEL, "destination": "mine"}, 200, None),
    Row("/api/delete", ("DELETE",), {"model": "gemma3:4b"}, 200, None),
    Row("/api/me", ("POST",), {}, 401, JSON, b'{"error":"unauthorized"}'),
    Row("/api/signout", ("POST",), {}, 403, JSON, b"ollama signout"),
    Row("/api/user/keys/abc", ("DELETE",), None, 403, JSON, b"ollama signout"),
    Row("/api/experimental/web_search", ("POST",), {}, 403, JSON, b"web search is unavailable"),
    Row("/api/experimental/web_fetch", ("POST",), {}, 403, JSON, b"web fetch is unavailable"),
    Row("/api/experimental/model-recommendations", ("GET",), None, 200, JSON, b'{"recommendations":[]}'),
    Row("/v1/models", ("GET",), None, 200, BARE_JSON, b'"object":"list"'),
    Row(f"/v1/models/{MODEL}", ("GET",), None, 200, BARE_JSON, b'"id":"llama3.2:3b"'),
    Row("/v1/chat/completions", ("POST",), {"model": MODEL, "messages": MESSAGES}, 200, BARE_JSON, b'"choices":[{'),
    Row("/v1/completions", ("POST",), {"model": MODEL, "prompt": "hi", "stream": True}, 200, EVENTS, b"data: [DONE]"),
    Row("/v1/embeddings", ("POST",), {"model": "nomic-embed-text", "input": "hi"}, 200, BARE_JSON, b'"data":[{'),
    Row("/v1/responses", ("POST",), {"model": MODEL, "input": "hi"}, 200, BARE_JSON, b'"object":"response"'),
    Row("/v1/messages", ("POST",), {"model": MODEL, "messages": MESSAGES, "max_tokens": 9}, 200, BARE_JSON, b'"type":"message"'),
)
NOT_THERE = (
    "/v1/messages/count_tokens",
    "/v1/images/generations",
    "/v1/files",
    "/health",
    "/debug/pprof/",
    "/api",
    "/v1",
    "/nosuch",
    "/api/nosuch",
)


@pytest.fixture
async def fleet() -> AsyncIterator[tuple[Fleet, SimulatedOllama]]:
    node = SimulatedOllama(models=[MODEL, "gemma3:4b", "nomic-embed-text"], load_s=0.01, decode_tokens_s=1e5, answer_tokens=3)
    async with node.serve(), open_fleet({"node": node.port}) as opened:
        yield opened, node


async def request(fleet: Fleet, method: str, path: str, body: Any = None) -> Answer:
    answer = await fleet.ask(method, path, body)
    assert answer.headers["x-request-id"]
    assert answer.whole
    return answer


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.path)
async def test_a_request_in_order(fleet: tuple[Fleet, SimulatedOllama], row: Row) -> None:
    answer = await request(fleet[0], row.methods[-1], row.path, row.body)
    assert (answer.status, answer.headers.get("content-type")) == (row.status, row.kind), answer.body
    assert row.shows in answer.body
    if row.kind is None:
        assert (answer.body, answer.headers["content-length"]) == (b"", "0")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.path)
async def test_a_wrong_method_is_answered_as_ollama_does(fleet: tuple[Fleet, SimulatedOllama], row: Row) -> None:
    for method in METHODS:
        if method in row.methods or method == "OPTIONS":
            continue
        answer = await request(fleet[0], method, row.path)
        assert (answer.status, answer.headers["allow"]) == (405, ", ".join(row.methods)), method
        assert answer.headers["content-type"] == "text/plain"
        if method != "HEAD":
            assert answer.body == b"405 method not allowed"


@pytest.mark.parametrize("row", [row for row in TABLE if row.path != "/"], ids=lambda row: row.path)
async def test_a_slash_too_many_is_a_redirect(fleet: tuple[Fleet, SimulatedOllama], row: Row) -> None:
    for method in ("GET", "POST"):
        answer = await request(fleet[0], method, row.path + "/")
        assert (answer.status, answer.headers["location"]) == (301 if method == "GET" else 307, row.path)
        assert (await request(fleet[0], method, "/" + row.path)).status == 307


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.path)
async def test_an_encoded_path_is_the_path(fleet: tuple[Fleet, SimulatedOllama], row: Row) -> None:
    path = "/" + "".join(f"%{byte:02X}" for byte in row.path[1:].encode())
    answer = await request(fleet[0], row.methods[-1], path, row.body)
    assert (answer.status, answer.headers.get("content-type")) == (row.status, row.kind)


@pytest.mark.parametrize("path", ["/", "/api/version", "/api/tags"])
async def test_head_is_get_without_a_body(fleet: tuple[Fleet, SimulatedOllama], path: str) -> None:
    head, got = await request(fleet[0], "HEAD", path), await request(fleet[0], "GET", path)
    assert (head.status, head.body, head.headers["content-type"]) == (200, b"", got.headers["content-type"])
    if path == "/":
        assert head.headers["content-length"] == "17"


@pytest.mark.parametrize("method", [method for method in METHODS if method != "OPTIONS"])
@pytest.mark.parametrize("path", NOT_THERE)
async def test_a_path_that_is_none(fleet: tuple[Fleet, SimulatedOllama], method: str, path: str) -> None:
    answer = await request(fleet[0], method, path)
    assert (answer.status, answer.headers["content-type"]) == (404, "text/plain")
    if method != "HEAD":
        assert answer.body == b"404 page not found"


NOT_SIMULATED = ("/api/me", "/api/signout", "/api/user/keys/abc", "/api/blobs/sha256:00", f"/v1/models/{MODEL}")
"""Paths that a simulated Ollama does not know, or not with a slash behind them."""
SIMULATED_TOO = [row.path for row in TABLE if row.path not in NOT_SIMULATED]


@pytest.mark.parametrize("path", [*SIMULATED_TOO, *NOT_THERE])
async def test_the_node_itself_has_the_same_manners(fleet: tuple[Fleet, SimulatedOllama], path: str) -> None:
    """405, 404 and redirects are Ollama's own, whoever gives them."""
    for method in ("PATCH", "PUT"):
        for target in (path, path.rstrip("/") + "/"):
            direct, routed = await ask(fleet[1].port, method, target), await request(fleet[0], method, target)
            for name in ("allow", "location"):
                assert routed.headers.get(name) == direct.headers.get(name), target
            assert routed.status == direct.status, target
            if routed.status in (404, 405):  # of a redirect Go sends a body to GET alone
                assert routed.body == direct.body, target
