"""A node's answer and a client's connection, in memory, for tests of what lies between."""

import re

from core.events import Route
from edge.headers import response_head
from edge.relay import Failed, Good, Poured, open_answer, pour
from edge.wire import RequestHead, ResponseHead, UpstreamCut, UpstreamGarbled, parse_request_head
from edge.wire_heads import Framing
from tests.fleet.rawhttp import Answer, parse_answer
from tests.fleet.recorded import Exchange

ROUTES = {
    "/api/chat": Route.CHAT,
    "/api/generate": Route.GENERATE,
    "/api/embed": Route.EMBED,
    "/api/embeddings": Route.EMBEDDINGS,
    "/v1/chat/completions": Route.V1_CHAT,
    "/v1/completions": Route.V1_COMPLETIONS,
    "/v1/embeddings": Route.V1_EMBEDDINGS,
    "/v1/responses": Route.V1_RESPONSES,
    "/v1/messages": Route.V1_MESSAGES,
}
NDJSON = b"application/x-ndjson"
SSE = b"text/event-stream"
JSON = b"application/json; charset=utf-8"
HOLD_BYTES = 1 << 20


def response(status: int, content_type: bytes, framing: Framing = "chunked", length: int | None = None) -> ResponseHead:
    headers = [(b"Content-Type", content_type)]
    return ResponseHead(status, b"OK", headers, {b"content-type": content_type}, framing, length)


class Node:
    """An `UpstreamConnection` that says `parts` and then ends: well, or by raising `end`. `told_end`: the end comes with the last part."""

    def __init__(self, head: ResponseHead | None, parts: list[bytes], end: UpstreamCut | None = None, *, told_end: bool = True) -> None:
        self.head = head
        self.parts = [part for part in parts if part]
        self.end = end
        self.told_end = told_end
        self.chunks_seen = len(self.parts)
        self.reusable = end is None
        self.closed = False

    @property
    def has_bytes(self) -> bool:
        return not self.parts and self.told_end

    @property
    def at_end(self) -> bool:
        return self.has_bytes and self.end is None

    async def read_head(self) -> ResponseHead:
        if self.head is None:
            raise self.end or UpstreamGarbled("not HTTP")
        return self.head

    async def read_some(self) -> bytes:
        if self.parts:
            return self.parts.pop(0)
        if self.end is not None:
            raise self.end
        return b""

    def close(self) -> None:
        self.closed = True


class Client:
    """A `ClientConnection` that remembers what it was sent."""

    def __init__(self) -> None:
        self.sends: list[bytes] = []
        self.must_close = False

    async def send(self, data: bytes) -> None:
        assert data, "nothing was sent"
        self.sends.append(data)

    @property
    def received(self) -> bytes:
        return b"".join(self.sends)

    @property
    def answer(self) -> Answer:
        return parse_answer(self.received)


def asker(version: str = "1.1") -> RequestHead:
    return parse_request_head(b"POST /api/chat HTTP/%b\r\nHost: x\r\n\r\n" % version.encode())


def node_of(tape: Exchange, size: int) -> Node:
    """The node that gave a recorded answer, its body in parts of `size` bytes."""
    answer = tape.answer
    fields = {name.encode(): value.encode("latin-1") for name, value in answer.headers.items()}
    chunked = "transfer-encoding" in answer.headers
    head = ResponseHead(
        answer.status, b"OK", list(fields.items()), fields, "chunked" if chunked else "length", None if chunked else len(answer.body)
    )
    parts = [answer.body[at : at + size] for at in range(0, len(answer.body), size)]
    return Node(head, parts, None if answer.whole else UpstreamCut("the node closed the connection before its answer was whole"))


async def relayed(
    node: Node, route: Route, *, version: str = "1.1", hold_bytes: int = HOLD_BYTES
) -> tuple[Client, Good | Failed, Poured | None]:
    """One answer from `node` to a client, as the proxy does it."""
    opened = await open_answer(node, route=route, stream=True, hold_bytes=hold_bytes)  # type: ignore[arg-type]
    client = Client()
    if isinstance(opened, Failed):
        assert not client.sends
        return client, opened, None
    framing = opened.framing_for(asker(version))
    head = response_head(opened.head, framing=framing, length=opened.length)
    poured = await pour(opened, node, client, head_bytes=head, route=route)  # type: ignore[arg-type]
    return client, opened, poured


SSE_ENDS = re.compile(rb'^(data: \[DONE\]|event: (message_stop|response\.(completed|incomplete|failed)|error)|data: \{"error")', re.M)
