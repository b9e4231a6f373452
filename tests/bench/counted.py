"""How many instructions one small request takes of the router: a figure that no other work on the machine moves.

    python -m tests.bench.counted [--connections 8] [edge] [bare] [coordinator] [history] [selection] [selection-bare]

`edge` (if nothing else is asked for): the embedded edge and the router; `bare`: that with the same decision each time in place of the
router, so what the edge itself takes; `coordinator`: with access rules and metrics around it; `history`: that with records; `selection`:
what nginx asks, and its log line; `selection-bare`: that without the router. Each is put together in a process of its own, under valgrind,
with one constant node, and runs what `make native` has compiled; `ROUTER_NATIVE=false` counts the source as it is. What the kernel does is
not counted.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

import native

if __name__ == "__main__":
    native.use()  # before any of it is imported

from edge.steady import SteadyClock
from tests.bench.counted_sides import EMBEDDED_SIDES, SELECTION_SIDES, serve
from tests.bench.programs import SMALL, needed, request_body, small_answer

WARM = 30
COUNTED = 60
"""Requests of each connection before counting, and while it goes on."""
_LEASE = re.compile(rb"X-Lease: (\S+)")


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


def _select(tally: tuple[str, int], lines: list[socket.socket], times: int) -> None:
    """As nginx: every connection asks at once, then every answer is read, and a line is logged for each."""
    body = request_body(SMALL)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as log:
        log.connect(tally)
        for _ in range(times):
            for number, line in enumerate(lines):
                head = (
                    f"POST /api/chat HTTP/1.1\r\nHost: selection\r\nX-Peer: 127.0.0.1\r\n"
                    f"X-Connection: 4711-{number}\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                line.sendall(head.encode() + body)
            for line in lines:
                got = line.recv(65536)
                lease = _LEASE.search(got)
                assert lease is not None, got
                log.send(b"<190>Jan  1 00:00:00 router: %b 200 321 0.001 : 0.005 0.001 : 0.010 OK" % lease[1])


def instructions(side: str, *, connections: int) -> float:
    """Thousands of instructions that one request takes."""
    control, valgrind = needed("callgrind_control", "valgrind"), needed("valgrind", "valgrind")
    with (
        tempfile.TemporaryDirectory() as place,
        socket.create_server(("127.0.0.1", 0)) as node,
        socket.create_server(("127.0.0.1", 0)) as port,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tally,
    ):
        out = Path(place) / "instructions"
        tally.bind(("127.0.0.1", 0))
        tally.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        threading.Thread(target=_node, args=(node,), daemon=True).start()
        served = [side, port.fileno(), node.getsockname()[1], tally.fileno()]
        command = [valgrind, "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        command += [sys.executable, "-m", "tests.bench.counted", "--serve", *map(str, served)]
        edge = subprocess.Popen(command, pass_fds=[port.fileno(), tally.fileno()], env={**os.environ, "PYTHONHASHSEED": "0"})
        lines = [socket.create_connection(port.getsockname()) for _ in range(connections)]
        ask = _ask if side in EMBEDDED_SIDES else partial(_select, tally.getsockname())
        try:
            return _counted(ask, lines, edge.pid, control, out) / (COUNTED * connections) / 1000
        finally:
            for line in lines:
                line.close()
            edge.kill()
            edge.wait()


def _counted(ask: Callable[[list[socket.socket], int], None], lines: list[socket.socket], pid: int, control: str, out: Path) -> int:
    def told(*orders: str) -> None:
        subprocess.run([control, *orders, str(pid)], check=True, capture_output=True)

    ask(lines, WARM)
    told("-i", "on")
    ask(lines, 2)
    told("-z")
    ask(lines, COUNTED)
    told("-d")
    total = re.search(r"^summary: (\d+)", out.with_name(f"{out.name}.1").read_text(), re.MULTILINE)
    assert total is not None, "callgrind did not say how many"
    return int(total[1])


def _serve(side: str, descriptor: str, node_port: str, tally: str) -> None:
    log = socket.socket(fileno=int(tally)) if side in SELECTION_SIDES else None
    trio.run(serve, side, socket.socket(fileno=int(descriptor)), int(node_port), log, clock=SteadyClock())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.counted", description="Instructions of one small request.")
    parser.add_argument("sides", nargs="*", metavar="SIDE", help=", ".join((*EMBEDDED_SIDES, *SELECTION_SIDES)))
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        _serve(*chosen.serve)
        return
    form = "compiled" if native.in_use() else "as it is"
    for side in chosen.sides or ["edge"]:
        if side not in (*EMBEDDED_SIDES, *SELECTION_SIDES):
            parser.error(f"there is no side {side!r}")
        print(f"{side:<15} {instructions(side, connections=chosen.connections):.1f} thousand instructions a request, {form}", flush=True)


if __name__ == "__main__":
    main()
