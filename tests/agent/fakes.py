"""Small real servers on loopback, written byte by byte: an Ollama that does what a test scripts, and a coordinator that answers in JSON."""

import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

LIMIT_S = 5.0
"""No wait of a test is longer."""


@dataclass
class Heard:
    """One request as it came."""

    head: bytes
    body: bytes

    @property
    def target(self) -> str:
        return self.head.split(b" ")[1].decode()

    @property
    def method(self) -> str:
        return self.head.split(b" ")[0].decode()

    def header(self, name: str) -> str | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b": ")
            if key.lower() == name.lower().encode():
                return value.decode("latin-1")
        return None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def read_request(stream: trio.SocketStream, rest: bytearray) -> Heard | None:
    while b"\r\n\r\n" not in rest:
        data = await stream.receive_some()
        if not data:
            return None
        rest += data
    head, _, after = bytes(rest).partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    while len(after) < length:
        data = await stream.receive_some()
        if not data:
            return None
        after += data
    rest[:] = after[length:]
    return Heard(head=head, body=after[:length])


Handler = Callable[[trio.SocketStream, Heard], Awaitable[None]]


@dataclass
class Server:
    """Serves `handler` for each request; `handler` writes the raw answer and may close the stream."""

    port: int
    heard: list[Heard] = field(default_factory=list)
    left: int = 0
    """Connections that the other side closed while a request was answered."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Server]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    server = Server(port=listener.socket.getsockname()[1])

    async def serve(stream: trio.SocketStream) -> None:
        rest = bytearray()
        try:
            while (request := await read_request(stream, rest)) is not None:
                server.heard.append(request)
                await handler(stream, request)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            server.left += 1
        finally:
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


def answer(status: int, value: Any, **headers: str) -> bytes:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    extra = "".join(f"{name.replace('_', '-')}: {text}\r\n" for name, text in headers.items())
    return f"HTTP/1.1 {status} Whatever\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"


def line(content: str, **more: Any) -> bytes:
    return json.dumps({"model": "m", "message": {"role": "assistant", "content": content}, "done": False, **more}).encode() + b"\n"


DONE = line("", done=True, done_reason="stop")


@dataclass
class Raw:
    """An answer taken apart by hand."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]
    whole: bool
    """Its framing ended as it should."""

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)


async def receive(stream: trio.SocketStream, *, head_only: bool = False) -> Raw:
    data = bytearray()

    async def more() -> bool:
        got = await stream.receive_some()
        data.extend(got)
        return bool(got)

    with trio.fail_after(LIMIT_S):
        while b"\r\n\r\n" not in data:
            if not await more():
                raise EOFError(bytes(data))
        head, _, rest = bytes(data).partition(b"\r\n\r\n")
        data[:] = rest
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        raw = Raw(status=int(lines[0].split(" ")[1]), headers=headers, chunks=[], whole=True)
        if head_only:
            return raw
        if headers.get("transfer-encoding") != "chunked":
            length = int(headers["content-length"])
            while len(data) < length:
                if not await more():
                    raw.whole = False
                    break
            raw.chunks = [bytes(data[:length])]
            return raw
        while True:
            while b"\r\n" not in data or len(data) < (end := data.index(b"\r\n") + 2) + (size := int(data[: end - 2], 16)) + 2:
                if not await more():
                    raw.whole = False
                    return raw
            piece = bytes(data[end : end + size])
            del data[: end + size + 2]
            if not piece:
                return raw
            raw.chunks.append(piece)


def free_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Wait for a condition that other tasks make true."""
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110  # what is waited for knows nothing of tests
            await trio.sleep(0.005)
