"""A real nginx with the rendered files, between a scripted coordinator (its port and its selection socket) and a scripted node.

Decides nothing; whatever a test started has ended when `open_stage` is left.
"""

import os
import random
import re
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from core.errors import ConfigError
from edge import nginx as files
from edge.nginx import Facts, Nginx, Node, Options
from tests.fleet.programs import needed
from tests.fleet.rawhttp import Caller, RawServer

GROUP = "n_0123456789ab"
SECRET = "s" * 32
REQUEST_ID = "550e8400-e29b-41d4-a716-446655440000"


def installed() -> Nginx:
    """The nginx of this machine; the test fails with what to install."""
    needed("nginx", "nginx-light")
    try:
        return files.look(tls=True)
    except ConfigError as error:
        raise AssertionError(str(error)) from None


def free_port() -> int:
    """A port for nginx, which cannot pick one itself: below those that the system gives out, so that nobody gets it meanwhile."""
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(10_000, 30_000)
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class UnixServer(RawServer):
    """A scripted server on a unix socket."""

    def __init__(self, path: Path, handler: Callable[[Caller], object]) -> None:
        super().__init__(handler)  # type: ignore[arg-type]
        self.path = path

    async def run(self, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope, trio.socket.socket(trio.socket.AF_UNIX) as sock:
            await sock.bind(str(self.path))
            sock.listen(64)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.serve_listeners, self._serve, [trio.SocketListener(sock)])
                task_status.started(0)


@dataclass
class Stage:
    """What the test's nginx stands between, and what each side saw."""

    port: int = 0
    pid: int = 0
    directory: Path = field(default_factory=Path)
    node_port: int = 0
    selection: list[Caller] = field(default_factory=list)
    coordinator: list[Caller] = field(default_factory=list)
    node: list[Caller] = field(default_factory=list)
    servers: dict[str, RawServer] = field(default_factory=dict)
    selects: Callable[["Stage", Caller], dict[str, str] | None] = lambda stage, _: stage.chosen()
    """Headers of the selection's 200; None: 403 as `handed` says."""
    handed: str = REQUEST_ID
    answers: Callable[[Caller], object] = field(default=lambda caller: caller.answer(b'{"done":true}'))
    tally: list[str] = field(default_factory=list)
    cuts: list[bytes] = field(default_factory=list)

    def chosen(self, **more: str) -> dict[str, str]:
        return {
            "X-Upstream": f"127.0.0.1:{self.node_port}", "X-Lease": "lease-1", "X-Request-Id": REQUEST_ID, "X-Node": "node-1",
            "X-Credential": "shibboleth", **more,
        }  # fmt: skip

    async def select(self, caller: Caller) -> None:
        self.selection.append(caller)
        chosen = self.selects(self, caller)
        status, headers = (200, {"X-Accel-Redirect": "@node", **chosen}) if chosen is not None else (403, {"X-Takeover": self.handed})
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value)
        await caller.send(f"HTTP/1.1 {status} X\r\n{lines}Content-Length: 0\r\n\r\n".encode())

    async def coordinate(self, caller: Caller) -> None:
        self.coordinator.append(caller)
        await caller.answer(b'{"by":"coordinator"}', status=207)

    async def serve_node(self, caller: Caller) -> None:
        self.node.append(caller)
        await self.answers(caller)  # type: ignore[misc]

    def facts(self, coordinator: int, tally: int, *, known: bool = True) -> Facts:
        nodes = (Node(group=GROUP, host="127.0.0.1", port=self.node_port, gateway=True),) if known else ()
        return Facts(secret=SECRET, coordinator=f"127.0.0.1:{coordinator}", tally=f"127.0.0.1:{tally}", nodes=nodes)


async def hear(stage: Stage, sock: trio.socket.SocketType) -> None:
    """Keep what nginx logs, of several questions the last."""
    while True:
        data = await sock.recv(65536)
        line = data.decode()
        if " cut: " in line[:32]:
            stage.cuts.append(data)
        else:
            stage.tally.append(re.sub(r"\S+ : ", "", line.partition("router: ")[2]))


@asynccontextmanager
async def open_stage(*, known: bool = True, tls: tuple[Path, Path] | None = None) -> AsyncIterator[Stage]:
    """`known`: nginx has a group for the node."""
    nginx, stage = installed(), Stage()
    with tempfile.TemporaryDirectory() as place, trio.socket.socket(type=trio.socket.SOCK_DGRAM) as tally:
        await tally.bind(("127.0.0.1", 0))
        stage.directory = Path(place)
        selection = stage.directory / "selection.sock"
        stage.servers = {
            "selection": UnixServer(selection, stage.select),
            "coordinator": RawServer(stage.coordinate),
            "node": RawServer(stage.serve_node),
        }
        async with trio.open_nursery() as nursery:
            ports = [await nursery.start(server.run) for server in stage.servers.values()]
            stage.node_port, stage.port = ports[2], free_port()
            nursery.start_soon(hear, stage, tally)
            cert, key = tls or (None, None)
            options = Options(
                selection=selection, listen=(f"127.0.0.1:{stage.port}",), directory=stage.directory, tls_cert=cert, tls_key=key, workers=1
            )
            files.write(stage.directory, files.render(options, nginx, stage.facts(ports[1], tally.getsockname()[1], known=known)))
            async with running(nginx, stage.directory, stage.port) as stage.pid:
                yield stage
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def running(nginx: Nginx, directory: Path, port: int) -> AsyncIterator[int]:
    """An nginx with the files of `directory`, once it takes connections."""
    with (directory / "error.log").open("wb") as log:
        command = [nginx.program, "-p", str(directory), "-c", str(directory / files.CONFIG), "-g", "daemon off;"]
        process = await trio.lowlevel.open_process(command, stdin=None, stderr=log)
        try:
            with trio.fail_after(10):
                while not await connects(port):
                    assert process.poll() is None, (directory / "error.log").read_text()
            yield process.pid
        finally:
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGTERM)
                await process.wait()


async def connects(port: int) -> bool:
    try:
        await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
    except OSError:
        await trio.sleep(0.01)
        return False
    return True
