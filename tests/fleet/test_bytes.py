"""Bytes through the router equal bytes direct, both ways: what nodes get and what clients get, on every inference route, streaming and not.

The nodes say what the request's own bytes make them say (its digest is the dice), so that an answer shows which request it belongs to;
chunk borders, charset, lengths and odd texts included. `prove` runs many more.
"""

import hashlib
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fleet.edges import Edge
from tests.fleet.fleet import Fleet, ScriptedNode, open_fleet, serving, sse
from tests.fleet.rawhttp import Caller, parse_answer, raw_request, request_bytes

pytestmark = pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)

NATIVE = ("/api/chat", "/api/generate")
OPENAI = ("/v1/chat/completions", "/v1/completions")
WHOLE = ("/api/embed", "/api/embeddings", "/api/show", "/v1/embeddings")
ROUTES = (*NATIVE, *OPENAI, "/v1/responses", "/v1/messages", *WHOLE)
PER_EXAMPLE = 50
GENERATE = (Phase.explicit, Phase.reuse, Phase.generate)
"""Fifty requests and a fleet are too much to make smaller step by step: a failure names its request."""
TEXTS = ["Gr\u00fc\u00dfe", "\U0001f600", "\u6570\u5b57", 'a "b" \\ c', "<&>", "\u2028", "x" * 3000, "", "data: [DONE]", '{"done":true}']
Ask = tuple[str, bytes, str]
"""Path, body, how it is sent: whole, in chunks, pipelined."""


def answer_of(path: str, body: bytes, *, streams: bool) -> tuple[str, list[bytes]]:
    """Content type and pieces of the answer: made from the request alone."""
    dice = random.Random(hashlib.sha256(path.encode() + body).digest())
    words = [dice.choice(TEXTS) for _ in range(dice.randrange(1, 12))]
    if not streams:
        said: Any = {"model": "m", "words": words, "done": True, "stop_reason": "x", "usage": {"input_tokens": 1}}
        return "application/json; charset=utf-8", [json.dumps(said, ensure_ascii=dice.random() < 0.5).encode()]
    if path in NATIVE:
        lines: list[Any] = [{"model": "m", "message": {"content": word}, "done": False} for word in words]
        return "application/x-ndjson", [
            json.dumps(line).encode() + b"\n" for line in [*lines, {"done": True, "context": [1] * dice.randrange(5000)}]
        ]
    if path in OPENAI:
        return "text/event-stream", [*(sse({"choices": [{"delta": {"content": word}}]}) for word in words), sse(b"[DONE]")]
    last = "response.completed" if path == "/v1/responses" else "message_stop"
    return "text/event-stream", [
        b"event: %b\n" % name.encode() + sse({"type": name, "text": word})
        for name, word in [*(("delta", word) for word in words), (last, "")]
    ]


def wants_stream(path: str, body: bytes) -> bool:
    stream = json.loads(body).get("stream", path in NATIVE)
    return bool(stream) and path not in WHOLE


async def speak(caller: Caller) -> None:
    """A node that answers with `answer_of`, cut into chunks as the dice fall."""
    body = caller.body
    content_type, pieces = answer_of(caller.target, body, streams=wants_stream(caller.target, body))
    data = b"".join(pieces)
    dice = random.Random(hashlib.sha256(body).digest())
    if content_type.startswith("application/json") and dice.random() < 0.5:
        await caller.answer(data, kind=content_type)
        return
    await caller.begin_chunks(content_type)
    while data:
        size = dice.choice([1, 7, 100, 4000, 100_000])
        await caller.chunk(data[:size])
        data = data[size:]
    await caller.end_chunks()


@asynccontextmanager
async def a_fleet() -> AsyncIterator[tuple[Fleet, list[ScriptedNode]]]:
    nodes = [ScriptedNode(speak), ScriptedNode(speak)]
    async with serving(*nodes), open_fleet({f"n{at};slots=64": node.port for at, node in enumerate(nodes)}) as fleet:
        yield fleet, nodes


