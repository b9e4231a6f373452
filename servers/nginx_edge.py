"""What the coordinator does for nginx in front of it: its sockets, and selection, handover and tally put together.

Decides where the sockets are and who may open them (this process's user). Knows no decision. Invariants: a socket file that a coordinator
left behind is replaced, one that somebody answers on is not; without a socket there is no nginx edge, and everything else goes on; what
nginx was told is true after a restart too, as far as the system lets it.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

import structlog
import trio

from core.aliases import Aliases
from core.units import AgentId, RequestId
from edge.handover import Handover
from edge.selection import BACKLOG, Nodes, Records, Selection, can_select, reachable
from edge.tally import RECEIVE_BUFFER_BYTES, Tally
from servers import clock
from servers.access import Access
from servers.driver import Driver
from servers.listen import CannotListen
from servers.settings import NO_SELECTION, SOCKET_PATH_MAX_BYTES, Settings

SOCKET_FILE: Final = "selection.sock"
HAND_OVER: Final = "nginx hand-over"
"""What the secret between nginx and the coordinator is derived for."""
SWEEP_S: Final = 0.25
TALLY_PORTS: Final = range(20_000, 30_000)
"""Below those that systems give out by themselves."""


class Sockets(NamedTuple):
    """What nginx talks to, both non-blocking."""

    selection: socket.socket
    tally: socket.socket


@contextmanager
def nginx_sockets(settings: Settings, *, secret: str = "") -> Iterator[Sockets | None]:
    """Both sockets; None: there is to be no nginx edge, or there can be none. `secret`: the same one has the same port for the tally, where
    that is free and the settings name none, so that nginx finds it after a restart.

    Raises:
        CannotListen: a setting cannot be met.
    """
    with _selection_socket(settings) as selection:
        if selection is None:
            yield None
            return
        host, port = settings.tally
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as tally:
            tally.setblocking(False)
            tally.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            try:
                if port or not secret or not _bound(tally, (host, _usual_port(secret))):
                    tally.bind((host, port))
            except OSError as error:
                raise CannotListen(f"cannot listen on {host} UDP port {port}: {error.strerror}; choose another with ROUTER_TALLY") from None
            yield Sockets(selection, tally)


def _usual_port(secret: str) -> int:
    return TALLY_PORTS[int.from_bytes(sha256(secret.encode()).digest()[:4]) % len(TALLY_PORTS)]


def _bound(sock: socket.socket, address: tuple[str, int]) -> bool:
    """Whether it could be had."""
    try:
        sock.bind(address)
    except OSError:
        return False
    return True


@contextmanager
def _selection_socket(settings: Settings) -> Iterator[socket.socket | None]:
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
    """Of one coordinator. `secret`: what nginx shows when it hands a request over; a new one where none is given."""

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
        count: Callable[[str, dict[str, str], int], None],
        secret: str = "",
    ) -> None:
        self._driver = driver
        self._tick = tick
        self._count = count
        self._counted: dict[str, int] = {}
        self._direct = settings.nginx_direct
        self._coordinator = f"127.0.0.1:{port}"
        self.handover = Handover(driver, secret=(secret or clock.new_secret()).encode(), lives=driver.router.lives, now=tick)
        self.tally = Tally(driver, self.handover)
        self._told: str | None = None
        self.selection = Selection(
            driver,
            self.handover,
            rules=access,
            new_id=clock.new_request_id,
            credential_of=credential_of,
            nodes=self._nodes,
            tally=self.tally,
            report=report,
            aliases=aliases,
            records=records,
            direct=settings.nginx_direct,
        )

    async def run(self, sockets: Sockets, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve nginx until cancelled."""
        async with trio.open_nursery() as nursery:
            host, port = sockets.tally.getsockname()[:2]
            self._told = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self.tally.listen(sockets.tally)
            nursery.start_soon(self.tally.keep_reading, self._someone_waits)
            await nursery.start(self.selection.run, sockets.selection)
            task_status.started()
            try:
                while True:
                    await trio.sleep(SWEEP_S)
                    now = self._tick()
                    self.tally.sweep(now=now)
                    self.handover.sweep(now=now)
                    self._count_all()
            finally:
                self.handover.close()

    def _someone_waits(self) -> bool:
        return self._driver.router.someone_waits

    def _count_all(self) -> None:
        """Bring the metrics up to what was counted where it happened."""
        counts = {
            "nginx_forwarded_total": self.selection.decided,
            "nginx_handed_over_total": self.selection.handed_over,
            "nginx_takeovers_late_total": self.handover.late,
            "nginx_lines_unreadable_total": self.tally.unreadable,
            "nginx_endings_unknown_total": self.tally.unknown,
        }
        for name, counted in counts.items():
            if more := counted - self._counted.get(name, 0):
                self._counted[name] = counted
                self._count(name, {}, more)

    def pulse(self) -> list[RequestId]:
        """Requests that are still worked on without the embedded edge."""
        return [*self.handover.pulse(), *self.tally.alive(now=self._tick())]

    def _nodes(self) -> Nodes:
        agents = self._driver.router.agents()
        return Nodes(
            secret=self.handover.secret.decode(),
            tally=self._told,
            coordinator=self._coordinator,
            direct=self._direct,
            nodes=reachable((agent.upstream for agent in agents if agent.state != "pending"), direct=self._direct),
        )
