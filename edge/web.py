"""Everything that no node serves: passed to the web app over the internal connection, streaming both ways.

Decides nothing about the request; must never know what the web app does with it. The app learns who asks from two headers that only
the listener can set. Invariants: a body larger than the limit is refused before or while it is passed, never cut silently; an answer
that ends early at the app never ends properly at the client.
"""

from collections.abc import Callable
from typing import Final

import trio

from core.events import Upstream
from edge.headers import error_response, response_head, web_request_head
from edge.pool import DialFailed, Pool
from edge.wire import ClientConnection, ClientGone, HttpError, RequestHead, ResponseHead, UpstreamConnection, UpstreamCut
from edge.wire_heads import Framing

BODY_MAX_BYTES: Final = 256 << 20
_LAST_CHUNK: Final = b"0\r\n\r\n"
_DOWN: Final = "the router's web app does not answer; try again, or look into the router's log"


class WebPass:
    """Passes requests to the web app at `web`."""

    def __init__(
        self, web: Upstream, pool: Pool, *, secret: bytes, new_id: Callable[[], str], body_max_bytes: int = BODY_MAX_BYTES
    ) -> None:
        self._web = web
        self._pool = pool
        self._secret = secret
        self._new_id = new_id
        self._body_max_bytes = body_max_bytes

    async def serve(self, conn: ClientConnection, head: RequestHead, *, prefix: bytes = b"") -> None:
        """Answer one request. `prefix`: what was taken off its path, and belongs before any path that the answer leads to.

        Raises HttpError 413, ClientGone.
        """
        if head.content_length is not None and head.content_length > self._body_max_bytes and not _is_upload(head):
            raise self._too_large()
        try:
            upstream = self._pool.take(self._web) or await self._pool.dial(self._web)
            if not await self._exchange(conn, head, upstream, prefix):
                await self._exchange(conn, head, await self._pool.dial(self._web), prefix)
        except (DialFailed, UpstreamCut):
            await conn.send(error_response(503, _DOWN, request_id=self._new_id(), retry_after_s=1, keep_alive=not conn.must_close))

    def _too_large(self) -> HttpError:
        return HttpError(413, f"the request body is larger than {self._body_max_bytes} bytes (ROUTER_BODY_MAX_BYTES)")

    async def _exchange(self, conn: ClientConnection, head: RequestHead, upstream: UpstreamConnection, prefix: bytes) -> bool:
        """One try; False: the connection was stale, nothing happened yet. Raises UpstreamCut when the app gave no answer."""
        try:
            with trio.CancelScope() as scope:
                upstream.start(reused=upstream.reused, no_body=head.method == "HEAD")
                try:
                    await self._send_request(conn, head, upstream)
                    conn.begin(scope)
                    answer = await upstream.read_head()
                except UpstreamCut:
                    if upstream.reused and not upstream.bytes_received and not head.has_body:
                        return False
                    raise
                await self._pour(conn, head, answer, upstream, prefix)
                return True
            raise ClientGone("the client left")
        finally:
            conn.end()
            self._pool.give_back(upstream)

    async def _send_request(self, conn: ClientConnection, head: RequestHead, upstream: UpstreamConnection) -> None:
        """Head and body, the body as it comes; an early answer ends it. Raises UpstreamCut, HttpError, ClientGone."""
        host = f"[{conn.peer_host}]" if ":" in conn.peer_host else conn.peer_host
        body = head.has_body
        if body and _is_upload(head):
            body, conn.must_close = False, True
        request = web_request_head(head, peer=f"{host}:{conn.peer_port}", secret=self._secret, body=body)
        if not body:
            await upstream.send(request)
            return
        passed = 0
        while piece := await conn.read_body_some():
            passed += len(piece)
            if passed > self._body_max_bytes:
                raise self._too_large()
            await upstream.send(request + (_chunk(piece) if head.chunked else piece))
            request = b""
            if upstream.answer_waiting():
                return
        if head.chunked:
            await upstream.send(request + _LAST_CHUNK)

    async def _pour(
        self, conn: ClientConnection, head: RequestHead, answer: ResponseHead, upstream: UpstreamConnection, prefix: bytes
    ) -> None:
        framing: Framing = answer.framing
        if framing in ("chunked", "close"):
            framing = "chunked" if head.version == "1.1" else "close"
        if framing == "close":
            conn.must_close = True
        location = answer.fields.get(b"location", b"")
        extra = ((b"Location", prefix + location),) if prefix and location.startswith(b"/") else ()
        data = response_head(answer, framing=framing, keep_alive=not conn.must_close, extra=extra)
        try:
            # The head waits for no body byte: an event stream may be silent for long.
            if framing == "none" or not upstream.has_bytes:
                await conn.send(data)
                data = b""
            while piece := await upstream.read_some():
                await conn.send(data + (_chunk(piece) if framing == "chunked" else piece))
                data = b""
            if framing == "chunked":
                data += _LAST_CHUNK
            if data:
                await conn.send(data)
        except UpstreamCut:
            if not conn.answered:
                raise
            # Something of the answer is out: the missing end says that it is not whole.
            conn.must_close = True


def _is_upload(head: RequestHead) -> bool:
    """Whether the body may be of any size: the app answers by the head alone, so it is not read."""
    return head.path.startswith("/api/blobs/")


def _chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)
