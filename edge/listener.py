"""The public port: requests of the inference routes go to the proxy, everything else to the web app.

Decides by method and decoded path alone which of the two it is; must never know nodes, models or keys (the gate does). Paths are
compared as Ollama's own mux does: percent-decoded, and an unclean path is answered with a redirect to the clean one, so no spelling
of a path reaches a node, or passes the gate, that its plain spelling would not.

Invariants: requests of one connection are answered in order; every answer of its own is one JSON sentence and carries
`X-Request-Id`; after `stop` nothing is accepted, idle connections are closed, and work ends within the limit or is cut.
"""

import errno
import posixpath
import socket
from collections.abc import Awaitable, Callable, Sequence
from html import escape
from typing import Final
from typing import Protocol as Interface
from urllib.parse import quote

import trio
from trio.lowlevel import wait_readable

from core.events import Protocol, Route
from edge.denied import Denied
from edge.front import Front
from edge.headers import error_response, simple_response
from edge.wire import DEFAULT_LIMITS, ClientConnection, ClientGone, HttpError, Lane, Limits, RequestHead
from edge.wire_heads import Header
from edge.wire_watch import Watch

CONNECTIONS_MAX: Final = 16_384
"""Clients at once; more wait in the kernel's queue."""
BACKLOG: Final = 1024
ACCEPT_PAUSE_S: Final = 0.1
"""After an accept that failed for want of descriptors or memory."""
_ACCEPTS_IN_A_ROW: Final = 32
_NO_RESOURCES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

_POST: Final = {
    "/api/chat": Route.CHAT,
    "/api/generate": Route.GENERATE,
    "/api/embed": Route.EMBED,
    "/api/embeddings": Route.EMBEDDINGS,
    "/api/show": Route.SHOW,
    "/v1/chat/completions": Route.V1_CHAT,
    "/v1/completions": Route.V1_COMPLETIONS,
    "/v1/embeddings": Route.V1_EMBEDDINGS,
    "/v1/responses": Route.V1_RESPONSES,
    "/v1/messages": Route.V1_MESSAGES,
    "/v1/audio/transcriptions": Route.V1_TRANSCRIPTIONS,
}
_MODELS: Final = "/v1/models/"


def route_of(method: str, path: str) -> Route | None:
    """The forwarded route that a clean, decoded `path` names; None: the web app's business."""
    if method == "POST":
        return _POST.get(path)
    if method == "GET" and path.startswith(_MODELS):
        model = path[len(_MODELS) :]
        return Route.V1_MODEL if model and "/" not in model else None
    return None


def quick_routes(front: Front | None) -> dict[str, Route]:
    """The POST routes by their paths: those that `front` would not take for a prefix of something else."""
    return {path: route for path, route in _POST.items() if front is None or not path.startswith(front.prefixes)}


def clean_path(path: str) -> str:
    """`path` without empty and dot segments; a slash at its end stays."""
    if "//" not in path and "/." not in path:
        return path
    clean = posixpath.normpath("/" + path.lstrip("/"))
    return clean + "/" if path.endswith("/") and clean != "/" else clean


Gate = Callable[[ClientConnection, RequestHead], Denied | None]

Takeover = Callable[[ClientConnection, RequestHead, Route], Awaitable[bool]]
"""Answers a request that another edge began (`edge.handover`); False: it is one like any other."""


class Serves(Interface):
    """What the listener needs of `edge.proxy.Proxy`."""

    async def serve(self, conn: ClientConnection, head: RequestHead, route: Route, /) -> None: ...


