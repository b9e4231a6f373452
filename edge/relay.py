"""An answer on its way from a node to a client: judged, held back, poured, and ended honestly."""

from dataclasses import dataclass, field
from typing import Final

import msgspec

from core.events import Failure, Protocol, Route, Usage
from edge.headers import error_body
from edge.wire import ClientConnection, RequestHead, ResponseHead, UpstreamConnection, UpstreamCut, UpstreamGarbled
from edge.wire_heads import Framing

FAILURE_HEADER: Final = b"X-Ollama-Router-Failure"
"""Set by a gateway on the 502 it answers when its Ollama failed before the first byte: the value of a `Failure`."""
ERROR_MAX_BYTES: Final = 1 << 20


@dataclass(slots=True, kw_only=True)
class Kept:
    """A node's own answer, held whole, to be passed on as it came."""

    head: ResponseHead
    body: bytes
    text: str = ""

    @property
    def framing(self) -> Framing:
        return "length"

    def framed(self) -> bytes:
        return self.body


@dataclass(slots=True, kw_only=True)
class Failed:
    """An attempt that failed before a byte of it may reach the client."""

    failure: Failure
    status: int = 0
    text: str = ""
    repeat_guard: bool = False
    kept: Kept | None = None


@dataclass(slots=True, kw_only=True)
class Good:
    """An answer whose first byte is here."""

    head: ResponseHead
    first: bytes
    whole: bool
    chunked: bool = False
    started: bool = False
    body_bytes: int = 0

    def framing_for(self, client: RequestHead) -> Framing:
        if self.whole or self.head.framing == "length":
            return "length"
        self.chunked = client.version == "1.1"
        return "chunked" if self.chunked else "close"

    @property
    def length(self) -> int | None:
        return len(self.first) if self.whole else self.head.content_length


@dataclass(slots=True, kw_only=True)
class Poured:
    """What became of an answer."""

    clean: bool = True
    error_text: str = ""
    usage: Usage | None = None
    body_bytes: int = 0
    chunks: int = 0
    node_failure: Failure | None = None
    notes: list[str] = field(default_factory=list)


async def open_answer(conn: UpstreamConnection, *, route: Route, stream: bool, hold_bytes: int) -> Good | Failed:
    try:
        head = await conn.read_head()
        first = await conn.read_some()
        if head.status >= 400 or b"stream" not in head.fields.get(b"content-type", b"") and b"ndjson" not in head.fields.get(b"content-type", b""):
            while more := await conn.read_some():
                first += more
            if head.status >= 400:
                return Failed(failure=Failure.ANSWERED, status=head.status, text=first.decode("utf-8", "replace"), kept=Kept(head=head, body=first))
            return Good(head=head, first=first, whole=True)
    except UpstreamGarbled as error:
        return Failed(failure=Failure.GARBLED, text=str(error))
    except UpstreamCut as error:
        return Failed(failure=Failure.DIED, text=str(error))
    if not first:
        return Failed(failure=Failure.EMPTY, text="the node answered with nothing")
    return Good(head=head, first=first, whole=False)


def _framed(good: Good, data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if good.chunked else data


async def pour(good: Good, conn: UpstreamConnection, client: ClientConnection, *, head_bytes: bytes, route: Route) -> Poured:
    good.started = True
    data = good.first
    await client.send(head_bytes + _framed(good, data))
    good.body_bytes = len(data)
    try:
        while not good.whole and (data := await conn.read_some()):
            await client.send(_framed(good, data))
            good.body_bytes += len(data)
    except UpstreamCut as error:
        await end_badly(good, client, route, str(error))
        return Poured(clean=False, error_text=str(error), body_bytes=good.body_bytes, node_failure=Failure.DIED)
    if good.chunked:
        await client.send(b"0\r\n\r\n")
    return Poured(body_bytes=good.body_bytes, chunks=conn.chunks_seen)


async def end_badly(good: Good, client: ClientConnection, route: Route, text: str) -> None:
    """Tell the client, in the route's manner, that the answer is not whole; then the connection must close without the last chunk."""
    client.must_close = True
    await client.send(_framed(good, in_band_error(route, text, mid_line=False)))


def in_band_error(route: Route, text: str, *, mid_line: bool) -> bytes:
    if route.protocol is Protocol.NATIVE:
        data = msgspec.json.encode({"error": text}) + b"\n"
    else:
        data = b"data: " + error_body(route.protocol, 500, text)[0].strip() + b"\n\n"
    return b"\n" + data if mid_line else data
