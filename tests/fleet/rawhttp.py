"""A small HTTP client, and a server for scripted nodes: byte by byte, with the time of each arrival. Knows nothing of Ollama.

Not a library's client, for these tests must send what no library would, and must see what every library hides: chunk borders, a
missing last chunk, a reset.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

PATIENCE_S = 30.0
"""No answer of a test takes longer; a hang becomes a failure with a line number."""

Handler = Callable[["Caller"], Awaitable[None]]


@dataclass
class Answer:
    """An answer taken apart. `whole` is False when its framing was cut short."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = True

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[Any]:
        """The NDJSON lines of the body."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]


def dechunk(data: bytes) -> bytes:
    """The content of a chunked body, as far as it goes."""
    parts = []
    while data:
        line, _, data = data.partition(b"\r\n")
        size = int(line.split(b";")[0] or b"0", 16)
        if size == 0:
            break
        parts.append(data[:size])
        data = data[size + 2 :]
    return b"".join(parts)


def parse_answer(data: bytes, method: str = "POST") -> Answer:
    """Everything a connection brought, as one answer; interim 1xx answers are skipped."""
    head, _, rest = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = int(lines[0].split(b" ", 2)[1])
    if status < 200:
        return parse_answer(rest, method)
    fields = (line.partition(b":") for line in lines[1:])
    headers = {name.decode("latin-1").lower(): value.strip().decode("latin-1") for name, _, value in fields}
    if method == "HEAD" or status in (204, 304):
        return Answer(status, headers)
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return Answer(status, headers, dechunk(rest), rest.endswith(b"0\r\n\r\n"))
    length = headers.get("content-length")
    return Answer(status, headers, rest, length is None or len(rest) == int(length))


def request_bytes(method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """A request that asks for the connection to be closed after the answer."""
    fields = {"Host": "127.0.0.1", "Connection": "close"}
    if body or method != "GET":
        fields["Content-Length"] = str(len(body))
    fields.update(headers or {})
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def encode(body: bytes | Mapping[str, Any] | None) -> bytes:
    if body is None or isinstance(body, bytes):
        return body or b""
    return json.dumps(body).encode()


async def raw_request(port: int, data: bytes, *, patience_s: float = PATIENCE_S) -> bytes:
    """All that comes back for exactly `data`, until the other side closes; a reset ends it too."""
    received = b""
    with trio.fail_after(patience_s):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            try:
                await stream.send_all(data)
            except trio.BrokenResourceError:
                pass
            while True:
                try:
                    some = await stream.receive_some()
                except trio.BrokenResourceError:
                    return received
                if not some:
                    return received
                received += some


async def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | Mapping[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Answer:
    """One request and its whole answer.

    Raises:
        AssertionError: nothing came back at all.
    """
    data = await raw_request(port, request_bytes(method, path, encode(body), headers), patience_s=patience_s)
    assert b"\r\n\r\n" in data, f"no answer to {method} {path}: {data[:100]!r}"
    return parse_answer(data, method)


class Talk:
    """One request whose answer is read as it comes. `arrivals` holds (seconds, bytes) of each piece, the head included."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.arrivals: list[tuple[float, bytes]] = []

    @property
    def received(self) -> bytes:
        return b"".join(data for _, data in self.arrivals)

    async def wait_for(self, mark: bytes) -> bytes:
        """Read on until `mark` was received, or the end; returns everything so far."""
        while mark not in self.received and await self.read_some():
            pass
        return self.received

    async def read_some(self) -> bytes:
        try:
            data = await self.stream.receive_some()
        except trio.BrokenResourceError:
            return b""
        if data:
            self.arrivals.append((trio.current_time(), data))
        return bytes(data)

    async def rest(self) -> Answer:
        """Read to the end."""
        while await self.read_some():
            pass
        return parse_answer(self.received)


@asynccontextmanager
async def talk(port: int, method: str, path: str, body: bytes | Mapping[str, Any] | None = None) -> AsyncIterator[Talk]:
    """Send a request; leaving the block closes the connection, whatever has come by then."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(request_bytes(method, path, encode(body)))
        yield Talk(stream)


class Caller:
    """One request as a scripted node received it, and the socket to answer on."""

    def __init__(self, stream: trio.SocketStream, head: bytes, body: bytes) -> None:
        self.stream = stream
        self.head = head
        self.body = body
        self.method, self.target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")

    @property
    def fields(self) -> dict[str, str]:
        lines = (line.partition(b":") for line in self.head.split(b"\r\n")[1:])
        return {name.decode("latin-1").lower(): value.strip().decode("latin-1") for name, _, value in lines}

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self, body: bytes, *, status: int = 200, kind: str = "application/json; charset=utf-8") -> None:
        await self.send(b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (status, kind.encode(), len(body)) + body)

    async def begin_chunks(self, kind: str = "application/x-ndjson") -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % kind.encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def end_chunks(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def wait_for_departure(self) -> None:
        """Until the other side has closed or half-closed."""
        try:
            while await self.stream.receive_some():
                pass
        except trio.BrokenResourceError:
            pass


async def read_request(stream: trio.SocketStream, held: bytes = b"") -> tuple[Caller, bytes] | None:
    """The next request of a connection and what came after it; None when the connection ended instead."""
    data = held

    async def more() -> bool:
        nonlocal data
        try:
            some = await stream.receive_some()
        except trio.BrokenResourceError:
            return False
        data += some
        return bool(some)

    while b"\r\n\r\n" not in data:
        if not await more():
            return None
    head, _, data = data.partition(b"\r\n\r\n")
    caller = Caller(stream, head, b"")
    if "chunked" in caller.fields.get("transfer-encoding", ""):
        while not data.endswith(b"0\r\n\r\n"):
            if not await more():
                return None
        caller.body, data = dechunk(data), b""
        return caller, data
    length = int(caller.fields.get("content-length", 0))
    while len(data) < length:
        if not await more():
            return None
    caller.body, data = data[:length], data[length:]
    return caller, data


class RawServer:
    """Serves each request with `handler`, which may answer, be silent or break off by returning early.

    Raising `Hangup` closes the connection; `Reset` resets it. `die()` ends the server and all its connections at once.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.scope = trio.CancelScope()
        self.port = 0

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
            self.port = listeners[0].socket.getsockname()[1]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._serve, listeners)
                task_status.started(self.port)

    def die(self) -> None:
        self.scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        held = b""
        try:
            while (found := await read_request(stream, held)) is not None:
                caller, held = found
                await self.handler(caller)
                if caller.fields.get("connection", "").lower() == "close":
                    return
        except Reset:
            reset(stream)
        except (Hangup, trio.BrokenResourceError):
            pass
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


class Hangup(Exception):
    """Close the connection now."""


class Reset(Exception):
    """Reset the connection now."""


def reset(stream: trio.SocketStream) -> None:
    """Close so that the peer sees a reset instead of an end."""
    stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    stream.socket.close()


async def wait_until(condition: Callable[[], object], *, within_s: float = 10.0, what: str = "") -> None:
    """Return as soon as `condition()` is true.

    Raises:
        AssertionError: it was not within `within_s`.
    """
    with trio.move_on_after(within_s):
        while not condition():  # noqa: ASYNC110  (what is waited for happens in other rooms, which have no event for it)
            await trio.sleep(0.005)
        return
    raise AssertionError(f"not within {within_s} s: {what or condition}")
