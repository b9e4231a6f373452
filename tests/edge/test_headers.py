"""What passes to nodes, to the web app and to clients, and what the router says itself."""

import json

import pytest

from core.events import Protocol, Upstream
from edge.headers import (
    error_body,
    error_response,
    plain_target,
    request_head,
    response_head,
    safe_value,
    simple_response,
    web_request_head,
)
from edge.wire import RequestHead, parse_request_head
from edge.wire_heads import parse_response_head

NODE = Upstream(host="192.0.2.7", port=11434)


def sent(*lines: str) -> RequestHead:
    return parse_request_head("\r\n".join([*lines, "", ""]).encode("latin-1"))


def chat(*lines: str) -> RequestHead:
    return sent("POST /api/chat HTTP/1.1", "Host: router:8080", *lines)


def to_node(head: RequestHead, **other: object) -> list[str]:
    options = {"request_id": "id-1", "body_length": 5, "client_host": "192.0.2.1"} | other
    data = request_head(head, options.pop("upstream", NODE), **options)  # type: ignore[arg-type]
    assert data.endswith(b"\r\n\r\n")
    return data.decode("latin-1").split("\r\n")[:-2]


def test_a_request_as_a_node_gets_it() -> None:
    head = chat("Accept: */*", "Content-Type: application/json", "Content-Length: 5", "traceparent: 00-ab-cd-01", "X-Custom:  kept ")
    for _ in range(2):  # the second time from what was remembered
        assert to_node(head, extra=[(b"X-Extra", b"1")]) == [
            "POST /api/chat HTTP/1.1",
            "Host: 192.0.2.7:11434",
            "Accept: */*",
            "Content-Type: application/json",
            "traceparent: 00-ab-cd-01",
            "X-Custom: kept",
            "X-Forwarded-For: 192.0.2.1",
            "X-Request-Id: id-1",
            "X-Extra: 1",
            "Content-Length: 5",
        ]


@pytest.mark.parametrize(
    "line",
    ["Authorization: Bearer s", "x-api-key: s", "Cookie: a=b", "Origin: http://x", "Referer: http://x/", "Expect: 100-continue",
     "Connection: x-gone", "X-Gone: 1", "Keep-Alive: 5", "TE: trailers", "Trailer: a", "Upgrade: h2c", "HTTP2-Settings: a",
     "Proxy-Authorization: s", "Proxy-Connection: close", "X-Request-Id: theirs", "X-Router-Secret: s", "X-Router-History: off",
     "X-Ollama-Router-Failure: died", "X-Explain: 1"],
)  # fmt: skip
def test_what_a_node_never_gets(line: str) -> None:
    both = chat("Connection: x-gone, close", line) if not line.startswith("Connection") else chat(line)
    name = line.partition(":")[0].lower()
    kept = [got for got in to_node(both) if got.lower().startswith(name + ":")]
    assert kept == (["X-Request-Id: id-1"] if name == "x-request-id" else [])


def test_forwarded_for_is_a_chain() -> None:
    assert "X-Forwarded-For: 198.51.100.1, 192.0.2.1" in to_node(chat("X-Forwarded-For: 198.51.100.1"))


def test_a_get_has_no_length_and_an_empty_post_has() -> None:
    head = sent("GET /v1/models/a HTTP/1.1", "Host: x")
    assert not [line for line in to_node(head, body_length=0) if line.startswith("Content-Length")]
    assert to_node(chat(), body_length=0)[-1] == "Content-Length: 0"


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [("::1", 1, "[::1]:1"), ("node", 80, "node:80"), ("unix:/run/web", 0, "localhost")],
)
def test_the_host_is_the_nodes(host: str, port: int, said: str) -> None:
    assert to_node(chat(), upstream=Upstream(host=host, port=port))[1] == f"Host: {said}"


@pytest.mark.parametrize(
    ("target", "plain"),
    [
        ("/api%2Fchat?a=%2F", b"/api/chat?a=%2F"),
        ("http://elsewhere/api/chat?x", b"/api/chat?x"),
        ("/v1/models/a%20b%3F%ff", b"/v1/models/a%20b%3F%FF"),
        ("/api/chat", b"/api/chat"),
    ],
)
def test_a_path_reaches_the_node_in_its_plain_spelling(target: str, plain: bytes) -> None:
    assert plain_target(sent(f"POST {target} HTTP/1.1", "Host: x")) == plain


def test_a_base_path() -> None:
    assert to_node(chat(), upstream=Upstream(host="a", port=1, base_path="/ollama/"))[0] == "POST /ollama/api/chat HTTP/1.1"


def test_no_value_of_ours_can_break_a_line() -> None:
    with pytest.raises(ValueError):
        to_node(chat(), extra=[(b"A", b"b\r\nC: d")])
    with pytest.raises(ValueError):
        simple_response(200, b"", extra=[(b"A", b"b\nC: d")])
    assert safe_value("nöde\r\nX: y ") == b"n?de??X: y"


