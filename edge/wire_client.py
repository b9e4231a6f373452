"""HTTP/1.1 over non-blocking sockets: the client's role.

Decides where an answer begins, ends, or was cut; must never know what it means. Answers are read by llhttp (`httptools`), one parser
per connection; what one read brought comes back as one bytes object.

An early answer (a node that refuses a large body before it is sent) is noticed while sending: the rest is not sent, the answer is read.
Invariants: b"" from `read_some` means that the framing said so, everything else is `UpstreamCut`; a connection is never half-closed
(Ollama takes that for a client that left); it is `reusable` only after a clean end with nothing behind it.
"""

import socket
from typing import Final

import httptools
import trio
from trio.lowlevel import notify_closing, wait_readable, wait_writable

from core.events import Upstream
from edge.wire_heads import HEAD_MAX_BYTES, Framing, ResponseHead, fold_fields
from edge.wire_watch import NEVER, Watch

RECEIVE_BYTES: Final = 64 << 10
SEND_PATIENCE_S: Final = 60.0
"""A node that takes no byte of a request for so long is given up."""
_READS_IN_A_ROW: Final = 8
_NO_BODY: Final = (204, 304)


class UpstreamCut(Exception):
    """The node ended early, reset the connection, or stopped reading."""


class UpstreamGarbled(UpstreamCut):
    """What the node sent is not HTTP."""


