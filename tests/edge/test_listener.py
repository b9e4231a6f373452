"""The public port: which requests go where, and how it stops."""

import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from core.events import Route, Upstream
from edge.denied import Denied
from edge.front import Front
from edge.headers import simple_response
from edge.listener import Listener, bind, clean_path, route_of
from edge.pool import Pool
from edge.web import WebPass
from edge.wire import ClientConnection, HttpError, Limits, RequestHead
from tests.edge.sockets import Peer, running_watch

Handler = Callable[[ClientConnection, RequestHead, Route], Awaitable[None]]


class Proxy:
    """Answers each forwarded request with its route's name, or as told."""

    def __init__(self) -> None:
        self.handler: Handler | None = None
        self.seen: list[tuple[Route, str]] = []

    async def serve(self, conn: ClientConnection, head: RequestHead, route: Route) -> None:
        self.seen.append((route, head.path))
        if self.handler is not None:
            await self.handler(conn, head, route)
            return
        while await conn.read_body_some():
            pass
        await conn.send(simple_response(200, route.value.encode(), keep_alive=not conn.must_close))


class World:
    """A listener on a real port, a web app that the test plays, and clients."""

    def __init__(self, listener: Listener, proxy: Proxy, port: int, web: socket.socket, pool: Pool) -> None:
        self.listener = listener
        self.proxy = proxy
        self.port = port
        self.web = web
        self.pool = pool
        self.denied: Denied | None = None
        self.reported: list[Exception] = []
        self.peers: list[Peer] = []

    def client(self) -> Peer:
        sock = socket.create_connection(("127.0.0.1", self.port))
        sock.setblocking(False)
        self.peers.append(Peer(sock))
        return self.peers[-1]

    async def web_side(self) -> Peer:
        """The next connection that the web app gets."""
        await trio.lowlevel.wait_readable(self.web)
        sock, _ = self.web.accept()
        sock.setblocking(False)
        self.peers.append(Peer(sock))
        return self.peers[-1]

    async def ask(self, data: bytes) -> str:
        """The whole answer to one request on a connection of its own, without `X-Request-Id`'s value."""
        peer = self.client()
        await peer.send(data)
        head = await peer.until_head()
        length = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
        body = head.partition("\r\n\r\n")[2]
        while len(body) < length:
            body += (await peer.receive()).decode()
        return head.partition("\r\n\r\n")[0] + "\r\n\r\n" + body


@contextlib.asynccontextmanager
async def world(
    *,
    limits: Limits | None = None,
    body_max_bytes: int = 1 << 20,
    connections_max: int = 100,
    front: Front | None = None,
    wrap: Callable[[socket.socket], Any] = lambda sock: sock,
) -> AsyncIterator[World]:
    with socket.create_server(("127.0.0.1", 0)) as web, trio.fail_after(10):
        web.setblocking(False)
        async with running_watch() as watch:
            pool = Pool(watch)
            proxy = Proxy()
            there: list[World] = []
            app = WebPass(
                Upstream(host="127.0.0.1", port=web.getsockname()[1]),
                pool,
                secret=b"s3cret",
                new_id=lambda: "id-1",
                body_max_bytes=body_max_bytes,
            )
            listener = Listener(
                gate=lambda conn, head: there[0].denied,
                proxy=proxy,
                web=app,
                watch=watch,
                new_id=lambda: "id-1",
                report=lambda error: there[0].reported.append(error),
                limits=limits or Limits(),
                connections_max=connections_max,
                front=front,
            )
            sockets = bind("127.0.0.1", 0)
            there.append(World(listener, proxy, sockets[0].getsockname()[1], web, pool))
            async with trio.open_nursery() as nursery:
                await nursery.start(listener.serve, [wrap(sock) for sock in sockets])
                try:
                    yield there[0]
                finally:
                    for peer in there[0].peers:
                        peer.sock.close()
                    with trio.CancelScope(shield=True):
                        await listener.stop(limit_s=1)
            pool.close_idle()


def post(path: str, body: bytes = b"{}", *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


def get(path: str, *more: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *more, "", ""]).encode()


