"""How many instructions one small request takes of the embedded edge and the router: a figure that no other work on the machine moves.

    python -m tests.bench.counted [--connections 8]

The edge is put together in a process of its own, under valgrind, with one constant node and nothing that happens by the clock. What the
kernel does is not counted, nor what the coordinator adds around the edge (access rules, metrics, history).
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import trio

from core.config import RouterConfig
from core.events import BackendAdded, NodePolled, Record, Upstream
from core.router import Router
from core.units import AgentId, UnixMs
from edge.body import BodyBudget
from edge.listener import Listener, quick_routes
from edge.live import ProxyOptions
from edge.pool import Pool
from edge.proxy import Proxy
from edge.quick import Quick
from edge.wire import ClientConnection, RequestHead, Watch
from servers import clock
from servers.driver import Driver
from tests.bench.programs import SMALL, needed, request_body, small_answer

WARM = 30
COUNTED = 60
"""Requests of each connection before counting, and while it goes on."""
MODEL_ROW = {"name": SMALL, "model": SMALL, "size": 1_000_000_000, "digest": "1" * 64}
LOADED_ROW = {**MODEL_ROW, "size_vram": 1_000_000_000, "expires_at": "2318-01-01T00:00:00Z", "context_length": 4096}


class NoSinks:
    """Takes the router's effects, for nothing."""

    def note(self, level: str, event: str, fields: dict[str, Any]) -> None: ...
    def count(self, name: str, labels: dict[str, str], by: int) -> None: ...
    def record(self, record: Record) -> None: ...
    def probe(self, agent_id: AgentId) -> None: ...


def add_node(driver: Driver, name: str, port: int) -> None:
    """A node that has the small model in memory."""
    agent_id = AgentId(name)
    driver.apply(BackendAdded(agent_id=agent_id, name=name, upstream=Upstream(host="127.0.0.1", port=port), slots=1024, now_unix=UnixMs(0)))
    driver.apply(NodePolled(agent_id=agent_id, version="0.33.0", installed=[MODEL_ROW], loaded=[LOADED_ROW], now_unix=UnixMs(0)))


class _NoWeb:
    async def serve(self, conn: ClientConnection, head: RequestHead, /, *, prefix: bytes = b"") -> None:
        raise AssertionError("nothing but small chats is asked here")


def _report(error: Exception) -> None:
    raise error


async def _serve(descriptor: int, node_port: int) -> None:
    """The edge, on a listening socket, until it is killed."""
    watch = Watch()
    driver = Driver(Router(RouterConfig(), now=clock.now()), NoSinks())
    add_node(driver, "node", node_port)
    proxy = Proxy(
        driver,
        Pool(watch),
        budget=BodyBudget(),
        options=ProxyOptions(answer_hold_bytes=1 << 20),
        new_id=clock.new_request_id,
        credential_of=lambda _: None,
    )
    quick = Quick(proxy, gate=lambda *_: None, routes=quick_routes(None), new_id=clock.new_request_id, report=_report)
    listener = Listener(
        gate=lambda *_: None,
        proxy=proxy,
        web=_NoWeb(),
        watch=watch,
        new_id=clock.new_request_id,
        report=_report,
        quick=quick.lane,
    )
    listening = socket.socket(fileno=descriptor)
    listening.setblocking(False)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        await listener.serve([listening])


def _node(listening: socket.socket) -> None:
    body = small_answer().encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    def answer_all(conn: socket.socket) -> None:
        while conn.recv(65536):
            conn.sendall(answer)

    while True:
        conn, _ = listening.accept()
        threading.Thread(target=answer_all, args=(conn,), daemon=True).start()


def _ask(lines: list[socket.socket], times: int) -> None:
    """Every connection asks at once, then every answer is read; so often."""
    body = request_body(SMALL)
    request = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    for _ in range(times):
        for line in lines:
            line.sendall(request + body)
        for line in lines:
            got = line.recv(65536)
            assert got.startswith(b"HTTP/1.1 200"), got


def instructions(*, connections: int) -> float:
    """Thousands of instructions that one request takes."""
    control = needed("callgrind_control", "valgrind")
    with (
        tempfile.TemporaryDirectory() as place,
        socket.create_server(("127.0.0.1", 0)) as node,
        socket.create_server(("127.0.0.1", 0)) as port,
    ):
        out = Path(place) / "instructions"
        threading.Thread(target=_node, args=(node,), daemon=True).start()
        valgrind = [needed("valgrind", "valgrind"), "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command = [*valgrind, sys.executable, "-m", "tests.bench.counted", "--serve", str(port.fileno()), str(node.getsockname()[1])]
        edge = subprocess.Popen(command, pass_fds=[port.fileno()], env={**os.environ, "PYTHONHASHSEED": "0"})
        lines = [socket.create_connection(port.getsockname()) for _ in range(connections)]
        try:

            def told(*orders: str) -> None:
                subprocess.run([control, *orders, str(edge.pid)], check=True, capture_output=True)

            _ask(lines, WARM)
            told("-i", "on")
            _ask(lines, 2)
            told("-z")
            _ask(lines, COUNTED)
            told("-d")
            dumped = out.with_name(f"{out.name}.1").read_text()
        finally:
            for line in lines:
                line.close()
            edge.kill()
            edge.wait()
    total = re.search(r"^summary: (\d+)", dumped, re.MULTILINE)
    assert total is not None, "callgrind did not say how many"
    return int(total[1]) / (COUNTED * connections) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.counted", description="Instructions of one small request.")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--serve", type=int, nargs=2, metavar=("FD", "PORT"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        trio.run(_serve, *chosen.serve)
        return
    print(f"{instructions(connections=chosen.connections):.1f} thousand instructions a request")


if __name__ == "__main__":
    main()
