"""HTTP/1.1 over non-blocking sockets: the client's role.

Decides where an answer begins, ends, or was cut; must never know what it means. Chunked bodies are read by llhttp (`httptools`:
0.2 µs a chunk, a loop in Python takes 0.5), one parser per connection; what one read brought comes back as one bytes object.

An early answer (a node that refuses a large body before it is sent) is noticed while sending: the rest is not sent, the answer is read.
Invariants: b"" from `read_some` means that the framing said so, everything else is `UpstreamCut`; a connection is never half-closed
(Ollama takes that for a client that left); it is `reusable` only after a clean end with nothing behind it.
"""

import socket
from typing import Final

import httptools
import trio
from trio.lowlevel import checkpoint, wait_writable

from core.events import Upstream
from edge.wire_heads import HEAD_MAX_BYTES, ResponseHead, parse_response_head
from edge.wire_watch import NEVER, Watch, WatchedSocket

RECEIVE_BYTES: Final = 64 << 10
SEND_PATIENCE_S: Final = 60.0
"""A node that takes no byte of a request for so long is given up."""
READS_IN_A_ROW: Final = 8
"""After so many reads without waiting others get their turn."""
_BEGINNING: Final = b"HTTP/1."
_CHUNKS_FOLLOW: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
"""Puts llhttp where a chunked body begins: the heads themselves are read by `edge.wire_heads`."""


class UpstreamCut(Exception):
    """The node ended early, reset the connection, or stopped reading."""


class UpstreamGarbled(UpstreamCut):
    """What the node sent is not HTTP."""


