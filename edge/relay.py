"""Bytes from a node to a client: held back until they are good, then poured as they come, and ended honestly.

Decides when an answer may go to the client and how it ends there; must never know nodes, models, retries or policy. The coordinator's
proxy and the agent's gateway use it alike.

Invariants: no byte goes to a client before the first body byte of a good answer is here; a held answer goes whole or not at all; a
stream that did not say itself that it is over ends in-band with an error in the route's manner, and without HTTP's last chunk, so that
the connection must close; what the node said in its own words passes byte for byte. Reading is prompt however slow the client:
`ClientConnection.send` holds back up to its bound before it makes us wait. A connection to a node is never half-closed.
"""

from collections.abc import Callable
from typing import Final

import msgspec

from core.events import Failure, Protocol, Route, Usage
from core.units import MIB
from edge.headers import error_body, go_json
from edge.verdicts import TAIL_BYTES, StreamJudge, error_text, usage_of, whole_fault
from edge.wire import ClientConnection, RequestHead, ResponseHead, UpstreamConnection, UpstreamCut, UpstreamGarbled
from edge.wire_heads import Framing

FAILURE_HEADER: Final = b"X-Ollama-Router-Failure"
"""On the 502 of a gateway whose Ollama failed before the first byte: which `Failure` it was."""

ERROR_MAX_BYTES: Final = MIB
"""An error answer that is longer is not kept."""

LAST_CHUNK: Final = b"0\r\n\r\n"

NO_END: Final = "the node ended its answer without saying that it was done"
REPEATED: Final = "the model repeated itself, and the node stopped it"

_FAILURE_KEY: Final = FAILURE_HEADER.lower()
FAILURES: Final = {failure.value.encode(): failure for failure in Failure}
"""By the header's value."""


class Kept(msgspec.Struct):
    """A node's own answer, whole, for a client that gets it as it came."""

    head: ResponseHead
    """Its `content_length` is the body's."""
    body: bytes
    text: str = ""

    @property
    def framing(self) -> Framing:
        """How it is sent."""
        return "length"

    def framed(self) -> bytes:
        """The body as it is sent."""
        return self.body


class Failed(msgspec.Struct):
    """An attempt that failed before a byte of it reached the client. Fields as in `core.events.AttemptEnded`."""

    failure: Failure
    status: int = 0
    text: str = ""
    repeat_guard: bool = False
    kept: Kept | None = None
    """The node's own answer, where it may be passed on if nobody does better."""


class Good(msgspec.Struct):
    """An answer whose first body byte is here."""

    head: ResponseHead
    first: bytes
    """The body so far; all of it if `whole`."""
    whole: bool
    judge: StreamJudge | None = None
    """Of a stream; None for an answer that is one value."""
    framing: Framing = "chunked"
    body_bytes: int = 0
    """Body bytes given to the client's connection."""

    @property
    def length(self) -> int | None:
        """Bytes of the body when they are known and will be kept to."""
        if self.whole:
            return len(self.first)
        return self.head.content_length if self.judge is None else None

    def framing_for(self, client: RequestHead) -> Framing:
        """How the body will follow for this client; `pour` keeps to it. A stream is never framed by length: an error must fit in."""
        if self.length is not None:
            self.framing = "none" if self.head.framing == "none" else "length"
        else:
            self.framing = "close" if client.version == "1.0" else "chunked"
        return self.framing


class Poured(msgspec.Struct):
    """What became of a good answer."""

    clean: bool = False
    """It ended properly, and well."""
    error_text: str = ""
    usage: Usage | None = None
    body_bytes: int = 0
    chunks: int = 0
    node_failure: Failure | None = None
    """Why the end was unclean: DIED (cut, or ended without its proper end), GARBLED; ANSWERED: the node itself told `error_text` in-band
    and then ended properly, as it would have told a 500; None: nobody's (the model repeated itself)."""


# ---------------------------------------------------------------- before the first byte