class UpstreamConnection:
    """One connection to a node; one request at a time.

    `reused`: it came from the pool, so a break before any byte may be a stale keep-alive. `bytes_sent` and `bytes_received` count this
    request's bytes; `chunks_seen` its HTTP chunks. `peer_left`: the node closed its side.
    """

    __slots__ = (
        "_chunks",
        "_closed",
        "_complete",
        "_cut",
        "_early",
        "_framing_keeps",
        "_head",
        "_head_bytes",
        "_headers",
        "_interim",
        "_more",
        "_no_body",
        "_parser",
        "_pieces",
        "_reason",
        "_strangers",
        "_streak",
        "_watch",
        "bytes_received",
        "bytes_sent",
        "chunks_seen",
        "deadline",
        "fd",
        "idle_in",
        "on_body",
        "peer_left",
        "reused",
        "sock",
        "upstream",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, upstream: Upstream, watch: Watch) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.upstream = upstream
        self.deadline = NEVER
        self.peer_left = False
        self.idle_in: list[UpstreamConnection] | None = None
        self._watch = watch
        self._closed = False
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # called by the parser, without a Python frame per chunk
        self._parser = httptools.HttpResponseParser(self)
        self._strangers = False
        self.start(reused=False)
        watch.add(self)

    def start(self, *, reused: bool, no_body: bool = False) -> None:
        """Make ready for a request. `no_body`: it is a HEAD, whose answer has none whatever its headers say."""
        self.reused = reused
        self.bytes_sent = self.bytes_received = self.chunks_seen = 0
        self._no_body = no_body
        self._head: ResponseHead | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._reason = b""
        self._head_bytes = 0
        self._interim = self._complete = self._early = self._more = self._framing_keeps = False
        self._cut: UpstreamCut | None = None
        self._streak = 0
        self._pieces.clear()

    # ------------------------------------------------------------ sending

    async def send(self, data: bytes) -> None:
        """Send request bytes. Once the node has answered early, does nothing. Raises UpstreamCut: the node did not take it whole."""
        if self._early:
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._after_broken_send(error)
            return
        self.bytes_sent += sent
        if sent < len(data):
            await self._send_rest(memoryview(data)[sent:])

    async def _send_rest(self, view: memoryview) -> None:
        while view and not self._early:
            self.deadline = self._watch.now + SEND_PATIENCE_S
            try:
                await self._wait_either()
                sent = self.sock.send(view)
            except BlockingIOError:
                sent = 0
            except trio.ClosedResourceError:
                raise UpstreamCut("the node stopped reading the request") from None
            except OSError as error:
                self._after_broken_send(error)
                return
            finally:
                self.deadline = NEVER
            self.bytes_sent += sent
            view = view[sent:]
            if view:
                self._hear_early()

    async def _wait_either(self) -> None:
        """Until the node takes or sends bytes. Rare enough for a nursery: only in the middle of a large body."""
        async with trio.open_nursery() as nursery:

            async def readable() -> None:
                await wait_readable(self.fd)
                nursery.cancel_scope.cancel()

            nursery.start_soon(readable)
            try:
                await wait_writable(self.fd)
            finally:
                nursery.cancel_scope.cancel()

    def _hear_early(self) -> None:
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            raise UpstreamCut(f"the connection broke while the request was sent: {error.strerror}") from None
        if not data:
            raise UpstreamCut("the node closed the connection while the request was sent")
        self._early = True
        self._feed(data)

    def _after_broken_send(self, error: OSError) -> None:
        """The node closed: it may have said why before."""
        try:
            self._hear_early()
        except UpstreamCut:
            pass
        if not self._early:
            raise UpstreamCut(f"the connection broke while the request was sent: {error.strerror}") from None

    def answer_waiting(self) -> bool:
        """Whether the node has answered before the request was sent whole."""
        return self._early

    # ------------------------------------------------------------ receiving

    @property
    def has_bytes(self) -> bool:
        """Whether `read_some` returns or raises without waiting."""
        return bool(self._pieces) or self._complete or self._cut is not None

    async def read_head(self) -> ResponseHead:
        """The answer's head; interim ones (1xx) are skipped. Waits for ever: silence is normal. Raises UpstreamCut."""
        while self._head is None:
            if self._cut is not None:
                raise self._cut
            await self._receive()
        return self._head

    async def read_some(self) -> bytes:
        """Body bytes: all that one read brought; b"" is the clean end. Raises UpstreamCut when it came too early."""
        pieces = self._pieces
        while True:
            if pieces:
                data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                pieces.clear()
                return data
            if self._complete:
                return b""
            if self._cut is not None:
                raise self._cut
            await self._receive()

    async def _receive(self) -> None:
        while True:
            if self._more and self._streak < _READS_IN_A_ROW:
                self._streak += 1
            else:
                self._streak = 0
                await self._wait_readable()
            try:
                data = self.sock.recv(RECEIVE_BYTES)
                break
            except BlockingIOError:
                self._more = False
            except OSError as error:
                self._cut = UpstreamCut(f"the node broke the connection: {error.strerror}")
                return
        self._more = len(data) == RECEIVE_BYTES
        if data:
            self._feed(data)
        elif self._head is not None and self._head.framing == "close":
            self._complete = True
        else:
            self._cut = UpstreamCut("the node closed the connection before its answer was whole")

    async def _wait_readable(self) -> None:
        try:
            await wait_readable(self.fd)
        except trio.ClosedResourceError:
            raise UpstreamCut("the connection was closed") from None

    def _feed(self, data: bytes) -> None:
        self.bytes_received += len(data)
        if self._head is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._complete:
                self._strangers = True
            else:
                self._cut = UpstreamGarbled(f"the node's answer is not HTTP: {error}")
        if self._head is None and self._head_bytes > HEAD_MAX_BYTES and self._cut is None:
            self._cut = UpstreamGarbled(f"the node's headers are larger than {HEAD_MAX_BYTES} bytes")

    # ------------------------------------------------------------ called by the parser

    def on_message_begin(self) -> None:
        if self._complete:
            self._strangers = True

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self._complete:
            return
        status = self._parser.get_status_code()
        headers = self._headers
        if status < 200:
            self._interim = True
            self._headers = []
            self._reason = b""
            return
        fields = {name.lower(): value for name, value in headers}
        if len(fields) != len(headers):
            fields = fold_fields(headers)
        framing: Framing = "close"
        length: int | None = None
        if self._no_body or status in _NO_BODY:
            framing = "none"
        elif b"transfer-encoding" in fields:
            framing = "chunked" if fields[b"transfer-encoding"].lower() == b"chunked" else "close"
        elif b"content-length" in fields:
            framing = "length"
            length = int(fields[b"content-length"])
        self._framing_keeps = framing != "close" and self._parser.should_keep_alive()
        self._head = ResponseHead(status, self._reason, headers, fields, framing, length)
        if framing == "none":
            self._complete = True
            if self._no_body:
                # llhttp would wait for the body that the headers announce.
                self._parser = httptools.HttpResponseParser(self)

    def on_chunk_header(self) -> None:
        self.chunks_seen += 1

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
        elif self._head is not None and not self._complete:
            self._complete = True
            if self._head.framing == "chunked":
                self.chunks_seen -= 1  # the last one is empty

    # ------------------------------------------------------------ between requests, and the end

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        return (
            self._complete
            and self._framing_keeps
            and not (self._strangers or self._early or self._closed or self.peer_left or self._pieces)
        )

    @property
    def in_work(self) -> bool:
        """For a watch without epoll: an idle connection is looked at, one in use is read anyway."""
        return self.idle_in is not None

    def alive(self) -> bool:
        """Whether an idle connection may be used: open, and nothing came that nobody asked for."""
        if self.peer_left or self._closed:
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def on_left(self) -> None:
        """The watch saw the node close its side. In the middle of an answer the end is read in its place."""
        self.peer_left = True
        if self.idle_in is not None:
            self.close()

    def on_deadline(self, now: float) -> None:
        """Idle for too long, or a send that stands still."""
        self.deadline = NEVER
        if self.idle_in is not None:
            self.close()
        else:
            notify_closing(self.fd)

    def close(self) -> None:
        """Close whole, never half. May be called twice."""
        if not self._closed:
            self._closed = True
            if self.idle_in is not None:
                self.idle_in.remove(self)
                self.idle_in = None
            self._watch.discard(self)
            notify_closing(self.fd)
            self.sock.close()