# ---------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/api/chat", Route.CHAT),
        ("POST", "/api/generate", Route.GENERATE),
        ("POST", "/api/embed", Route.EMBED),
        ("POST", "/api/embeddings", Route.EMBEDDINGS),
        ("POST", "/api/show", Route.SHOW),
        ("POST", "/v1/chat/completions", Route.V1_CHAT),
        ("POST", "/v1/completions", Route.V1_COMPLETIONS),
        ("POST", "/v1/embeddings", Route.V1_EMBEDDINGS),
        ("POST", "/v1/responses", Route.V1_RESPONSES),
        ("POST", "/v1/messages", Route.V1_MESSAGES),
        ("GET", "/v1/models/llama3:8b", Route.V1_MODEL),
        ("GET", "/v1/models/a/b", None),
        ("GET", "/v1/models/", None),
        ("GET", "/v1/models", None),
        ("GET", "/api/chat", None),
        ("post", "/api/chat", None),
        ("POST", "/api/chat/", None),
        ("POST", "/API/chat", None),
        ("DELETE", "/api/delete", None),
    ],
)
def test_routes(method: str, path: str, route: Route | None) -> None:
    assert route_of(method, path) is route


@given(st.lists(st.sampled_from(["api", "chat", ".", "..", "", "a.b", "..."]), max_size=8), st.booleans())
def test_cleaning_is_final_and_keeps_what_is_clean(segments: list[str], slash: bool) -> None:
    path = "/" + "/".join(segments) + ("/" if slash else "")
    clean = clean_path(path)
    assert clean_path(clean) == clean
    assert clean.startswith("/")
    assert not {"", ".", ".."} & set(clean.strip("/").split("/")) or clean == "/"
    if not {"", ".", ".."} & set(segments):
        assert clean.rstrip("/") == path.rstrip("/")


async def test_forwarded_routes_in_any_spelling_reach_the_proxy_and_nothing_else_does() -> None:
    async with world() as w:
        assert (await w.ask(post("/api%2Fchat?x=1"))).endswith("\r\n\r\nchat")
        assert (await w.ask(post("http://elsewhere/v1/messages"))).endswith("v1_messages")
        assert (await w.ask(get("/v1/models/x%3Ay"))).endswith("v1_model")
        assert w.proxy.seen == [(Route.CHAT, "/api/chat"), (Route.V1_MESSAGES, "/v1/messages"), (Route.V1_MODEL, "/v1/models/x:y")]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (
            get("/api/../api/version"),
            "HTTP/1.1 307 Temporary Redirect|Content-Type: text/html; charset=utf-8|Location: /api/version|X-Request-Id: id-1"
            '|Content-Length: 48||<a href="/api/version">Temporary Redirect</a>.\n\n',
        ),
        (
            get("//api/tags?a=<"),
            "HTTP/1.1 307 Temporary Redirect|Content-Type: text/html; charset=utf-8|Location: /api/tags?a=<|X-Request-Id: id-1"
            '|Content-Length: 52||<a href="/api/tags?a=&lt;">Temporary Redirect</a>.\n\n',
        ),
        (post("/api/x%2F..%2Fchat"), "HTTP/1.1 307 Temporary Redirect|Location: /api/chat|X-Request-Id: id-1|Content-Length: 0||"),
        (post("/api/chat/"), "HTTP/1.1 307 Temporary Redirect|Location: /api/chat|X-Request-Id: id-1|Content-Length: 0||"),
        (get("*", method="OPTIONS"), "HTTP/1.1 200 OK|X-Request-Id: id-1|Content-Length: 0||"),
        (
            get("a:1", method="CONNECT"),
            "HTTP/1.1 404 Not Found|Content-Type: text/plain; charset=utf-8|X-Request-Id: id-1|Content-Length: 19||404 page not found\n",
        ),
    ],
)
async def test_what_ollamas_mux_answers_itself(request_: bytes, expected: str) -> None:
    async with world() as w:
        assert await w.ask(request_) == expected.replace("|", "\r\n")
        assert not w.proxy.seen


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"hello\r\n\r\n", 400),
        (post("/api/chat", b"{}", "Transfer-Encoding: chunked"), 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET / HTTP/1.1\n\n", 400),
    ],
)
async def test_bad_requests_get_one_sentence_and_a_close(data: bytes, status: int) -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(data)
        answer = (await peer.rest()).decode()
        assert answer.startswith(f"HTTP/1.1 {status} ")
        assert "\r\nX-Request-Id: id-1\r\n" in answer
        assert "\r\nConnection: close\r\n" in answer
        assert answer.partition("\r\n\r\n")[2].startswith('{"error":"')


