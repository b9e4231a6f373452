"""Real socket pairs over loopback, and a running watch, for the tests of the edge."""

import contextlib
import socket
from collections.abc import AsyncIterator

import trio

from core.events import Upstream
from edge.wire import DEFAULT_LIMITS, ClientConnection, Limits, UpstreamConnection, Watch

NODE = Upstream(host="127.0.0.1", port=11434)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """(connecting, accepted), both non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = socket.create_connection(listening.getsockname())
        far, _ = listening.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


@contextlib.asynccontextmanager
async def running_watch(*, use_epoll: bool = True) -> AsyncIterator[Watch]:
    """A watch whose sweeps the test makes itself, with `watch.sweep`."""
    watch = Watch(sweep_every_s=3600, use_epoll=use_epoll)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        yield watch
        nursery.cancel_scope.cancel()


class Peer:
    """The other end of a connection: sends and receives raw bytes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.seen = b""

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def receive(self, size: int = 1 << 20) -> bytes:
        """What comes next; b"" at the end."""
        await trio.lowlevel.wait_readable(self.sock)
        data = self.sock.recv(size)
        self.seen += data
        return data

    async def until(self, end: bytes) -> bytes:
        """All up to and including `end`."""
        got = b""
        while not got.endswith(end):
            data = await self.receive()
            if not data:
                raise AssertionError(f"the connection ended after {got!r}")
            got += data
        return got

    async def until_head(self) -> str:
        """A head whole, and whatever came with it."""
        got = b""
        while b"\r\n\r\n" not in got:
            data = await self.receive()
            if not data:
                raise AssertionError(f"the connection ended after {got!r}")
            got += data
        return got.decode("latin-1")

    async def rest(self) -> bytes:
        """All until the end of the stream."""
        got = b""
        while data := await self.receive():
            got += data
        return got


@contextlib.asynccontextmanager
async def client(*, limits: Limits = DEFAULT_LIMITS, use_epoll: bool = True) -> AsyncIterator[tuple[ClientConnection, Peer]]:
    """An accepted connection and the client behind it."""
    near, far = tcp_pair()
    async with running_watch(use_epoll=use_epoll) as watch:
        conn = ClientConnection(far, watch, peer=near.getsockname(), limits=limits)
        with near:
            try:
                with trio.fail_after(10):
                    yield conn, Peer(near)
            finally:
                conn.close()


@contextlib.asynccontextmanager
async def upstream(*, use_epoll: bool = True) -> AsyncIterator[tuple[UpstreamConnection, Peer]]:
    """A connection to a node, and the node."""
    near, far = tcp_pair()
    async with running_watch(use_epoll=use_epoll) as watch:
        conn = UpstreamConnection(near, NODE, watch)
        with far:
            try:
                with trio.fail_after(10):
                    yield conn, Peer(far)
            finally:
                conn.close()