class Passes(Interface):
    """Who answers what is not forwarded: `edge.web.WebPass` at the coordinator."""

    async def serve(self, conn: ClientConnection, head: RequestHead, /, *, prefix: bytes = b"") -> None: ...


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address of `host` ("" or "*": all). Port 0 picks one for all. Raises OSError, as the system says it."""
    found = socket.getaddrinfo(
        None if host in ("", "*") else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE, family=socket.AF_UNSPEC
    )
    socks: list[socket.socket] = []
    try:
        for family, kind, number, _, address in found:
            sock = socket.socket(family, kind, number)
            socks.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            sock.listen(BACKLOG)
            port = port or sock.getsockname()[1]
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return socks


class Listener:
    """Serves accepted sockets until it is stopped. One instance for all ports.

    `front` comes first; then `gate` is asked, before an inference request's body is read. `report` gets exceptions that nobody should
    have let through. `quick` makes what may serve a connection's requests without its task.
    """

    def __init__(
        self,
        *,
        gate: Gate,
        proxy: Serves,
        web: Passes,
        watch: Watch,
        new_id: Callable[[], str],
        report: Callable[[Exception], None],
        front: Front | None = None,
        taken_over: Takeover | None = None,
        quick: Callable[[ClientConnection], Lane] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        self._gate = gate
        self._proxy = proxy
        self._web = web
        self._watch = watch
        self._new_id = new_id
        self._report = report
        self._front = front
        self._taken_over = taken_over
        self._quick = quick
        self._limits = limits
        self._connections_max = connections_max
        self._conns: dict[ClientConnection, None] = {}
        self._sockets: Sequence[socket.socket] = ()
        self._changed = trio.Event()
        self._accepting = trio.CancelScope()
        self._working = trio.CancelScope()
        self._stopping = False

    @property
    def connections(self) -> int:
        """Clients connected now."""
        return len(self._conns)

    async def serve(self, sockets: Sequence[socket.socket], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Accept and serve on listening `sockets`, which are closed at the end. Once; returns after `stop`."""
        self._sockets = sockets
        try:
            with self._working:
                async with trio.open_nursery() as nursery:
                    task_status.started()
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for sock in sockets:
                                acceptors.start_soon(self._accept, sock, nursery)
        finally:
            for sock in sockets:
                sock.close()

    async def stop(self, *, limit_s: float) -> None:
        """Accept no more, close idle connections, let work end within `limit_s`, then cut it."""
        self._stopping = True
        self._accepting.cancel()
        for sock in self._sockets:
            sock.close()
        for conn in list(self._conns):
            conn.stop_waiting()
        with trio.move_on_after(limit_s):
            while self._conns:
                await self._changed.wait()
        self._working.cancel()

    # ------------------------------------------------------------ accepting

    async def _accept(self, listening: socket.socket, nursery: trio.Nursery) -> None:
        local_port = 0 if listening.family == socket.AF_UNIX else listening.getsockname()[1]
        while True:
            await wait_readable(listening)
            for _ in range(_ACCEPTS_IN_A_ROW):
                while len(self._conns) >= self._connections_max:
                    await self._changed.wait()
                try:
                    sock, peer = listening.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _NO_RESOURCES:
                        await trio.sleep(ACCEPT_PAUSE_S)
                    break
                self._welcome(sock, peer, local_port, nursery)

    def _welcome(self, sock: socket.socket, peer: object, local_port: int, nursery: trio.Nursery) -> None:
        host, port = ("", 0) if not isinstance(peer, tuple) else peer[:2]
        if host.startswith("::ffff:"):
            host = host[7:]
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conn = ClientConnection(sock, self._watch, peer=(host, port), local_port=local_port, limits=self._limits)
        except OSError:  # it left already
            sock.close()
            return
        if self._quick is not None:
            conn.lane = self._quick(conn)
        self._conns[conn] = None
        nursery.start_soon(self._serve_connection, conn)

    # ------------------------------------------------------------ one connection

    async def _serve_connection(self, conn: ClientConnection) -> None:
        try:
            await self._serve_requests(conn)
            if conn.must_close:
                await conn.close_politely()
        except (ClientGone, trio.BrokenResourceError):
            pass
        finally:
            conn.close()
            conn.lane = conn.eager = None  # they hold the connection, and may not wait for the garbage collector together
            del self._conns[conn]
            self._changed.set()
            self._changed = trio.Event()

    async def _serve_requests(self, conn: ClientConnection) -> None:
        """Request after request. Returns when the connection is to be closed."""
        native = protocol = Protocol.NATIVE
        front = self._front
        try:
            while True:
                protocol = native
                head = await conn.read_head()
                if head is None:
                    return
                if self._stopping:
                    conn.must_close = True
                if (rest := conn.rest) is not None:
                    conn.rest = None
                    begun = route_of(head.method, head.path)
                    protocol = native if begun is None else begun.protocol
                    await rest()
                    await conn.finish_body()
                    if conn.must_close:
                        return
                    continue
                prefix = b""
                if front is not None and head.path.startswith(front.prefixes):
                    prefix = front.strip(head)
                route = route_of(head.method, head.path)
                if front is not None and b"origin" in head.block.fields and await self._answer_origin(front, conn, head):
                    pass
                elif route is not None:
                    protocol = route.protocol
                    if (
                        b"x-ollama-router-takeover" in head.block.fields
                        and self._taken_over is not None
                        and await self._taken_over(conn, head, route)
                    ):
                        denied = None
                    elif (denied := self._gate(conn, head)) is None:
                        await self._proxy.serve(conn, head, route)
                    if denied is not None:
                        await conn.send(denied.response(protocol, self._new_id(), keep_alive=not conn.must_close))
                elif not await self._answer_odd(conn, head, prefix):
                    await (self._web.serve(conn, head, prefix=prefix) if prefix else self._web.serve(conn, head))
                await conn.finish_body()
                if conn.must_close:
                    return
        except HttpError as error:
            await self._last_words(conn, protocol, error.status, error.text)
        except (ClientGone, trio.BrokenResourceError):
            conn.must_close = True
        except Exception as error:
            self._report(error)
            await self._last_words(conn, protocol, 500, "the router failed on this request; its log says more")

    async def _last_words(self, conn: ClientConnection, protocol: Protocol, status: int, text: str) -> None:
        """An error after which the connection closes. Not when an answer has begun: nothing could be told then."""
        conn.must_close = True
        if not conn.answered:
            await conn.send(error_response(status, text, protocol=protocol, request_id=self._new_id(), keep_alive=False))

    async def _answer_origin(self, front: Front, conn: ClientConnection, head: RequestHead) -> bool:
        """Answer what its origin decides; False: it is to be served, and its answer marked for that origin."""
        conn.stamp = front.stamp(head)
        answer = front.answer(head, self._new_id(), keep_alive=not conn.must_close)
        if answer is None:
            return False
        await conn.send(answer)
        return True

    async def _answer_odd(self, conn: ClientConnection, head: RequestHead, prefix: bytes) -> bool:
        """Answer what Ollama's mux answers before any handler; False: it is none of that."""
        path = head.path
        if path in ("*", ""):
            text = b"" if path else b"404 page not found\n"
            await self._send_plain(conn, head, 404 if text else 200, text)
            return True
        clean = clean_path(path)
        status = 307
        if clean == path:
            if not path.endswith("/") or route_of(head.method, path[:-1]) is None:
                return False
            clean = path[:-1]
            status = 301 if head.method == "GET" else 307
        location = quote(clean.encode("utf-8", "surrogateescape"), safe="/:@!$&'()*+,;=~-._")
        if head.query:
            location += "?" + head.query.decode("ascii")
        location = prefix.decode("ascii") + location
        extra = ((b"Location", location.encode("ascii")),)
        body = b""
        if head.method == "GET":
            words = "Moved Permanently" if status == 301 else "Temporary Redirect"
            body = f'<a href="{escape(location)}">{words}</a>.\n\n'.encode("ascii")
        await self._send_plain(conn, head, status, body, extra, "text/html; charset=utf-8" if head.method in ("GET", "HEAD") else "")
        return True

    async def _send_plain(
        self,
        conn: ClientConnection,
        head: RequestHead,
        status: int,
        body: bytes,
        extra: tuple[Header, ...] = (),
        content_type: str = "text/plain; charset=utf-8",
    ) -> None:
        await conn.send(
            simple_response(
                status,
                body,
                content_type=content_type if body or extra else "",
                extra=(*extra, (b"X-Request-Id", self._new_id().encode("ascii"))),
                keep_alive=not conn.must_close,
                head_only=head.method == "HEAD",
            )
        )
