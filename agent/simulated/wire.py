"""HTTP/1.1 of a simulated Ollama: requests in, raw bytes out.

Decides framing, header order and what a connection does next; never what is said. The write path is its own, so that a fault can
make HTTP that a library would repair.

Invariants: nothing is written before the first body byte of an answer is there; a client that closes or half-closes cancels
the request in work at once.
"""

import re
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, NoReturn
from urllib.parse import unquote_to_bytes

import httptools
import trio

from agent.simulated.answers import http_date
from agent.simulated.native import Wall

RECEIVE_BYTES: Final = 1 << 16
HEAD_LIMIT: Final = 1 << 20
BODY_LIMIT: Final = 1 << 28
LENGTH_LIMIT: Final = 2048
"""Larger answers are chunked."""
PIPELINED: Final = 4
LINGER_S: Final = 0.5
ABSOLUTE: Final = re.compile(rb"(?i)^https?://[^/?]*")
"""What a proxy's client puts before the path."""
REASONS: Final = {
    200: b"OK", 201: b"Created",
    204: b"No Content", 301: b"Moved Permanently", 307: b"Temporary Redirect", 400: b"Bad Request", 401: b"Unauthorized",
    403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed", 429: b"Too Many Requests", 499: b"status code 499",
    500: b"Internal Server Error", 501: b"Not Implemented", 502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout",
}  # fmt: skip

Header = tuple[bytes, bytes]


class ConnectionOver(Exception):
    """Nothing more can be said on this connection."""


class Request:
    """One request, whole. `path` is percent-decoded, `fields` has lower-case names, the last of equal ones."""

    __slots__ = ("body", "fields", "headers", "http10", "keep_alive", "method", "noted", "path", "target", "truncated", "unread")

    def __init__(self, method: str, target: bytes, headers: list[Header], *, http10: bool, keep_alive: bool) -> None:
        self.method = method
        self.target = target
        origin_form = ABSOLUTE.sub(b"", target) or b"/"
        self.path = unquote_to_bytes(origin_form.partition(b"?")[0]).decode("utf-8", "replace")
        self.headers = headers
        self.fields = {name.lower(): value for name, value in headers}
        self.http10 = http10
        self.keep_alive = keep_alive
        self.body = bytearray()
        self.truncated = False  # the client stopped sending before the end of the body
        self.noted = False  # what whoever was asked about the body found when the head came
        self.unread = False  # nobody wants the body: the answer is final, and the connection good for nothing more

    @property
    def host_trouble(self) -> bytes | None:
        """What is wrong with its `Host`, as the status line of the refusal."""
        hosts = sum(name.lower() == b"host" for name, _ in self.headers)
        if hosts > 1:
            return b"400 Bad Request"
        return None if hosts or self.http10 else b"400 Bad Request: missing required Host header"


class _Parser:
    """httptools' callbacks, gathering requests. `unread` says whose body nobody wants; with such a one the connection is over."""

    def __init__(self, unread: Callable[[Request], bool]) -> None:
        self._unread = unread
        self.stopped = False
        self.http = httptools.HttpRequestParser(self)
        self.ready: list[Request] = []
        self.expecting = False  # a head asked for leave to send its body
        self._target = b""
        self._headers: list[Header] = []
        self._head_bytes = 0
        self._request: Request | None = None

    def on_message_begin(self) -> None:
        self._target, self._headers, self._head_bytes, self._request = b"", [], 0, None

    def on_url(self, url: bytes) -> None:
        self._target += url
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))
        self._count(len(name) + len(value))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_LIMIT:
            raise ConnectionOver

    def on_headers_complete(self) -> None:
        method = self.http.get_method().decode("latin-1")
        http10 = self.http.get_http_version() == "1.0"
        self._request = Request(method, self._target, self._headers, http10=http10, keep_alive=self.http.should_keep_alive())
        if self._unread(self._request):
            self._request.unread = self.stopped = True
            self.ready.append(self._request)
        elif self._request.fields.get(b"expect", b"").lower() == b"100-continue":
            self.expecting = True

    def on_body(self, body: bytes) -> None:
        assert self._request is not None
        if self.stopped:
            return
        self._request.body += body
        if len(self._request.body) > BODY_LIMIT:
            raise ConnectionOver

    def on_message_complete(self) -> None:
        assert self._request is not None
        if not self.stopped:
            self.ready.append(self._request)
            self._request = None

    def resume(self) -> None:
        """Read on with what follows a request for another protocol."""
        self.http = httptools.HttpRequestParser(self)

    def cut_off(self) -> Request | None:
        """The request whose body did not come to its end."""
        if self._request is not None:
            self._request.truncated = True
            self._request.keep_alive = False
        return self._request