async def test_an_error_after_a_good_request_is_told_too() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(post("/api/chat") + b"nonsense\r\n\r\n")
        assert b"chatHTTP/1.1 400 Bad Request\r\n" in await peer.rest()


async def test_the_gate_is_asked_before_the_body() -> None:
    async with world() as w:
        w.denied = Denied(status=401, text="an API key is needed", headers=((b"WWW-Authenticate", b"Bearer"),))
        answer = await w.ask(post("/v1/chat/completions"))
        assert answer.startswith("HTTP/1.1 401 Unauthorized\r\n")
        assert "\r\nWWW-Authenticate: Bearer\r\n" in answer
        assert '{"error":{"message":"an API key is needed"' in answer
        assert not w.proxy.seen


async def test_errors_of_the_proxy_have_the_routes_manners() -> None:
    async def too_large(conn: ClientConnection, head: RequestHead, route: Route) -> None:
        raise HttpError(413, "the request body is too large")

    async def bug(conn: ClientConnection, head: RequestHead, route: Route) -> None:
        raise KeyError("secret detail")

    async with world() as w:
        w.proxy.handler = too_large
        assert '{"type":"error","error":{"type":"request_too_large"' in await w.ask(post("/v1/messages"))
        w.proxy.handler = bug
        answer = await w.ask(post("/api/chat"))
        assert answer.startswith("HTTP/1.1 500 ")
        assert "secret" not in answer
        assert isinstance(w.reported[0], KeyError)


async def test_an_answer_that_has_begun_is_cut_not_mended() -> None:
    async def begin(conn: ClientConnection, head: RequestHead, route: Route) -> None:
        await conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc")
        raise KeyError("x")

    async with world() as w:
        w.proxy.handler = begin
        peer = w.client()
        await peer.send(post("/api/chat"))
        assert (await peer.rest()).endswith(b"\r\n\r\nabc")


# ---------------------------------------------------------------- the web app