async def open_answer(conn: UpstreamConnection, *, route: Route, stream: bool, hold_bytes: int) -> Good | Failed:
    """Read and judge the beginning of an answer, after the request was sent.

    A stream is good with its first body byte. Any other answer is held until it is whole, or `hold_bytes` are here. An error answer
    (400 and above) is read whole. Waits as long as it takes. `stream`: what the client asked for; what counts is what came.
    """
    try:
        head = await conn.read_head()
        if head.status >= 400:
            return await _open_error(conn, head)
        if head.streams:
            return await _open_stream(conn, head, sse=head.fields[b"content-type"].startswith(b"text/"))
        return await _open_whole(conn, head, route, stream, hold_bytes)
    except UpstreamGarbled as garbled:
        return Failed(failure=Failure.GARBLED, text=str(garbled))
    except UpstreamCut as error:
        return Failed(failure=Failure.DIED, text=str(error))


async def _open_error(conn: UpstreamConnection, head: ResponseHead) -> Failed:
    body, whole = await _read_up_to(conn, ERROR_MAX_BYTES, await conn.read_some())
    text = error_text(body)
    told = FAILURES.get(head.fields.get(_FAILURE_KEY, b""))
    if told is not None:
        return Failed(failure=told, text=text)
    if not whole:
        conn.close()
        return Failed(failure=Failure.ANSWERED, status=head.status, text=text)
    return Failed(failure=Failure.ANSWERED, status=head.status, text=text, kept=_kept(head, body, text))


def _kept(head: ResponseHead, body: bytes, text: str) -> Kept:
    """With a head of its own: the node's may be shared with other answers."""
    own = ResponseHead(head.status, head.reason, head.headers, head.fields, "length", len(body), head.keeps)
    return Kept(head=own, body=body, text=text)


async def _open_stream(conn: UpstreamConnection, head: ResponseHead, *, sse: bool) -> Good | Failed:
    first = await conn.read_some()
    if not first:
        return Failed(failure=Failure.EMPTY, status=head.status, text="the node ended its answer before its first byte")
    return Good(head=head, first=first, whole=False, judge=StreamJudge(sse=sse))


async def _open_whole(conn: UpstreamConnection, head: ResponseHead, route: Route, stream: bool, hold_bytes: int) -> Good | Failed:
    body = await conn.read_some()
    if not conn.at_end:
        body, whole = await _read_up_to(conn, hold_bytes, body)
        if not whole:
            return Good(head=head, first=body, whole=False)
    fault = whole_fault(route, body) if head.status == 200 else None
    if fault is None:
        return Good(head=head, first=body, whole=True)
    kept = _kept(head, body, fault.text) if fault.failure is Failure.INCOMPLETE else None
    text = fault.text + (" (a stream was asked for)" if stream else "")
    return Failed(failure=fault.failure, status=head.status, text=text, repeat_guard=fault.repeat_guard, kept=kept)


async def _read_up_to(conn: UpstreamConnection, limit: int, first: bytes) -> tuple[bytes, bool]:
    """The body that begins with `first`, and whether that is all of it: reading stops once more than `limit` bytes are here."""
    parts = [first]
    size = len(first)
    while parts[-1] and size <= limit:
        parts.append(await conn.read_some())
        size += len(parts[-1])
    return b"".join(parts), not parts[-1]


# ---------------------------------------------------------------- from the first byte on


async def give_whole(good: Good, conn: UpstreamConnection, client: ClientConnection, *, head_bytes: bytes, route: Route) -> Poured:
    """`pour` for an answer that is here whole: nothing is left to wait for, or to judge. Raises ClientGone."""
    body = good.first
    good.body_bytes = len(body)
    await client.send(head_bytes + body)
    return Poured(clean=True, usage=usage_of(body[-TAIL_BYTES:], route.protocol), body_bytes=len(body), chunks=conn.chunks_seen)


