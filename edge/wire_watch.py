"""One watcher for all connections: who has left, and whose patience is over.

Decides nothing about requests; it only tells a connection that its peer shut down (`on_left`) or that its deadline passed
(`on_deadline`). Two tasks serve all sockets: an edge-triggered epoll that reports only peers that leave (so pipelined data is never
mistaken for leaving, and a request costs no system call), and a sweep that compares deadlines with a coarse clock.

Where there is no epoll, the sweep looks for an end of stream with a peek, so leaving is noticed within `PEEK_EVERY_S`.
Invariants: `now` is at most one sweep old; a connection is told at most once that its peer left.
"""

import select
import socket
import sys
from collections.abc import Awaitable, Callable
from math import inf
from typing import Final, Protocol

import trio

SWEEP_EVERY_S: Final = 1.0
PEEK_EVERY_S: Final = 0.25
_EVENTS_MAX: Final = 512


class Watched(Protocol):
    """What a connection shows the watcher. `deadline` is `inf` while nothing is waited for; `in_work` asks for the peek."""

    sock: socket.socket
    fd: int
    deadline: float

    @property
    def in_work(self) -> bool: ...

    def on_left(self) -> None: ...

    def on_deadline(self, now: float) -> None: ...


class Watch:
    """Shared by all connections of a process. `run` must be running while they are used.

    `now` is Trio's clock as of the last sweep, seconds.
    """

    def __init__(self, *, sweep_every_s: float = SWEEP_EVERY_S, use_epoll: bool = True) -> None:
        self.now = 0.0
        self._sweep_every_s = sweep_every_s
        self._watched: dict[int, Watched] = {}
        self._nursery: trio.Nursery | None = None
        self._epoll: select.epoll | None = None
        if use_epoll and sys.platform == "linux":
            self._epoll = select.epoll()

    def __len__(self) -> int:
        return len(self._watched)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled."""
        self.now = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._sweep_for_ever)
                nursery.start_soon(self._watch_leavers if self._epoll is not None else self._peek_for_ever)
                task_status.started()
        finally:
            self._nursery = None
            if self._epoll is not None:
                self._epoll.close()
                self._epoll = None

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run a connection's rare background work (a slow client's rest) beside the watcher."""
        if self._nursery is None:
            raise trio.BrokenResourceError("the watch is not running")
        self._nursery.start_soon(function)

    def add(self, conn: Watched) -> None:
        self._watched[conn.fd] = conn
        if self._epoll is not None:
            self._epoll.register(conn.fd, select.EPOLLRDHUP | select.EPOLLET)

    def discard(self, conn: Watched) -> None:
        """Forget a connection; before its socket is closed."""
        if self._watched.get(conn.fd) is conn:
            del self._watched[conn.fd]
            if self._epoll is not None:
                self._epoll.unregister(conn.fd)

    def sweep(self, now: float) -> None:
        """Tell every connection whose deadline has passed."""
        self.now = now
        for conn in [conn for conn in self._watched.values() if conn.deadline < now]:
            conn.on_deadline(now)

    def peek(self) -> None:
        """Find peers that left without epoll. One that sent data first is found once that is read."""
        for conn in [conn for conn in self._watched.values() if conn.in_work]:
            try:
                gone = conn.sock.recv(1, socket.MSG_PEEK) == b""
            except BlockingIOError:
                continue
            except OSError:
                gone = True
            if gone:
                conn.on_left()

    async def _sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(self._sweep_every_s)
            self.sweep(trio.current_time())

    async def _peek_for_ever(self) -> None:
        while True:
            await trio.sleep(PEEK_EVERY_S)
            self.peek()

    async def _watch_leavers(self) -> None:
        assert self._epoll is not None
        epoll = self._epoll
        while True:
            await trio.lowlevel.wait_readable(epoll.fileno())
            for fd, _ in epoll.poll(0, _EVENTS_MAX):
                conn = self._watched.get(fd)
                if conn is not None:
                    conn.on_left()


NEVER: Final = inf