def test_a_request_as_the_web_app_gets_it() -> None:
    head = sent(
        "POST /api%2Fagents?x=1 HTTP/1.1", "Host: router:8080", "Authorization: Bearer s", "Origin: http://x", "Cookie: a=b",
        "X-Forwarded-For: 198.51.100.1", "X-Router-Peer: 127.0.0.1:1", "x-router-secret: guess", "X-Router-History: off",
        "X-Ollama-Router-Failure: x", "Connection: close, x-gone", "X-Gone: 1", "Expect: 100-continue", "Content-Length: 3",
    )  # fmt: skip
    assert web_request_head(head, peer="192.0.2.1:999", secret=b"s3").decode().split("\r\n") == [
        "POST /api/agents?x=1 HTTP/1.1", "Host: router:8080", "Authorization: Bearer s", "Origin: http://x", "Cookie: a=b",
        "X-Forwarded-For: 198.51.100.1", "X-Router-History: off", "X-Router-Peer: 192.0.2.1:999", "X-Router-Secret: s3",
        "Content-Length: 3", "", "",
    ]  # fmt: skip
    for name in ("0123abcd-0000-4000-8000-000000000000", "mine"):
        told = web_request_head(sent("GET / HTTP/1.1", "Host: a", f"X-Request-Id: {name}"), peer="", secret=b"").decode()
        assert f"\r\nX-Request-Id: {name}\r\n" in told
    chunked = sent("POST / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked")
    assert b"\r\nTransfer-Encoding: chunked\r\n\r\n" in web_request_head(chunked, peer="", secret=b"")
    assert b"\r\nHost: localhost\r\n" in web_request_head(sent("GET / HTTP/1.0"), peer="", secret=b"")


def answered(*lines: str, framing: str, **options: object) -> list[str]:
    head = parse_response_head("\r\n".join([*lines, "", ""]).encode("latin-1"), no_body=False)
    return response_head(head, framing=framing, **options).decode("latin-1").split("\r\n")[:-2]  # type: ignore[arg-type]


def test_an_answer_passes_byte_for_byte_with_its_framing_in_place() -> None:
    lines = ("HTTP/1.1 499 Odd  reason", "Content-Type: a/b", "Transfer-Encoding: chunked", "date: now", "X-a: b", "Server: s")
    assert answered(*lines, framing="chunked") == list(lines)
    assert answered(*lines, framing="length", length=7)[2] == "Content-Length: 7"
    assert answered(*lines, framing="close") == [*lines[:2], *lines[3:], "Connection: close"]
    whole = ("HTTP/1.1 200 OK", "Date: now", "Content-Length: 24", "Vary: x")
    assert answered(*whole, framing="length") == list(whole)
    assert answered(*whole, framing="none") == list(whole)
    assert answered(*whole, framing="length", keep_alive=False) == [*whole, "Connection: close"]


def test_hop_by_hop_headers_of_an_answer_stay_behind() -> None:
    head = ("HTTP/1.1 200 OK", "Connection: keep-alive, X-Gone", "Keep-Alive: 5", "X-Gone: 1", "Trailer: a")
    got = answered(*head, "X-Ollama-Router-Failure: x", "A: b", framing="chunked")
    assert got == ["HTTP/1.1 200 OK", "A: b", "Transfer-Encoding: chunked"]


def test_ours_replace_the_nodes() -> None:
    lines = ("HTTP/1.1 200 OK", "x-request-id: theirs", "Content-Length: 0")
    assert answered(*lines, framing="length", extra=[(b"X-Request-Id", b"ours")]) == [
        "HTTP/1.1 200 OK", "Content-Length: 0", "X-Request-Id: ours",
    ]  # fmt: skip
    assert answered(*lines, framing="length") == list(lines)


def test_our_own_answers() -> None:
    assert simple_response(404, b"no", content_type="text/plain", keep_alive=False) == (
        b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    )
    assert simple_response(200, b"yes", content_type="", head_only=True) == b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    whole = error_response(503, "busy", request_id="r", retry_after_s=3)
    assert b"\r\nX-Request-Id: r\r\nRetry-After: 3\r\n" in whole
    assert whole.endswith(b'{"error":"busy"}')


def test_errors_have_the_manners_of_their_route() -> None:
    assert error_body(Protocol.NATIVE, 400, "a <b> & \udcff") == (
        b'{"error":"a \\u003cb\\u003e \\u0026 ?"}', "application/json; charset=utf-8",
    )  # fmt: skip
    for protocol in (Protocol.OPENAI, Protocol.RESPONSES):
        body, content_type = error_body(protocol, 404, "model 'x' not found")
        assert body == b'{"error":{"message":"model \'x\' not found","type":"not_found_error","param":null,"code":null}}\n'
        assert content_type == "application/json"
    assert json.loads(error_body(Protocol.OPENAI, 503, "x")[0])["error"]["type"] == "api_error"
    body, _ = error_body(Protocol.ANTHROPIC, 503, "busy", request_id="123e4567-e89b-12d3-a456-426614174000")
    assert json.loads(body) == {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "busy"},
        "request_id": "req_123e4567e89b12d3a4564266",
    }