def chunked(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    parts = [body[at : at + 777] for at in range(0, len(body), 777)]
    return head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


async def both(fleet: Fleet, nodes: list[ScriptedNode], ask: Ask) -> None:
    """One request: what its node got, and what its client got, against what was sent and what the node says to that."""
    path, body, manner = ask
    data = chunked(path, body) if manner == "chunks" else request_bytes("POST", path, body, None)
    answer = parse_answer(await raw_request(fleet.port, data, patience_s=30), "POST")
    content_type, pieces = answer_of(path, body, streams=wants_stream(path, body))
    direct = b"".join(pieces)
    assert (answer.status, answer.whole, answer.headers["content-type"]) == (200, True, content_type)
    assert answer.body == direct
    got = [caller for node in nodes for caller in node.seen if caller.body == body and caller.target == path]
    assert got, "no node got these bytes"


bodies = st.builds(
    lambda model, stream, text, extra, ascii_only, spaces: json.dumps(
        {
            "model": model,
            **stream,
            "messages": [{"role": "user", "content": text}],
            "prompt": text,
            "input": text,
            "max_tokens": 5,
            **extra,
        },
        ensure_ascii=ascii_only,
        separators=(", ", " : ") if spaces else None,
    ).encode("utf-8", "surrogatepass"),
    st.sampled_from(["m", "m:latest", "library/m", "M"]),
    st.sampled_from([{}, {"stream": True}, {"stream": False}]),
    st.one_of(
        st.sampled_from([text for text in TEXTS if text]), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
    ),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).map("x".__add__),
        st.floats(allow_nan=False, allow_infinity=False),
        max_size=3,
    ),
    st.booleans(),
    st.booleans(),
)
asks = st.tuples(st.sampled_from(ROUTES), bodies, st.sampled_from(["whole", "whole", "chunks"]))


async def all_equal(requests: list[Ask]) -> None:
    async with a_fleet() as (fleet, nodes):
        for ask in requests:
            await both(fleet, nodes, ask)
        await fleet.wait_settled()


def run(requests: list[Ask]) -> None:
    trio.run(all_equal, requests)


@settings(max_examples=20, phases=GENERATE, suppress_health_check=list(HealthCheck))
@given(st.lists(asks, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_a_thousand_requests_and_their_answers_pass_byte_for_byte(requests: list[Ask]) -> None:
    run(requests)


@pytest.mark.prove
@settings(max_examples=400, phases=GENERATE, suppress_health_check=list(HealthCheck))
@given(st.lists(asks, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
def test_twenty_thousand_do(requests: list[Ask]) -> None:
    run(requests)


@pytest.mark.through_nginx(Edge.GATEWAYS, always=True)
@pytest.mark.parametrize("manner", ["whole", "chunks"])
async def test_an_image_of_ten_megabytes(manner: str) -> None:
    image = "iVBORw0KGgo" + "A" * (10 << 20)
    body = json.dumps({"messages": [{"role": "user", "content": "a", "images": [image]}], "model": "m"}).encode()
    await all_equal([("/api/chat", body, manner)])


async def test_a_line_of_eight_megabytes() -> None:
    line = b'{"model":"m","response":"","done":true,"context":[' + b"1," * (4 << 20) + b"1]}\n"

    async def long(caller: Caller) -> None:
        await caller.begin_chunks("application/x-ndjson")
        await caller.chunk(line)
        await caller.end_chunks()

    node = ScriptedNode(long)
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await fleet.ask("POST", "/api/generate", {"model": "m", "prompt": "a"})
        assert (answer.whole, answer.body == line) == (True, True)


@given(st.lists(asks.filter(lambda ask: ask[2] == "whole"), min_size=5, max_size=25))
@settings(max_examples=4, phases=GENERATE, suppress_health_check=list(HealthCheck))
def test_requests_one_behind_the_other_on_one_connection(requests: list[Ask]) -> None:
    async def main() -> None:
        async with a_fleet() as (fleet, _):
            data = b"".join(
                request_bytes("POST", path, body, None).replace(b"Connection: close\r\n", b"") for path, body, _ in requests[:-1]
            ) + request_bytes("POST", requests[-1][0], requests[-1][1], None)
            assert b"Connection: close" in data
            got = await raw_request(fleet.port, data, patience_s=30)
            for path, body, _ in requests:
                _, pieces = answer_of(path, body, streams=wants_stream(path, body))
                head, mark, got = got.partition(b"\r\n\r\n")
                assert mark
                assert head.startswith(b"HTTP/1.1 200 ")
                got = _rest_of(head.lower(), got, b"".join(pieces))
            assert got == b""

    trio.run(main)


def _rest_of(head: bytes, data: bytes, body: bytes) -> bytes:
    """What follows the answer that has this body."""
    if b"transfer-encoding: chunked" not in head:
        assert data[: len(body)] == body
        return data[len(body) :]
    parts = []
    while True:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        parts.append(data[:size])
        data = data[size + 2 :]
        if size == 0:
            assert b"".join(parts) == body
            return data