class UpstreamConnection(WatchedSocket):
    """One connection to a node; one request at a time.

    `reused`: it came from the pool, so a break before any byte may be a stale keep-alive. `bytes_sent` and `bytes_received` count this
    request's bytes; `chunks_seen` its HTTP chunks.
    """

    __slots__ = (
        "_complete",
        "_cut",
        "_decoder",
        "_early",
        "_head",
        "_held",
        "_left",
        "_no_body",
        "_pieces",
        "_strangers",
        "_streak",
        "bytes_received",
        "bytes_sent",
        "chunks_seen",
        "idle_in",
        "on_body",
        "reused",
        "upstream",
    )  # fmt: skip

    def __init__(self, sock: socket.socket, upstream: Upstream, watch: Watch) -> None:
        self.upstream = upstream
        self.idle_in: list[UpstreamConnection] | None = None
        self._pieces: list[bytes] = []
        self.on_body = self._pieces.append  # called by llhttp, without a Python frame per chunk
        self._decoder: httptools.HttpResponseParser | None = None
        self._strangers = False
        self.start(reused=False)
        super().__init__(sock, watch)

    def start(self, *, reused: bool, no_body: bool = False) -> None:
        """Make ready for a request. `no_body`: it is a HEAD, whose answer has none whatever its headers say."""
        self.reused = reused
        self.bytes_sent = self.bytes_received = self.chunks_seen = 0
        self._no_body = no_body
        self._head: ResponseHead | None = None
        self._held = b""  # an unfinished head
        self._left = 0  # of a body with a length
        self._complete = self._early = False
        self._cut: UpstreamCut | None = None
        self._streak = 0

    # ------------------------------------------------------------ sending

    async def send(self, data: bytes) -> None:
        """Send request bytes. Once the node has answered early, does nothing. Raises UpstreamCut: the node did not take it whole."""
        if self._early:
            return
        try:
            sent = self.send_now(data)
        except OSError as error:
            self._after_broken_send(error)
            return
        if sent < len(data):
            await self._send_rest(memoryview(data)[sent:])

    def send_now(self, data: bytes) -> int:
        """Send what goes without waiting. Returns how many bytes went. Raises OSError."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return 0
        self.bytes_sent += sent
        return sent

    async def _send_rest(self, view: memoryview) -> None:
        while view and not self._early:
            self.deadline = self.watch.now + SEND_PATIENCE_S
            try:
                await self._wait_either()
            finally:
                self.deadline = NEVER
            if self.timed_out or self.closed:
                raise UpstreamCut("the node stopped taking the request")
            if self.readable:
                self._hear_early()
                continue
            try:
                sent = self.sock.send(view)
            except BlockingIOError:
                continue
            except OSError as error:
                self._after_broken_send(error)
                return
            self.bytes_sent += sent
            view = view[sent:]

    async def _wait_either(self) -> None:
        """Until the node takes or sends bytes. Rare enough for a nursery: only in the middle of a large body."""
        async with trio.open_nursery() as nursery:

            async def writable() -> None:
                try:
                    await wait_writable(self.fd)
                except trio.ClosedResourceError:
                    pass
                nursery.cancel_scope.cancel()

            nursery.start_soon(writable)
            if not self.readable:
                await self.park()
            nursery.cancel_scope.cancel()

    def _hear_early(self) -> None:
        """Read what the node says before it has the whole request. Raises UpstreamCut when it is an end."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            self.readable = False
            return
        except OSError as error:
            raise UpstreamCut(f"the connection broke while the request was sent: {error.strerror}") from None
        if not data:
            raise UpstreamCut("the node closed the connection while the request was sent")
        self._feed(data)
        # An interim answer (1xx) is no reason to stop.
        self._early = self._head is not None or self._cut is not None

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
    def head(self) -> ResponseHead | None:
        """The answer's head, once it is here."""
        return self._head

    @property
    def is_cut(self) -> bool:
        """Whether the node ended, or was left, before its answer was whole."""
        return self._cut is not None

    @property
    def has_bytes(self) -> bool:
        """Whether `read_some` returns or raises without waiting."""
        return bool(self._pieces) or self._complete or self._cut is not None

    @property
    def at_end(self) -> bool:
        """Whether all of the body was read, and the answer ended well."""
        return self._complete and not self._pieces

    async def read_head(self) -> ResponseHead:
        """The answer's head; interim ones (1xx) are skipped. Waits for ever: silence is normal. Raises UpstreamCut."""
        while self._head is None:
            if self._cut is not None:
                raise self._ended()
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
                raise self._ended()
            await self._receive()

    async def _receive(self) -> None:
        while True:
            if not self.readable:
                self._streak = 0
                await self.park()
                if self.closed:
                    raise self._ended()
                if not self.readable:
                    continue
            elif self._streak == READS_IN_A_ROW:
                self._streak = 0
                await checkpoint()
            self._streak += 1
            if self.receive_now():
                return

    def _ended(self) -> UpstreamCut:
        """Why nothing more comes, as an exception of its own: one that is kept here would hold its frames, and they this connection."""
        cut = self._cut
        return UpstreamCut("the connection was closed") if cut is None else type(cut)(*cut.args)

    def receive_now(self) -> bool:
        """Take what is here. Returns whether it was anything: bytes, or an end."""
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            self.readable = False
            return False
        except OSError as error:
            self._cut = UpstreamCut(f"the node broke the connection: {error.strerror}")
            return True
        if len(data) < RECEIVE_BYTES and not self.ended:
            self.readable = False
        if data:
            if self._head is not None or self._held or not self._feed_whole(data):
                self._feed(data)
        elif self._head is not None and self._head.framing == "close":
            self._complete = True
        else:
            self._cut = UpstreamCut("the node closed the connection before its answer was whole")
        return True

    def whole(self) -> tuple[ResponseHead, bytes] | None:
        """The answer, if it is here whole and nothing of its body was read yet. It stays to be read, until `drop`."""
        head, pieces = self._head, self._pieces
        if head is None or not self._complete or self._cut is not None:
            return None
        return head, pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def drop(self) -> None:
        """What is here of the body was seen."""
        self._pieces.clear()

    def _feed_whole(self, data: bytes) -> bool:
        """Take all of the commonest answer at once: its head, and the whole body, whose length that tells. False: it is another one."""
        end = data.find(b"\r\n\r\n") + 4
        try:
            head = parse_response_head(data[:end], no_body=self._no_body)
        except ValueError:
            return False
        size = len(data)
        if head.status < 200 or head.framing != "length" or head.content_length != size - end:
            return False
        self._head = head
        self.bytes_received += size
        if size > end:
            self._pieces.append(data[end:])
        self._complete = True
        return True

    def _feed(self, data: bytes) -> None:
        self.bytes_received += len(data)
        head = self._head
        if head is None:
            data = self._feed_head(data)
            head = self._head
            if head is None:
                return
        framing = head.framing
        if framing == "chunked":
            self._feed_chunks(data)
        elif framing == "close":
            if data:
                self._pieces.append(data)
        else:
            if len(data) > self._left:
                self._strangers = True
                data = data[: self._left]
            if data:
                self._pieces.append(data)
            self._left -= len(data)
            self._complete = not self._left

    def _feed_head(self, data: bytes) -> bytes:
        """Read the head if it is whole; returns what follows it. Interim heads are dropped."""
        if self._held:
            data = self._held + data
        while True:
            end = data.find(b"\r\n\r\n") + 4
            if end == 3:
                self._held = data
                if len(data) > HEAD_MAX_BYTES or not _BEGINNING.startswith(data[: len(_BEGINNING)]):
                    self._cut = UpstreamGarbled("the node's answer does not begin with HTTP headers")
                return b""
            try:
                head = parse_response_head(data[:end], no_body=self._no_body)
            except ValueError as error:
                self._cut = UpstreamGarbled(f"the node's answer is not HTTP: {error}")
                return b""
            data = data[end:]
            if head.status >= 200:
                break
        self._head = head
        self._held = b""
        self._left = head.content_length or 0
        if head.framing == "chunked":
            if self._decoder is None:
                self._decoder = httptools.HttpResponseParser(self)
            self._decoder.feed_data(_CHUNKS_FOLLOW)
        return data

    def _feed_chunks(self, data: bytes) -> None:
        assert self._decoder is not None
        try:
            self._decoder.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self._complete:
                self._strangers = True
            else:
                self._cut = UpstreamGarbled(f"the node's chunks are malformed: {error}")

    # ------------------------------------------------------------ called by llhttp, which reads chunked bodies

    def on_message_begin(self) -> None:
        if self._complete:
            self._strangers = True

    def on_chunk_header(self) -> None:
        self.chunks_seen += 1

    def on_message_complete(self) -> None:
        self.chunks_seen -= 1  # the last one is empty
        self._complete = True

    # ------------------------------------------------------------ between requests, and the end

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        head = self._head
        if head is None or not (self._complete and head.keeps):
            return False
        return not (self._strangers or self._early or self.closed or self.ended or self._pieces)

    def alive(self) -> bool:
        """Whether an idle connection may be used: open, and nothing came that nobody asked for."""
        if self.watch.edges and not self.readable:
            return not self.closed
        return not self.closed and self.peek() is None

    @property
    def wants_peek(self) -> bool:
        return self.idle_in is not None

    def on_left(self) -> None:
        """In the middle of an answer the end is read in its place."""
        if self.idle_in is not None:
            self.close()

    def on_deadline(self, now: float) -> None:
        """Idle for too long, or a send that stands still."""
        self.deadline = NEVER
        if self.idle_in is not None:
            self.close()
        else:
            self.timed_out = True
            self.wake()

    def abandon(self, why: str) -> None:
        """Close, and let whoever reads or sends know why: UpstreamCut with this text."""
        if not self.closed and self._cut is None:
            self._cut = UpstreamCut(why)
        self.close()

    def close(self) -> None:
        """Close whole, never half. May be called twice."""
        if self.idle_in is not None:
            self.idle_in.remove(self)
            self.idle_in = None
        super().close()
        self._decoder = None  # it holds this connection: together they would wait for the garbage collector
        if self.eager is not None:
            self.eager()