async def test_other_requests_go_to_the_web_app_and_say_who_asks() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(get("/api%2Ftags", "X-Router-Secret: guess", "Authorization: Bearer t"))
        app = await w.web_side()
        asked = await app.until(b"\r\n\r\n")
        port = peer.sock.getsockname()[1]
        assert asked == (
            b"GET /api/tags HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer t\r\n"
            b"X-Router-Peer: 127.0.0.1:%d\r\nX-Router-Secret: s3cret\r\n\r\n" % port
        )
        await app.send(b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\n{}")
        assert await peer.until(b"{}") == b"HTTP/1.1 200 OK\r\nX-Request-Id: theirs\r\nContent-Length: 2\r\n\r\n{}"
        await peer.send(get("/again", method="HEAD"))
        await app.until(b"\r\n\r\n")
        await app.send(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n")
        assert await peer.until(b"\r\n\r\n") == b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"


async def test_events_pass_at_once_and_leaving_ends_them() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(get("/api/dashboard/events"))
        app = await w.web_side()
        await app.until(b"\r\n\r\n")
        await app.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await peer.until(b"\r\n\r\n")
        await app.send(b"9\r\ndata: 1\n\n\r\n")
        assert await peer.until(b"\n\n\r\n") == b"9\r\ndata: 1\n\n\r\n"
        peer.sock.close()
        assert await app.rest() == b""


async def test_a_body_is_streamed_both_ways() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(b"POST /api/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        app = await w.web_side()
        await app.until(b"\r\n\r\n3\r\nabc\r\n")
        await peer.send(b"2\r\nde\r\n0\r\n\r\n")
        await app.until(b"2\r\nde\r\n0\r\n\r\n")
        await app.send(b"HTTP/1.1 201 Created\r\n\r\nmade")
        app.sock.close()
        assert (await peer.until(b"0\r\n\r\n")).endswith(b"\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmade\r\n0\r\n\r\n")


async def test_an_upload_of_any_size_is_answered_by_its_head_alone() -> None:
    async with world(body_max_bytes=10) as w:
        peer = w.client()
        await peer.send(b"POST /api/blobs/x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 107374182400\r\n\r\n")
        app = await w.web_side()
        head = await app.until(b"\r\n\r\n")
        assert b"content-length" not in head.lower()
        await app.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        answer = await peer.rest()
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert b"\r\nConnection: close\r\n" in answer


async def test_an_old_client_gets_a_body_that_ends_with_the_connection() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(b"GET /x HTTP/1.0\r\n\r\n")
        app = await w.web_side()
        await app.until(b"\r\n\r\n")
        await app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        assert await peer.rest() == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc"


async def test_a_body_over_the_limit() -> None:
    async with world(body_max_bytes=10) as w:
        assert (await w.ask(post("/api/create", b"x" * 11))).startswith("HTTP/1.1 413 ")
        peer = w.client()
        await peer.send(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nb\r\nxxxxxxxxxxx\r\n0\r\n\r\n")
        assert (await peer.rest()).startswith(b"HTTP/1.1 413 ")


async def test_an_app_that_breaks_off() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(get("/x"))
        app = await w.web_side()
        await app.until(b"\r\n\r\n")
        await app.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await peer.until(b"3\r\nabc\r\n")
        app.sock.close()
        assert await peer.rest() == b""


async def test_a_stale_connection_to_the_app_is_replaced_and_a_dead_app_is_a_503() -> None:
    async with world() as w:
        peer = w.client()
        await peer.send(get("/x"))
        app = await w.web_side()
        await app.until(b"\r\n\r\n")
        await app.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        await peer.until(b"\r\n\r\n")
        await peer.send(get("/y"))
        await app.until(b"\r\n\r\n")
        app.sock.close()  # without a byte: as if it had been closed before
        again = await w.web_side()
        await again.until(b"\r\n\r\n")
        await again.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        await peer.until(b"\r\n\r\n")
        again.sock.close()
        w.web.close()
        await wait_all_tasks_blocked()
        await peer.send(get("/z"))
        answer = await peer.until(b"}")
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nRetry-After: 1\r\n" in answer


# ---------------------------------------------------------------- ports and stopping


async def test_stop_closes_the_idle_lets_work_end_and_accepts_no_more() -> None:
    go = trio.Event()

    async def wait(conn: ClientConnection, head: RequestHead, route: Route) -> None:
        await go.wait()
        await conn.send(simple_response(200, b"done", keep_alive=not conn.must_close))

    async with world() as w:
        w.proxy.handler = wait
        idle, busy = w.client(), w.client()
        await busy.send(post("/api/chat"))
        while len(w.proxy.seen) < 1 or w.listener.connections < 2:
            await trio.lowlevel.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: w.listener.stop(limit_s=5))
            assert await idle.rest() == b""
            with pytest.raises(ConnectionRefusedError):
                w.client()
            go.set()
            answer = await busy.rest()
            assert answer.endswith(b"\r\nConnection: close\r\n\r\ndone")
            busy.sock.close()
        assert w.listener.connections == 0


async def test_stop_cuts_what_does_not_end() -> None:
    async def for_ever(conn: ClientConnection, head: RequestHead, route: Route) -> None:
        await trio.sleep_forever()

    async with world() as w:
        w.proxy.handler = for_ever
        busy = w.client()
        await busy.send(post("/api/chat"))
        while not w.proxy.seen:
            await trio.lowlevel.checkpoint()
        await w.listener.stop(limit_s=0)
        assert await busy.rest() == b""


async def test_more_clients_than_allowed_wait_their_turn() -> None:
    async with world(connections_max=1) as w:
        first, second = w.client(), w.client()
        await first.send(post("/api/chat"))
        await first.until(b"chat")
        await second.send(post("/api/embed"))
        await wait_all_tasks_blocked()
        assert len(w.proxy.seen) == 1
        first.sock.close()
        await second.until(b"embed")


async def test_running_out_of_descriptors_is_a_pause_not_an_end() -> None:
    class Listening:
        family = socket.AF_INET
        failed = 0

        def __init__(self, real: socket.socket) -> None:
            self.real = real

        def fileno(self) -> int:
            return self.real.fileno()

        def getsockname(self) -> tuple[str, int]:
            return ("127.0.0.1", 1)

        def accept(self) -> object:
            if Listening.failed < 3:
                Listening.failed += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()

        def close(self) -> None:
            self.real.close()

    async with world(wrap=Listening) as w:
        assert (await w.ask(post("/api/chat"))).endswith("chat")
        assert Listening.failed == 3


def test_a_port_in_use_is_an_os_error_and_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError) as caught:
        bind("127.0.0.1", taken.getsockname()[1])
    assert caught.value.errno == errno.EADDRINUSE


def test_all_addresses_share_one_port() -> None:
    sockets = bind("", 0)
    assert len({sock.getsockname()[1] for sock in sockets}) == 1
    for sock in sockets:
        sock.close()


# ---------------------------------------------------------------- the front

LOCAL = "Origin: http://localhost:3000"
MARKS = "Access-Control-Allow-Origin: http://localhost:3000\r\nVary: Origin\r\n"


async def test_every_answer_to_another_page_is_marked_once() -> None:
    async with world(front=Front(base_path="/ollama")) as there:
        assert (await there.ask(post("/api/chat", b"{}", LOCAL))).count(MARKS) == 1
        there.denied = Denied(status=401, text="no")
        assert (await there.ask(post("/api/chat", b"{}", LOCAL))).count(MARKS) == 1
        there.denied = None
        assert (await there.ask(post("//api/chat", b"{}", LOCAL))).count(MARKS) == 1
        peer = there.client()
        await peer.send(post("/ollama/api/tags/", b"", LOCAL))
        app = await there.web_side()
        await app.until_head()
        await app.send(b"HTTP/1.1 307 T\r\nAccess-Control-Allow-Origin: *\r\nLocation: /api/tags\r\nContent-Length: 0\r\n\r\n")
        answer = await peer.until_head()
        assert answer.startswith("HTTP/1.1 307 T\r\n" + MARKS)
        assert answer.count("Access-Control") == 1
        assert "Location: /ollama/api/tags\r\n" in answer
        await peer.send(post("/api/chat", b"{}"))
        assert "Access-Control" not in await peer.until_head()


async def test_the_marks_stand_on_the_answer_and_not_on_100_continue() -> None:
    async with world(front=Front()) as there:
        peer = there.client()
        head, _, body = post("/api/chat", b"{}", LOCAL, "Expect: 100-continue").partition(b"\r\n\r\n")
        await peer.send(head + b"\r\n\r\n")
        assert await peer.until_head() == "HTTP/1.1 100 Continue\r\n\r\n"
        await peer.send(body)
        assert (await peer.until_head()).startswith("HTTP/1.1 200 OK\r\n" + MARKS)


async def test_strangers_and_preflights_reach_nobody_and_keep_their_connection() -> None:
    async with world(front=Front()) as there:
        peer = there.client()
        await peer.send(post("/api/chat", b"{}", "Origin: https://example.com"))
        assert (await peer.until_head()).startswith("HTTP/1.1 403 Forbidden\r\n")
        await peer.send(f"OPTIONS /api/chat HTTP/1.1\r\nHost: a\r\n{LOCAL}\r\n\r\n".encode())
        answer = await peer.until_head()
        assert answer.startswith("HTTP/1.1 204 No Content\r\n" + MARKS)
        assert "Content-Length" not in answer
        assert there.proxy.seen == []
        await peer.send(post("/k/some-key/api/chat"))
        assert (await peer.until_head()).startswith("HTTP/1.1 200 OK")
        assert there.proxy.seen == [(Route.CHAT, "/api/chat")]


async def test_a_redirect_keeps_the_prefix() -> None:
    async with world(front=Front()) as there:
        assert "Location: /k/some-key/api/chat\r\n" in await there.ask(post("/k/some-key/api/chat/"))
        assert "Location: /k/some-key/api/chat\r\n" in await there.ask(post("/k/some-key//api/chat"))
