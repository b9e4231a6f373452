"""A node for tests: answers the three questions of the poller, as it is told, on a real loopback socket."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from core.events import Upstream


class FakeNode:
    """`answers`: by path, what to send as JSON (bytes go out as they are; an int is a status; None: no answer ever)."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "/api/version": {"version": "0.33.0"},
            "/api/tags": {
                "models": [{"name": "m:latest", "model": "m:latest", "size": 7, "digest": "d", "modified_at": "2026-01-02T03:04:05Z"}]
            },
            "/api/ps": {"models": []},
        }
        self.asked: list[str] = []
        self.port = 0

    @property
    def upstream(self) -> Upstream:
        return Upstream(host="127.0.0.1", port=self.port)

    async def serve(self, stream: trio.SocketStream) -> None:
        data = b""
        async with stream:
            while True:
                while b"\r\n\r\n" not in data:
                    try:
                        part = await stream.receive_some(65536)
                    except trio.BrokenResourceError:  # who asked has had enough
                        return
                    if not part:
                        return
                    data += part
                head, _, data = data.partition(b"\r\n\r\n")
                path = head.split(b" ")[1].decode()
                self.asked.append(path)
                answer = self.answers.get(path, 404)
                if answer is None:
                    await trio.sleep_forever()
                await stream.send_all(self._response(answer))

    def _response(self, answer: Any) -> bytes:
        status = answer if isinstance(answer, int) else 200
        body = answer if isinstance(answer, bytes) else b"{}" if isinstance(answer, int) else json.dumps(answer).encode()
        return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


@asynccontextmanager
async def running(node: FakeNode) -> AsyncIterator[FakeNode]:
    """Serve `node` on a free port (the one it had, when it ran before)."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(node.port, host="127.0.0.1")
        node.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, node.serve, listeners)
        yield node
        nursery.cancel_scope.cancel()
