"""A gateway over real sockets, in front of an Ollama that does what a test scripts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from agent.gateway import Gateway
from agent.log import LogTail
from tests.agent.fakes import Handler, Heard, Raw, Server, answer, free_port, receive, serving

WARM = False
"""Whether there is a kept connection to Ollama already, so that small requests are served without a task."""

CREDENTIAL = "secret-1"
CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}],  "unknown":[1]}'


class Setup:
    """A gateway, its Ollama, and connections of a caller."""

    def __init__(self, gateway: Gateway, port: int, ollama: Server | None) -> None:
        self.gateway = gateway
        self.port = port
        self._ollama = ollama

    @property
    def ollama(self) -> Server:
        assert self._ollama is not None
        return self._ollama

    async def send(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        *,
        credential: str | None = CREDENTIAL,
        request_id: str | None = None,
        more: str = "",
    ) -> trio.SocketStream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        head = f"{method} {target} HTTP/1.1\r\nHost: whoever\r\n{more}"
        if credential is not None:
            head += f"X-Ollama-Router-Credential: {credential}\r\n"
        if request_id is not None:
            head += f"X-Request-Id: {request_id}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        await stream.send_all(head.encode() + b"\r\n" + (body or b""))
        return stream

    async def ask(self, method: str, target: str, body: bytes | None = None, **more: str | None) -> Raw:
        stream = await self.send(method, target, body, **more)  # type: ignore[arg-type]
        async with stream:
            return await receive(stream, head_only=method == "HEAD")

    async def chat(self, body: bytes = CHAT, **more: str | None) -> Raw:
        return await self.ask("POST", "/api/chat", body, **more)


@asynccontextmanager
async def gateway_for(
    handler: Handler | None, *, tail: LogTail | None = None, credential: bytes | None = CREDENTIAL.encode()
) -> AsyncIterator[Setup]:
    """Without a handler nobody listens where Ollama should be. Before anything else Ollama answers well once, when `WARM`."""
    warm_up = WARM and handler is not None and credential is not None

    async def first_well(stream: trio.SocketStream, heard: Heard) -> None:
        nonlocal warm_up
        if warm_up:
            warm_up = False
            await stream.send_all(answer(200, {"done": True}))
        else:
            await (handler or never)(stream, heard)

    async with serving(first_well) as ollama, trio.open_nursery() as nursery:
        url = ollama.url if handler is not None else f"http://127.0.0.1:{free_port()}"
        gateway = Gateway(url, tail=tail)
        gateway.credential = credential
        port = gateway.listen("127.0.0.1", 0)
        await nursery.start(gateway.run)
        setup = Setup(gateway, port, ollama)
        if warm_up:
            assert (await setup.chat()).status == 200
            ollama.heard.clear()
            gateway.average_response_time_ms = None
        yield setup
        nursery.cancel_scope.cancel()


async def never(stream: trio.SocketStream, _: Heard) -> None:
    raise AssertionError("this Ollama should not be asked")


def saying(*pieces: bytes, close: bool = False) -> Handler:
    """An Ollama that sends these pieces, then perhaps closes."""

    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        for piece in pieces:
            await stream.send_all(piece)
        if close:
            await stream.aclose()

    return handler
