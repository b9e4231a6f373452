"""`python -m tests.prove.flow PORT --rate 500`: small chats at a steady rate over kept connections, from a process of its own.

Each request has its moment, whatever became of those before it, and is measured from that moment: a router that stalls is charged with all
who came meanwhile. Ends with one line of JSON. Until then, with `--ids`, a line for each good answer: when it was whole (monotonic
seconds) and its request's id.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field

import trio

from tests.bench.programs import SMALL, request_body

CONNECTIONS = 16
ANSWER_MAX_BYTES = 1 << 20


@dataclass
class Flow:
    """One flow. `seconds`: None until the router is gone."""

    port: int
    rate: float
    seconds: float | None
    connections: int = CONNECTIONS
    tells_ids: bool = False
    latencies_s: list[float] = field(default_factory=list)
    failed: int = 0
    _due: int = 0

    async def run(self) -> None:
        body = request_body(SMALL)
        self._request = b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        self._request += body
        self._began = trio.current_time() + 0.05
        async with trio.open_nursery() as nursery:
            for _ in range(self.connections):
                nursery.start_soon(self._connection)

    async def _connection(self) -> None:
        sock: trio.socket.SocketType | None = None
        while True:
            due = self._began + self._due / self.rate
            if self.seconds is not None and due >= self._began + self.seconds:
                return
            self._due += 1
            await trio.sleep_until(due)
            try:
                if sock is None:
                    sock = trio.socket.socket()
                    await sock.connect(("127.0.0.1", self.port))
                    sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY, 1)
                await sock.send(self._request)
                request_id = await self._answer(sock)
            except (OSError, ValueError):
                if self.seconds is None:
                    return
                self.failed += 1
                sock = None
                continue
            self.latencies_s.append(trio.current_time() - due)
            if self.tells_ids:
                sys.stdout.write(f"{time.monotonic():.6f} {request_id}\n")
                if len(self.latencies_s) % 64 == 0:
                    sys.stdout.flush()

    async def _answer(self, sock: trio.socket.SocketType) -> str:
        """Read one; returns its request's id. Raises ValueError when it is no good one."""
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += await _some(sock, data)
        fields = dict(line.lower().split(b": ", 1) for line in data[:end].split(b"\r\n")[1:])
        length = end + 4 + int(fields[b"content-length"])
        while len(data) < length:
            data += await _some(sock, data)
        if not data.startswith(b"HTTP/1.1 200") or len(data) != length or b'"done":true' not in data:
            raise ValueError(data[:200])
        return fields[b"x-request-id"].decode()

    def told(self) -> dict[str, float]:
        """The figures, in milliseconds."""
        ordered = sorted(self.latencies_s)
        found: dict[str, float] = {"answered": len(ordered), "failed": self.failed}
        for name, share in (("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99), ("max_ms", 1.0)):
            found[name] = round(ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000, 3) if ordered else 0.0
        return found


async def _some(sock: trio.socket.SocketType, before: bytes) -> bytes:
    data = await sock.recv(65536)
    if not data or len(before) > ANSWER_MAX_BYTES:
        raise ValueError("the answer ended early, or never")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--ids", action="store_true")
    given = parser.parse_args()
    flow = Flow(given.port, given.rate, given.seconds, connections=given.connections, tells_ids=given.ids)
    trio.run(flow.run)
    print(json.dumps(flow.told()))


if __name__ == "__main__":
    main()
