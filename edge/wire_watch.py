"""One watcher for all connections: which can be read, who has left, whose patience is over.

Decides nothing about requests. All sockets are registered once with one edge-triggered epoll; one task reads its events and wakes the
tasks that wait, so a wait costs no system call and no registration (Trio's own wait costs an `epoll_ctl`: 12 % of a small request). A
connection may have its events taken without any task (`eager`), which saves a turn of the scheduler as well; what is to be sent then is
put off until all events of a poll were taken (`at_end`), for a peer that sleeps is woken by the first send and finds the others awake (a
waking costs the sender 5 µs, and there are two of them in a small request). A peer that shuts down its side is told as such, so pipelined
data is never mistaken for leaving. A sweep compares deadlines with a coarse clock, so a read needs no
cancel scope. Where there is no epoll, Trio's waits are used, and the sweep looks for an end of stream with a peek.

Invariants: `readable` is False only after a read that emptied the socket, and stays True once the peer ended; `now` is at most one
sweep old; a task waits on a connection's reading side at most once at a time.
"""

import select
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from math import inf
from typing import Final

import trio
from trio.lowlevel import (
    Abort,
    RaiseCancelT,
    Task,
    checkpoint,
    current_task,
    notify_closing,
    reschedule,
    wait_readable,
    wait_task_rescheduled,
)

SWEEP_EVERY_S: Final = 1.0
PEEK_EVERY_S: Final = 0.25
NEVER: Final = inf
TURN_S: Final = 0.0008
"""So long at most, and the events of one poll, without giving way to other tasks."""
EVENTS_AT_ONCE: Final = 16
"""What an event sets off takes a twentieth of a millisecond; what several send leaves together."""
_ENDS: Final = 0 if sys.platform != "linux" else select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class WatchedSocket:
    """What both roles of a connection share: a non-blocking socket, its readiness, its deadline, its end.

    `deadline`: `NEVER` while nothing is waited for. `closed`: `close` was called. `timed_out`: a deadline passed. `eager`: what is called
    when there is something to read, in place of waking a task; quick, and may not raise.
    """

    __slots__ = ("closed", "deadline", "eager", "ended", "fd", "parked", "readable", "sock", "timed_out", "watch")

    def __init__(self, sock: socket.socket, watch: "Watch") -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.watch = watch
        self.deadline = NEVER
        self.readable = False
        self.ended = False
        self.closed = False
        self.timed_out = False
        self.parked: Task | None = None
        self.eager: Callable[[], None] | None = None
        watch.add(self)

    async def park(self) -> None:
        """Wait until there is something to read, or until `wake`. May return early."""
        if not self.watch.edges:
            try:
                await wait_readable(self.fd)
            except trio.ClosedResourceError:
                return
            self.readable = True
            return
        assert self.parked is None, "two tasks read one connection"
        self.parked = current_task()
        await wait_task_rescheduled(self._unpark)

    def _unpark(self, _: RaiseCancelT) -> Abort:
        self.parked = None
        return Abort.SUCCEEDED

    def wake(self) -> None:
        """Let the tasks that wait on this socket look again at why they wait."""
        if self.parked is not None:
            task, self.parked = self.parked, None
            reschedule(task)
        notify_closing(self.fd)

    def peek(self) -> bool | None:
        """Look without reading: True when bytes are there, None when there is nothing, False at the end or after a reset."""
        try:
            return self.sock.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return None
        except OSError:
            return False

    def close(self) -> None:
        """Close at once, both directions. May be called twice."""
        if not self.closed:
            self.closed = True
            self.watch.discard(self)
            self.wake()
            self.sock.close()

    @property
    def wants_peek(self) -> bool:
        """Whether a watch without epoll should look for the peer's leaving."""
        raise NotImplementedError

    def on_left(self) -> None:
        """The peer ended its side, or reset the connection. May come twice."""
        raise NotImplementedError

    def on_deadline(self, now: float) -> None:
        """`deadline` has passed."""
        raise NotImplementedError


class Watch:
    """Shared by all connections of a process. `run` must be running while they are used.

    `now` is Trio's clock as of the last sweep, seconds. `edges`: readiness comes from epoll, not from Trio. `at_end`: calls to make when
    the events of this poll were taken, for those whose `eager` is called; made once, in order, those that such a call adds too; like
    `eager` they are quick, and may not raise.
    """

    def __init__(self, *, sweep_every_s: float = SWEEP_EVERY_S, use_epoll: bool = True) -> None:
        self.now = 0.0
        self._sweep_every_s = sweep_every_s
        self._watched: dict[int, WatchedSocket] = {}
        self._nursery: trio.Nursery | None = None
        self.at_end: list[Callable[[], None]] = []
        self.edges = use_epoll and sys.platform == "linux"
        if self.edges:
            self._epoll = select.epoll()

    def __len__(self) -> int:
        return len(self._watched)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Watch until cancelled; once."""
        self.now = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._sweep_for_ever)
                nursery.start_soon(self._read_events if self.edges else self._peek_for_ever)
                task_status.started()
        finally:
            self._nursery = None
            if self.edges:
                self._epoll.close()

    def start_soon(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run a connection's rare background work (a slow client's rest) beside the watcher."""
        if self._nursery is None:
            raise trio.BrokenResourceError("the watch is not running")
        self._nursery.start_soon(function)

    def add(self, conn: WatchedSocket) -> None:
        self._watched[conn.fd] = conn
        if self.edges:
            self._epoll.register(conn.fd, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def discard(self, conn: WatchedSocket) -> None:
        """Forget a connection; before its socket is closed."""
        if self._watched.pop(conn.fd, None) is not None and self.edges and not self._epoll.closed:
            self._epoll.unregister(conn.fd)

    def sweep(self, now: float) -> None:
        """Tell every connection whose deadline has passed."""
        self.now = now
        for conn in [conn for conn in self._watched.values() if conn.deadline < now]:
            conn.on_deadline(now)

    def peek(self) -> None:
        """Find peers that left without epoll. One that sent data first is found once that is read."""
        for conn in [conn for conn in self._watched.values() if conn.wants_peek]:
            if conn.peek() is False:
                conn.on_left()

    def poll(self) -> int:
        """Take what epoll has to say, some at once; how much it was."""
        events = self._epoll.poll(0, EVENTS_AT_ONCE)
        watched = self._watched
        for fd, mask in events:
            conn = watched.get(fd)
            if conn is None:
                continue
            conn.readable = True
            if mask & _ENDS:
                conn.ended = True
            if conn.eager is not None:
                conn.eager()
            elif conn.parked is not None:
                task, conn.parked = conn.parked, None
                reschedule(task)
            if mask & _ENDS:
                conn.on_left()
        at_end = self.at_end
        if at_end:
            for call in at_end:
                call()
            at_end.clear()
        return len(events)

    async def _sweep_for_ever(self) -> None:
        while True:
            await trio.sleep(self._sweep_every_s)
            self.sweep(trio.current_time())

    async def _peek_for_ever(self) -> None:
        while True:
            await trio.sleep(PEEK_EVERY_S)
            self.peek()

    async def _read_events(self) -> None:
        fd, now = self._epoll.fileno(), time.perf_counter
        while True:
            await wait_readable(fd)
            until = now() + TURN_S
            while self.poll() > 1:  # where there was one, there is hardly another: who waits for an answer sends nothing
                if now() > until:
                    await checkpoint()
                    until = now() + TURN_S
