"""nginx's part, played by hand: asks the selection, forwards, reports, hands over. Every step is the test's own."""

import base64
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.fleet.rawhttp import Answer, ask, parse_answer


class Selector:
    """One connection to the selection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def send(self, path: str, body: bytes | Mapping[str, Any], **fields: str) -> None:
        """Ask which node is to get this request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"X-Peer": "127.0.0.1", **{name.replace("_", "-"): value for name, value in fields.items()}}
        lines = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
        await self.stream.send_all(f"POST {path} HTTP/1.1\r\nHost: s\r\n{lines}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    async def answer(self) -> Answer:
        """The next answer. An end of the connection is status 0."""
        data = b""
        with trio.fail_after(10):
            while b"\r\n\r\n" not in data:
                some = await self.stream.receive_some()
                if not some:
                    return Answer(0)
                data += some
        found = parse_answer(data)
        while not found.whole:
            data += await self.stream.receive_some()
            found = parse_answer(data)
        return found

    async def select(self, path: str, body: bytes | Mapping[str, Any], **fields: str) -> Answer:
        await self.send(path, body, **fields)
        return await self.answer()

    async def nodes(self) -> Any:
        """What `edge.nginx` is told."""
        await self.stream.send_all(b"GET /nodes HTTP/1.1\r\nHost: s\r\n\r\n")
        return (await self.answer()).json()


@asynccontextmanager
async def selector(path: Path) -> AsyncIterator[Selector]:
    """A connection to the selection at `path`."""
    async with await trio.open_unix_socket(path) as stream:
        yield Selector(stream)


async def forward(found: Answer, path: str, body: Mapping[str, Any]) -> Answer:
    """What nginx does with a node: pass the request on."""
    host, _, port = found.headers["x-upstream"].rpartition(":")
    assert host == "127.0.0.1"
    headers = {"X-Request-Id": found.headers["x-request-id"], "X-Ollama-Router-Edge": "nginx"}
    if "x-credential" in found.headers:
        headers["X-Ollama-Router-Credential"] = found.headers["x-credential"]
    return await ask(int(port), "POST", path, body, headers=headers)


def send_line(address: str, line: bytes) -> None:
    """One datagram."""
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(line, (host, int(port)))


def log_line(address: str, lease: str, *, status: int = 200, completed: str = "OK", size: int = 321) -> None:
    """What nginx logs of a request that it forwarded."""
    send_line(address, f"<190>Jan  1 00:00:00 nginx: {lease} {status} {size} 0.100 0.200 {completed}".encode())


async def hand_over(
    port: int,
    path: str,
    body: bytes | Mapping[str, Any],
    takeover: str,
    *,
    tried: str = "",
    failure: str = "",
    answer: bytes | None = None,
    client: str = "127.0.0.1",
) -> Answer:
    """The request goes on at the coordinator's port."""
    headers = {"X-Ollama-Router-Takeover": takeover, "X-Forwarded-For": client}
    if tried:
        headers["X-Ollama-Router-Tried"] = tried
    if failure:
        headers["X-Ollama-Router-Failure"] = failure
    if answer is not None:
        headers["X-Ollama-Router-Answer"] = base64.b64encode(answer).decode()
        headers["X-Ollama-Router-Answer-Type"] = "application/json; charset=utf-8"
    return await ask(port, "POST", path, body, headers=headers)
