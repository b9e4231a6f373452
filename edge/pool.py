"""Keep-alive connections to nodes.

Decides which idle connection is used next (the last one given back) and when one is too old; must never know which node is good.
Invariants: an idle connection belongs to exactly one list, nobody uses it, and it is watched, so one that the node closed leaves the
pool by itself; at most `idle_max` per upstream.
"""

import errno
import os
import socket
from typing import Final

import trio

from core.events import Upstream
from edge.wire_client import UpstreamConnection
from edge.wire_watch import NEVER, Watch

DIAL_LIMIT_S: Final = 3.0
IDLE_MAX: Final = 512
"""Of one node. A thousand clients leave hundreds idle for an instant, again and again: with fewer kept, most requests would dial anew."""
IDLE_S: Final = 60.0
KEEPALIVE_IDLE_S: Final = 15
"""A connection that is silent for so long is asked whether the other end is there: a machine that lost its power and booted again says so
only then. A node may rightly be silent for minutes, so silence alone ends nothing."""
KEEPALIVE_EVERY_S: Final = 5
KEEPALIVE_PROBES: Final = 6
_KEEPALIVE: Final = {
    "TCP_KEEPIDLE": KEEPALIVE_IDLE_S,
    "TCP_KEEPALIVE": KEEPALIVE_IDLE_S,
    "TCP_KEEPINTVL": KEEPALIVE_EVERY_S,
    "TCP_KEEPCNT": KEEPALIVE_PROBES,
}
_UNIX: Final = "unix:"


class DialFailed(Exception):
    """No connection could be made within the limit; the text says why."""


class Pool:
    """Connections by upstream. Give every taken or dialled connection back, or close it."""

    def __init__(self, watch: Watch, *, idle_max: int = IDLE_MAX, idle_s: float = IDLE_S, dial_limit_s: float = DIAL_LIMIT_S) -> None:
        self._watch = watch
        self._idle_max = idle_max
        self._idle_s = idle_s
        self._dial_limit_s = dial_limit_s
        self._idle: dict[Upstream, list[UpstreamConnection]] = {}

    def take(self, upstream: Upstream) -> UpstreamConnection | None:
        """An idle connection that is still open, `reused` set; None when there is none."""
        idle = self._idle.get(upstream)
        while idle:
            conn = idle.pop()
            conn.idle_in = None
            conn.deadline = NEVER
            if conn.alive():
                conn.start(reused=True)
                return conn
            conn.close()
        return None

    async def dial(self, upstream: Upstream) -> UpstreamConnection:
        """A new connection. Raises DialFailed after `dial_limit_s` at the latest."""
        error = "no address"
        with trio.move_on_after(self._dial_limit_s):
            try:
                for family, address in await _addresses(upstream):
                    try:
                        sock = await _connect(family, address)
                    except OSError as problem:
                        error = problem.strerror or str(problem)
                        continue
                    return UpstreamConnection(sock, upstream, self._watch)
            except OSError as problem:
                error = problem.strerror or str(problem)
            raise DialFailed(error)
        raise DialFailed(f"no connection within {self._dial_limit_s:g} s")

    def give_back(self, conn: UpstreamConnection) -> None:
        """The request is over: keep the connection for the next, or close it."""
        if not conn.reusable:
            conn.close()
            return
        idle = self._idle.get(conn.upstream)
        if idle is None:
            idle = self._idle[conn.upstream] = []
        if len(idle) >= self._idle_max:
            conn.close()
            return
        conn.idle_in = idle
        conn.deadline = self._watch.now + self._idle_s
        idle.append(conn)

    def idle_count(self, upstream: Upstream) -> int:
        return len(self._idle.get(upstream, ()))

    def close_idle(self, upstream: Upstream | None = None) -> None:
        """Close the idle connections to one upstream, or all."""
        for key in [upstream] if upstream is not None else list(self._idle):
            for conn in list(self._idle.pop(key, ())):
                conn.close()


async def _addresses(upstream: Upstream) -> list[tuple[socket.AddressFamily, object]]:
    if upstream.host.startswith(_UNIX):
        return [(socket.AF_UNIX, upstream.host[len(_UNIX) :])]
    found = await trio.socket.getaddrinfo(upstream.host, upstream.port, type=socket.SOCK_STREAM)
    return [(family, address) for family, _, _, _, address in found]


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        option = getattr(socket, name, None)  # which of them there are depends on the system
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _connect(family: socket.AddressFamily, address: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _keep_alive(sock)
        code = sock.connect_ex(address)  # type: ignore[arg-type]
        if code in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock
