"""`python -m tests.bench.selection`: decisions per second of the selection endpoint, each settled by a line of nginx's log.

The endpoint runs as in a coordinator (router, driver, tape, tally), without the rest. Nodes have no gateway, and all have the model in
memory, which is the dearest case. A second process plays nginx's part over the unix socket: so many connections, one request on each at a
time, and a datagram for each answer. Where cores are shared, the processor time of the endpoint's process is what counts.
"""

import argparse
import gc
import multiprocessing
import os
import re
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import trio

import native

if __name__ in ("__main__", "__mp_main__"):
    native.use()  # before any of it is imported

from core.aliases import Aliases
from core.config import RouterConfig
from core.events import BackendAdded, NodePolled, Record, Upstream
from core.router import Router
from core.units import AgentId, Instant, UnixMs
from edge.steady import SteadyClock
from servers.access import Access
from servers.driver import Driver
from servers.nginx_edge import NginxEdge, nginx_sockets
from servers.settings import Settings
from servers.tokens import Tokens
from tests.bench.programs import request_body

BARS: Final = {10: 20_000, 100: 12_000}
"""Nodes: decisions per second."""
MODELS: Final = 20
SLOTS: Final = 64
CONNECTIONS: Final = 64
_LEASE: Final = re.compile(rb"X-Lease: (\S+)")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured with so many nodes."""

    nodes: int
    per_s: float
    cpu_us: float
    """Of the endpoint's process, for one decision and its settlement."""

    @property
    def alone_per_s(self) -> float:
        """What the endpoint does with a core of its own."""
        return 1e6 / self.cpu_us


class _Sinks:
    """What the router's effects cost elsewhere is not counted."""

    def note(self, level: str, event: str, fields: object) -> None: ...

    def count(self, name: str, labels: object, by: int) -> None: ...

    def record(self, record: Record) -> None: ...

    def probe(self, agent_id: AgentId) -> None: ...


def _row(name: str) -> dict[str, object]:
    return {"name": name, "model": name, "size": 2 * 10**9, "digest": name}


def _add_nodes(driver: Driver, nodes: int) -> None:
    installed = [_row(f"model{model}") for model in range(MODELS)]
    for index in range(nodes):
        agent_id = AgentId(f"node{index}")
        upstream = Upstream(host=f"127.0.{index // 250}.{index % 250 + 1}", port=11434)
        driver.apply(BackendAdded(agent_id=agent_id, name=agent_id, upstream=upstream, slots=SLOTS, now_unix=UnixMs(index)))
        driver.apply(NodePolled(agent_id=agent_id, alive=True, now_unix=UnixMs(index), installed=installed, loaded=installed[:1]))


def _serve(place: str, nodes: int) -> None:
    """The endpoint's process; ends when it is terminated."""

    async def main() -> None:
        tick = trio.lowlevel.current_clock().current_time
        settings = Settings(nginx_direct=True, data_dir=Path(place), auth="auto")
        driver = Driver(Router(RouterConfig(queue_max=10**6, queue_per_client=10**6), now=Instant(tick())), _Sinks(), clock=tick)
        _add_nodes(driver, nodes)
        tokens = Tokens(admin_token="administrator", join_token=None, fleet_secret="fleet-secret")
        edge = NginxEdge(
            settings, driver, access=Access(settings, tokens, our_ports=()), credential_of=tokens.credential_of, port=1,
            aliases=Aliases(()), records=None, tick=tick, report=_fail, count=lambda *_: None,
        )  # fmt: skip
        with nginx_sockets(settings) as sockets:
            assert sockets is not None
            await edge.run(sockets)

    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 25, 50)  # as the coordinator's own
    trio.run(main, clock=SteadyClock())


def _fail(error: Exception) -> None:
    print(f"the endpoint failed: {error!r}", file=sys.stderr)
    os._exit(1)


@contextmanager
def endpoint(nodes: int) -> Iterator[tuple[int, Path]]:
    """The endpoint in a process of its own: its process id and socket."""
    with tempfile.TemporaryDirectory() as place:
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=(place, nodes))
        process.start()
        try:
            path = Path(place) / "selection.sock"
            until = time.monotonic() + 30
            while not path.exists() and process.is_alive() and time.monotonic() < until:
                time.sleep(0.02)
            assert process.pid is not None
            yield process.pid, path
        finally:
            process.terminate()
            process.join()


def cpu_s(pid: int) -> float:
    """Processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Load:
    """nginx's part."""

    def __init__(self, path: Path, model: str) -> None:
        body = request_body(model)
        self._request = b"POST /api/chat HTTP/1.1\r\nHost: selection\r\nX-Peer: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        self._epoll = select.epoll()
        self._conns: dict[int, socket.socket] = {}
        for _ in range(CONNECTIONS):
            conn = socket.socket(socket.AF_UNIX)
            conn.connect(str(path))
            self._conns[conn.fileno()] = conn
            self._epoll.register(conn.fileno(), select.EPOLLIN)
        conn.send(b"GET /nodes HTTP/1.1\r\nHost: s\r\n\r\n")
        told = msgspec.json.decode(conn.recv(1 << 20).partition(b"\r\n\r\n")[2])
        host, _, port = told["tally"].rpartition(":")
        self._tally = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._tally.connect((host, int(port)))
        for conn in self._conns.values():
            conn.send(self._request)

    def run(self, seconds: float) -> int:
        """Ask for so long; the number of decisions."""
        decided, until = 0, time.monotonic() + seconds
        conns, poll, log, request = self._conns, self._epoll.poll, self._tally.send, self._request
        while time.monotonic() < until:
            for fd, _ in poll(1.0):
                conn = conns[fd]
                found = _LEASE.search(conn.recv(4096))
                assert found is not None, "no node was given"
                log(b"<190>Jan  1 00:00:00 router: %b 200 321 0.001 : 0.005 0.001 : 0.010 OK" % found[1])
                conn.send(request)
                decided += 1
        return decided

    def close(self) -> None:
        self._epoll.close()
        self._tally.close()
        for conn in self._conns.values():
            conn.close()


def measure(nodes: int, *, seconds: float) -> Figures:
    """One run."""
    with endpoint(nodes) as (pid, path):
        load = _Load(path, "model0")
        try:
            load.run(min(1.0, seconds))
            cpu_before, began = cpu_s(pid), time.monotonic()
            decided = load.run(seconds)
            took_s, used_s = time.monotonic() - began, cpu_s(pid) - cpu_before
        finally:
            load.close()
    return Figures(nodes=nodes, per_s=decided / took_s, cpu_us=used_s / decided * 1e6)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.selection", description="Decisions per second of the selection endpoint.")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one run")
    parser.add_argument("--nodes", type=int, nargs="*", default=[10, 100, 1000])
    chosen = parser.parse_args()
    print("| nodes | decisions/s | CPU per decision | with a core of its own |")
    print("| --- | --- | --- | --- |")
    missed = 0
    for nodes in chosen.nodes:
        found = measure(nodes, seconds=chosen.seconds)
        print(f"| {nodes:,} | {found.per_s:,.0f} | {found.cpu_us:.1f} µs | {found.alone_per_s:,.0f}/s |", flush=True)
        missed += found.alone_per_s < BARS.get(nodes, 0)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