class Connection:
    """A client's connection: one task reads, another answers."""

    def __init__(self, sock: trio.socket.SocketType, unread: Callable[[Request], bool]) -> None:
        self._sock = sock
        self._unread = unread
        self.lingers = False  # what is still being sent is not read
        self._send_requests, self._requests = trio.open_memory_channel[Request](PIPELINED)
        self._scope: trio.CancelScope | None = None
        self.gone_at: float | None = None
        self.loopback = str(sock.getsockname()[0]).startswith(("127.", "::1"))

    async def read(self) -> None:
        """Read until the client stops sending; then whatever is in work is cancelled."""
        parser = _Parser(self._unread)
        async with self._send_requests:
            try:
                while data := await self._sock.recv(RECEIVE_BYTES):
                    try:
                        parser.http.feed_data(data)
                    except httptools.HttpParserUpgrade:  # to HTTP/2, say: Ollama goes on as if it had not been asked
                        parser.resume()
                    if parser.expecting:
                        await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
                        parser.expecting = False
                    for request in parser.ready:
                        if (wrong := request.host_trouble) is not None:
                            await self._refuse(wrong)
                            return
                        await self._send_requests.send(request)
                    parser.ready.clear()
                    if parser.stopped:
                        self.lingers = True
                        return
                if (cut := parser.cut_off()) is not None:
                    await self._send_requests.send(cut)
                    return
            except httptools.HttpParserError:
                await self._refuse(b"400 Bad Request")
            except (OSError, trio.ClosedResourceError, trio.BrokenResourceError, ConnectionOver):
                pass
            self.gone_at = trio.current_time()
            if self._scope is not None:
                self._scope.cancel()

    async def _refuse(self, text: bytes) -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\n%s" % (text, text)
        try:
            await self.send(head)
        except ConnectionOver:
            pass

    async def next_request(self) -> Request | None:
        """The next request, or None when there will be none."""
        try:
            return await self._requests.receive()
        except trio.EndOfChannel:
            return None

    def begin(self) -> trio.CancelScope:
        """A scope for the work on a request; it is cancelled when the client leaves."""
        self._scope = trio.CancelScope()
        if self.gone_at is not None:
            self._scope.cancel()
        return self._scope

    async def send(self, data: bytes) -> None:
        """Raises `ConnectionOver` when the client does not take it."""
        view = memoryview(data)
        try:
            while view:
                view = view[await self._sock.send(view) :]
        except (OSError, trio.ClosedResourceError):
            raise ConnectionOver from None

    async def linger(self) -> None:
        """Say that nothing more comes, and give the client time to read that before unread bytes make a reset of it."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return
        await trio.sleep(LINGER_S)

    def reset(self) -> NoReturn:
        """End the connection with RST."""
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:
            pass
        raise ConnectionOver

    def close(self) -> None:
        """End the connection."""
        self._sock.close()


class Reply:
    """The answer to one request, written as Go writes it."""

    def __init__(self, connection: Connection, request: Request, wall: Wall, *, banner: bytes) -> None:
        self.connection = connection
        self.request = request
        self.status = 0
        self.began = False  # the head is out
        self.first_byte: float | None = None
        self.last_byte: float | None = None
        self.keep_alive = request.keep_alive and not request.unread
        self.piece_bytes = 0  # drip: write in pieces of so many bytes
        self.pause_s = 0.0
        self.hang_up = False  # close the connection after this answer, without a word
        self.extra: list[Header] = []  # headers that the gate adds
        self._wall = wall
        self._banner = banner
        self._chunked = False

    async def whole(
        self, status: int, body: bytes, content_type: str, headers: Sequence[Header] = (), *, chunked: bool = False, bare: bool = False
    ) -> None:
        """The whole answer; `chunked` as streams have it, else by its size. `bare` says nothing of its length."""
        bare = bare or (self.request.method == "HEAD" and len(body) > LENGTH_LIMIT)
        chunked = (chunked or len(body) > LENGTH_LIMIT) and not self.request.http10 and not bare
        head = self._head(status, content_type, headers, length=None if chunked or bare else len(body), chunked=chunked)
        if self.request.method == "HEAD":
            await self.raw(head)
        elif chunked:
            await self.raw(b"%s%x\r\n%s\r\n0\r\n\r\n" % (head, len(body), body))
        else:
            await self.raw(head + body)

    async def cut_whole(self, body: bytes, content_type: str) -> None:
        """Half of a whole answer, and the end of the connection."""
        await self.raw(self._head(200, content_type, (), length=len(body), chunked=False) + body[: len(body) // 2])
        raise ConnectionOver

    async def begin(self, content_type: str) -> None:
        """The head of a stream."""
        self._chunked = not self.request.http10
        await self.raw(self._head(200, content_type, (), length=None, chunked=self._chunked))

    def framed(self, data: bytes) -> bytes:
        """`data` as one chunk."""
        return b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data

    async def chunks(self, content_type: str, writes: Sequence[bytes]) -> None:
        """Writes of a stream that are due together, a chunk each, with the head before the first."""
        head = b""
        if not self.status:
            self._chunked = not self.request.http10
            head = self._head(200, content_type, (), length=None, chunked=self._chunked)
        await self.raw(head + b"".join(map(self.framed, writes)))

    async def end(self) -> None:
        """The clean end of a stream."""
        if self._chunked:
            await self.raw(b"0\r\n\r\n")

    async def raw(self, data: bytes) -> None:
        """Bytes as they are, in pieces if they are to drip."""
        size = self.piece_bytes or len(data)
        for at in range(0, len(data), max(1, size)):
            if at or (self.piece_bytes and self.began):
                await trio.sleep(self.pause_s)
            await self.connection.send(data[at : at + size])
            self.began = True
            self.last_byte = trio.current_time()
            if self.first_byte is None:
                self.first_byte = self.last_byte

    def _head(self, status: int, content_type: str, headers: Sequence[Header], *, length: int | None, chunked: bool) -> bytes:
        """Names in Go's order: the handler's own sorted, then what the server adds."""
        self.status = status
        if self.request.http10 and length is None:
            self.keep_alive = False
        if not self.keep_alive:
            self.extra = [pair for pair in self.extra if pair[0] != b"Connection"]
        own = [*headers, *self.extra, *([(b"Content-Type", content_type.encode())] if content_type else [])]
        own += [(b"X-Simulated-Ollama", self._banner)] if self._banner else []
        lines = [b"HTTP/1.%d %d %s" % (not self.request.http10, status, REASONS.get(status, b"status code %d" % status))]
        lines += [b"%s: %s" % pair for pair in sorted(own, key=lambda pair: pair[0])]
        lines.append(b"Date: " + http_date(self._wall()))
        if length is not None and status != 204:
            lines.append(b"Content-Length: %d" % length)
        if not self.keep_alive and not self.request.http10:
            lines.append(b"Connection: close")
        if chunked:
            lines.append(b"Transfer-Encoding: chunked")
        return b"\r\n".join(lines) + b"\r\n\r\n"
