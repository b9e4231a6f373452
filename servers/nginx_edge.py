"""What the coordinator does for nginx in front of it: the selection's socket, the handover, and the two put together.

Decides where the socket lies and who may open it (this process's user). Knows no decision. Invariants: a socket file that a coordinator
left behind is replaced, one that somebody answers on is not; without a socket there is no nginx edge, and everything else goes on.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from core.aliases import Aliases
from core.units import AgentId, RequestId
from edge.handover import Handover
from edge.selection import BACKLOG, Nodes, Records, Selection, can_select, reachable
from servers import clock
from servers.access import Access
from servers.driver import Driver
from servers.listen import CannotListen
from servers.settings import NO_SELECTION, SOCKET_PATH_MAX_BYTES, Settings

SOCKET_FILE: Final = "selection.sock"


@contextmanager
def selection_socket(settings: Settings) -> Iterator[socket.socket | None]:
    """The listening socket, removed at the end; None: there is to be none, or there can be none.

    Raises:
        CannotListen: a path was set that cannot be used.
    """
    path = settings.selection or settings.data_dir / SOCKET_FILE
    if path == NO_SELECTION or not can_select():
        yield None
        return
    why = "its path is too long" if len(os.fsencode(path)) > SOCKET_PATH_MAX_BYTES else _why_not(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not why:
            try:
                path.unlink(missing_ok=True)
                _bind(sock, path)
            except OSError as error:
                why = error.strerror or str(error)
        if why and settings.selection is not None:
            raise CannotListen(f"cannot listen on {path}: {why}; choose another with ROUTER_SELECTION, or off")
        if why:
            structlog.get_logger().warning("there is no socket for nginx", path=str(path), why=why)
        yield sock if not why else None
    finally:
        sock.close()
        if not why:
            path.unlink(missing_ok=True)


def _bind(sock: socket.socket, path: Path) -> None:
    mask = os.umask(0o177)  # 0600 from its first moment on
    try:
        sock.bind(os.fspath(path))
    finally:
        os.umask(mask)
    sock.listen(BACKLOG)
    sock.setblocking(False)


def _why_not(path: Path) -> str:
    """Why `path` cannot be taken; "" when it can: nothing is there, or what a coordinator left behind."""
    if not path.exists():
        return ""
    if not path.is_socket():
        return "there is a file that is no socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return ""
    return "another coordinator answers there"


class NginxEdge:
    """Of one coordinator."""

    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        *,
        access: Access,
        credential_of: Callable[[AgentId], bytes | None],
        port: int,
        aliases: Aliases,
        records: Records | None,
        tick: Callable[[], float],
        report: Callable[[Exception], None],
    ) -> None:
        self._driver = driver
        self._tick = tick
        self._direct = settings.nginx_direct
        self._coordinator = f"127.0.0.1:{port}"
        self.handover = Handover(driver, secret=clock.new_secret().encode())
        self.selection = Selection(
            driver,
            self.handover,
            rules=access,
            new_id=clock.new_request_id,
            credential_of=credential_of,
            nodes=self._nodes,
            clock=tick,
            report=report,
            aliases=aliases,
            records=records,
            direct=settings.nginx_direct,
        )

    async def run(self, listening: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve nginx until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.selection.run, listening)
            task_status.started()
            try:
                while True:
                    await trio.sleep(SWEEP_S)
                    self.handover.sweep(now=self._tick())
            finally:
                self.handover.close()

    def pulse(self) -> list[RequestId]:
        """Requests that are still worked on without the embedded edge."""
        return list(self.handover.pulse())

    def _nodes(self) -> Nodes:
        agents = self._driver.router.agents()
        return Nodes(
            secret=self.handover.secret.decode(),
            tally=None,
            coordinator=self._coordinator,
            direct=self._direct,
            nodes=reachable((agent.upstream for agent in agents if agent.state != "pending"), direct=self._direct),
        )


SWEEP_S: Final = 0.25