async def pour(
    good: Good,
    conn: UpstreamConnection,
    client: ClientConnection,
    *,
    head_bytes: bytes,
    route: Route,
    on_chunk: Callable[[bytes], None] | None = None,
) -> Poured:
    """Give the client the head, what is here of the body, and the rest as it comes; end as the node did, or honestly.

    Each read of the node goes out at once, as one chunk. `good.framing_for` was asked before. `on_chunk` sees the body's bytes. When
    the result is not clean the client's connection must close (`must_close` is set). Raises ClientGone.
    """
    if good.framing == "close":
        client.must_close = True
    elif good.whole:
        if on_chunk is not None:
            on_chunk(good.first)
        return await give_whole(good, conn, client, head_bytes=head_bytes, route=route)
    data = good.first
    out = head_bytes + framed(good, data) if data else head_bytes
    judge = good.judge
    cut: UpstreamCut | None = None
    while True:
        if data:
            good.body_bytes += len(data)
            if judge is not None:
                judge.feed(data)
            if on_chunk is not None:
                on_chunk(data)
        if not conn.has_bytes:  # else what comes next, often the end, goes out with it
            await client.send(out)
            out = b""
        try:
            data = await conn.read_some()
        except UpstreamCut as error:
            cut = error.with_traceback(None)  # which holds this frame, which holds `cut`
            break
        if not data:
            break
        out += framed(good, data)
    return await finish(good, client, route, out, cut, chunks=conn.chunks_seen)


async def finish(good: Good, client: ClientConnection, route: Route, out: bytes, cut: UpstreamCut | None, *, chunks: int) -> Poured:
    """Judge how the node ended, and end so, after `out`. `cut`: how its connection ended, if not well. Raises ClientGone."""
    poured = Poured(body_bytes=good.body_bytes, chunks=chunks)
    judge = good.judge
    told = judge is None  # the answer itself says that it is over, or cannot say so
    if judge is not None:
        end = judge.end()
        poured.usage = judge.usage(route.protocol)
        poured.error_text = end.error or ""
        told = end.proper and not (cut is not None and judge.mid_line)
        if told and end.error is None:
            cut = None  # all was said: only HTTP's own end was lost
    if cut is not None:
        poured.node_failure = Failure.GARBLED if isinstance(cut, UpstreamGarbled) else Failure.DIED
        poured.error_text = poured.error_text or str(cut)
    elif poured.error_text:
        poured.node_failure = Failure.ANSWERED
    elif judge is not None and not told:
        guard = judge.ends_in_repeats()
        poured.node_failure = None if guard else Failure.DIED
        poured.error_text = REPEATED if guard else NO_END
    poured.clean = not poured.error_text
    if cut is None and told:
        out += LAST_CHUNK if good.framing == "chunked" else b""
    else:
        client.must_close = True
        if judge is not None and not told:
            out += framed(good, in_band_error(route, poured.error_text, mid_line=judge.mid_line))
    if out:
        await client.send(out)
    return poured


def framed(good: Good, data: bytes) -> bytes:
    """`data` as it is sent: one chunk, where the answer is sent in chunks."""
    return b"%x\r\n%b\r\n" % (len(data), data) if good.framing == "chunked" else data


def in_band_error(route: Route, text: str, *, mid_line: bool) -> bytes:
    """The last words of a stream that failed, in the route's manner; after a line end where the stream stopped within a line."""
    match route.protocol:
        case Protocol.NATIVE:
            data = error_body(Protocol.NATIVE, 502, text)[0] + b"\n"
        case Protocol.OPENAI:
            data = b"data: " + error_body(Protocol.OPENAI, 502, text)[0].rstrip() + b"\n\n"
        case Protocol.RESPONSES:
            response = {"object": "response", "status": "failed", "error": {"code": "server_error", "message": text}}
            data = b"event: response.failed\ndata: " + go_json({"type": "response.failed", "response": response}) + b"\n\n"
        case Protocol.ANTHROPIC:
            error = {"type": "error", "error": {"type": "overloaded_error", "message": text}}
            data = b"event: error\ndata: " + go_json(error) + b"\n\n"
    return b"\n" + data if mid_line else data
