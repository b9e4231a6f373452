"""What clients get wrong, asked of the coordinator itself and through nginx: the same status, the same JSON."""

import json
from collections.abc import AsyncIterator

import pytest

from tests.fleet.edges import Edge, behind
from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.rawhttp import Answer, Caller, parse_answer, raw_request, request_bytes

pytestmark = pytest.mark.slow
BODY_MAX_BYTES = 400_000
"""Above what nginx reads itself, so that both of its ways are tried."""
GOOD = json.dumps(chat()).encode()


@pytest.fixture(scope="module", params=[Edge.GATEWAYS, Edge.DIRECT, Edge.HANDED_OVER], ids=lambda edge: edge.value.replace(" ", "-"))
def edge(request: pytest.FixtureRequest) -> Edge:
    found: Edge = request.param
    return found


async def script(caller: Caller) -> None:
    """A node whose answers to bad bodies are its own."""
    try:
        value = json.loads(caller.body)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and isinstance(value.get("model"), str):
        await answer_well(caller)
    else:
        await caller.answer(b'{"error":"said by the node"}', status=400)


@pytest.fixture
async def fleet(edge: Edge) -> AsyncIterator[Fleet]:
    node = ScriptedNode(script)
    with behind(edge):
        async with serving(node), open_fleet({"n;slots=4": node.port}, ROUTER_BODY_MAX_BYTES=str(BODY_MAX_BYTES)) as fleet:
            yield fleet


def chunked(body: bytes, path: str = "/api/chat") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def post(body: bytes, path: str = "/api/chat", **headers: str) -> bytes:
    return request_bytes("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})


WRONG = {
    "empty": post(b""),
    "truncated": post(b'{"model": "m", "messages": ['),
    "garbage": post(b"not json"),
    "null": post(b"null"),
    "array": post(b"[1]"),
    "no model": post(b'{"messages": []}'),
    "model a number": post(b'{"model": 7}'),
    "wrong option": post(b'{"model":"m","options":{"num_ctx":"x"}}'),
    "unknown model": post(b'{"model":"nosuch"}'),
    "unknown model, OpenAI": post(b'{"model":"nosuch"}', "/v1/chat/completions"),
    "unknown model, Anthropic": post(b'{"model":"nosuch","max_tokens":1}', "/v1/messages"),
    "name that is none": post(b'{"model":"a b"}'),
    "truncated, chunked": chunked(b'{"model": "m"'),
    "unknown model, chunked": chunked(b'{"model":"nosuch"}'),
    "too large, told": request_bytes("POST", "/api/chat", b"", {"Content-Length": str(BODY_MAX_BYTES + 1)}),
    "too large, chunked": chunked(b" " * (BODY_MAX_BYTES + 1)),
    "too large, OpenAI": request_bytes("POST", "/v1/chat/completions", b"", {"Content-Length": str(BODY_MAX_BYTES + 1)}),
    "truncated, large": post(b'{"model": "m", "messages": [' + b" " * 300_000),
    "unknown encoding": post(b"x", Content_Encoding="br"),
    "broken zstd": post(b"x", Content_Encoding="zstd"),
    "wrong method": request_bytes("GET", "/api/chat"),
    "unknown path": post(GOOD, "/api/nothing"),
    "encoded path": post(GOOD, "/api%2Fdelete", X_Forwarded_For="192.168.7.7"),
    "unclean path": post(GOOD, "//api/chat"),
    "path with an end": post(GOOD, "/api/chat/"),
    "strange origin": post(GOOD, Origin="http://evil.example"),
    "unknown key": post(GOOD, Authorization="Bearer nonsense"),
    "unknown key in the path": post(GOOD, "/k/nonsense/api/chat"),
}
OF_ONE_ANSWER = ("x-request-id", "date", "server", "connection")
MADE_UP = b'"request_id":"req_'


def told(answer: Answer) -> tuple[int, bytes, dict[str, str], bool]:
    """What must be the same on both edges."""
    body = answer.body if MADE_UP not in answer.body else answer.body.partition(MADE_UP)[0]
    headers = {name: value for name, value in answer.headers.items() if name not in OF_ONE_ANSWER}
    return answer.status, body, headers, answer.whole


async def test_the_same_status_and_the_same_json(fleet: Fleet) -> None:
    assert fleet.port != fleet.own_port
    differences = []
    for name, data in WRONG.items():
        own = parse_answer(await raw_request(fleet.own_port, data))
        ours = parse_answer(await raw_request(fleet.port, data))
        assert "x-request-id" in ours.headers, name
        if told(own) != told(ours):
            differences.append(f"{name}: {told(own)} {told(ours)}")
    assert differences == []
    await fleet.wait_settled()


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}], ids=["none", "bearer", "x-api-key"])
async def test_without_a_key(edge: Edge, headers: dict[str, str]) -> None:
    node = ScriptedNode(answer_well)
    with behind(edge):
        async with serving(node), open_fleet({"n": node.port}, ROUTER_REQUIRE_API_KEY="true") as fleet:
            for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
                data = request_bytes("POST", path, GOOD, headers)
                own, ours = [parse_answer(await raw_request(port, data)) for port in (fleet.own_port, fleet.port)]
                assert own.status == 401
                assert told(own) == told(ours)
            assert node.seen == []


async def test_odd_bodies_that_ollama_serves_are_served(fleet: Fleet) -> None:
    for body in (
        b'{"model":"m","messages":[],"x":' + b"[" * 9_990 + b"]" * 9_990 + b"}",
        b'{"model":"m","messages":[{"role":"user","content":"\xff\xfe\xc3"}]}',
        b'{"model":"other","MODEL":"m","messages":[],"Stream":true,"stream":false}',
        b'{"model":"m","messages":[]} and then {"model":"other"}',
        b'\r\n\t {"model":"m"}',
    ):
        own, ours = [parse_answer(await raw_request(port, post(body))) for port in (fleet.own_port, fleet.port)]
        assert told(own) == told(ours), body[:60]
