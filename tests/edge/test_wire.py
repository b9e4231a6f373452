"""What a client may send, how long it may take, and what becomes of it when it leaves."""

import socket
import struct

import h11
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from edge.wire import BACKLOG_MAX_BYTES, HEAD_MAX_BYTES, ChunkDecoder, ClientGone, HttpError, Limits, RequestHead, parse_request_head
from edge.wire_heads import refuse_early
from tests.edge.sockets import Peer, client

GET = b"GET /api/tags HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /api/chat HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"

BOTH = pytest.mark.parametrize("use_epoll", [True, False])


# ---------------------------------------------------------------- heads, without I/O


def head_of(*lines: bytes) -> RequestHead:
    return parse_request_head(b"\r\n".join(lines) + b"\r\n\r\n")


def test_a_head_is_taken_apart() -> None:
    head = head_of(b"POST /api%2Fchat?a=%20 HTTP/1.1", b"Host: x:1", b"Content-Length: 12", b"Accept:  a/b\t ", b"accept: c/d")
    assert (head.method, head.target, head.path, head.query, head.version) == ("POST", b"/api%2Fchat?a=%20", "/api/chat", b"a=%20", "1.1")
    assert head.headers == [(b"Host", b"x:1"), (b"Accept", b"a/b"), (b"accept", b"c/d")]
    assert head.fields == {b"host": b"x:1", b"accept": b"a/b, c/d"}
    assert (head.content_length, head.chunked, head.keep_alive, head.has_body) == (12, False, True, True)


def test_what_one_request_said_is_not_taken_for_the_next() -> None:
    assert [head_of(b"POST / HTTP/1.1", b"Host: x", b"Content-Length: %d" % n).content_length for n in (1, 2, 0)] == [1, 2, 0]
    assert head_of(b"POST / HTTP/1.1", b"Host: x").content_length is None


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"http://host:1/api/version?x", "/api/version"),
        (b"http://host", "/"),
        (b"/a%2fb%00", "/a/b\0"),
        (b"/%ff", "/\udcff"),
        (b"//api/tags", "//api/tags"),
    ],
)
def test_paths_are_decoded(target: bytes, path: str) -> None:
    assert head_of(b"GET " + target + b" HTTP/1.1", b"Host: x").path == path


@pytest.mark.parametrize(
    ("version", "connection", "keep"),
    [("1.1", None, True), ("1.1", "close", False), ("1.1", "Upgrade, Close", False), ("1.0", None, False), ("1.0", "keep-alive", False)],
)
def test_keep_alive(version: str, connection: str | None, keep: bool) -> None:
    lines = [f"GET / HTTP/{version}", "Host: x"] + ([f"Connection: {connection}"] if connection else [])
    assert head_of(*(line.encode() for line in lines)).keep_alive is keep


REFUSED = [
    (400, b"hello\r\n\r\n"),
    (400, b"GET /\r\n\r\n"),
    (400, b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET api HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /%zz HTTP/1.1\r\nHost: a\r\n\r\n"),
    (400, b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n"),
    (505, b"GET / HTTP/3.7\r\nHost: a\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n 2\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
    (400, b"GET / HTTP/1.1\nHost: a\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 2\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 5\r\nContent-length:6\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (400, b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
    (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\nContent-Length: 3\r\n\r\n"),
    (501, b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
    (417, b"POST / HTTP/1.1\r\nHost: a\r\nExpect: wonders\r\nContent-Length: 3\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "data"), REFUSED)
def test_what_is_refused(status: int, data: bytes) -> None:
    for _ in range(2):  # the second time from memory
        with pytest.raises(HttpError) as caught:
            parse_request_head(data)
        assert caught.value.status == status


def test_equal_lengths_are_one() -> None:
    assert head_of(b"POST / HTTP/1.1", b"Host: a", b"Content-Length: 5", b"content-length: 5").content_length == 5


@pytest.mark.parametrize("data", [b"\x16\x03\x01", b"\r\n", b"hello\r\n", b"GET / HTTP/1.1\n", b"GET / HTTP/1.1\r\nHost: a\n\n"])
def test_what_cannot_become_a_request_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(HttpError):
        refuse_early(data)


# Pieces from which something like a request is built: enough good ones that many are accepted, enough bad ones that many are not.
LINES = st.sampled_from(
    [b"Host: a", b"Host: a", b"Host: b", b"Content-Length: 3", b"Content-Length: 3", b"content-length: 4", b"Content-Length: 3,3",
     b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Connection: close", b"X: y", b"X:", b" folded", b"bad name: x",
     b"Y : z", b"Z: a\0b", b"Z: \x01", b"Z: \x80\xff", b"Z:\tq ", b"\x00", b"Content-Length:  3", b"Host:"]
)  # fmt: skip
STARTS = st.sampled_from(
    [b"GET / HTTP/1.1", b"POST /x HTTP/1.1", b"POST /x HTTP/1.0", b"G@T / HTTP/1.1", b"GET / HTTP/1.9", b"GET  / HTTP/1.1",
     b"GET /\x7f HTTP/1.1",
     b"GET / http/1.1", b"", b"GET / HTTP/2.0", b"OPTIONS * HTTP/1.1", b"GET http://a/b HTTP/1.1"]
)  # fmt: skip
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"])
BODIES = st.sampled_from(
    [b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"3;x\r\nabc\r\n0\r\nT: u\r\n\r\n", b"3\nabc\n0\n\n", b"zz\r\n", b"3\r\nabcd\r\n0\r\n\r\n",
     b"0\r\nbad\r\n\r\n",
     b"03 \r\nabc\r\n0\r\n\r\n", b"0\r\n\r\nGET", b"3\r\nabc\r0\r\n\r\n", b"fffffffffffffffff\r\n"]
)  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    data = draw(STARTS) + draw(ENDS)
    for line in draw(st.lists(LINES, max_size=5)):
        data += line + draw(ENDS)
    return data + b"\r\n" + draw(BODIES)


def read_by_h11(data: bytes) -> bytes | None:
    """The body, as far as it is there; None: refused."""
    conn = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    body = b""
    try:
        conn.receive_data(data)
        while True:
            event = conn.next_event()
            if isinstance(event, h11.Data):
                body += bytes(event.data)
            elif not isinstance(event, h11.Request):
                return body
    except h11.RemoteProtocolError:
        return None


def read_by_us(pieces: list[bytes]) -> bytes | None:
    data, end = b"", 3
    feed = iter(pieces)
    try:
        for piece in feed:
            data += piece
            end = data.find(b"\r\n\r\n") + 4
            if end > 3:
                break
            if data:
                refuse_early(data)
        if end == 3:
            return b""
        head = parse_request_head(data[:end])
        rest = [data[end:], *feed]
        if head.chunked:
            decoder = ChunkDecoder()
            body = b""
            for piece in rest:
                if not decoder.done:
                    body += decoder.feed(piece)
            return body
        return b"".join(rest)[: head.content_length or 0]
    except HttpError:
        return None


@given(requests(), st.lists(st.integers(1, 40), max_size=12))
@example(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", [1] * 12)
def test_whatever_h11_refuses_is_refused_and_bodies_agree(data: bytes, cuts: list[int]) -> None:
    pieces, rest = [], data
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    pieces.append(rest)
    whole, theirs = read_by_us([data]), read_by_h11(data)
    assert read_by_us(pieces) == whole
    assert read_by_us([data[i : i + 1] for i in range(len(data))]) == whole
    if whole is not None:
        assert theirs == whole


@given(st.binary(max_size=200))
def test_no_bytes_bring_it_down(data: bytes) -> None:
    whole = read_by_us([data])
    if whole is not None:
        assert read_by_h11(data) == whole


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.integers(1, 20), st.binary(max_size=10))
def test_chunks_come_out_as_they_went_in(chunks: list[bytes], step: int, after: bytes) -> None:
    data = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nA: b\r\n\r\n" + after
    decoder, body, fed = ChunkDecoder(), b"", 0
    while not decoder.done:
        body += decoder.feed(data[fed : fed + step])
        fed += step
    assert body == b"".join(chunks)
    assert decoder.rest + data[fed:] == after


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"zz\r\n", "invalid byte in chunk length"),
        (b"fffffffffffffffff\r\n", "http chunk length too large"),
        (b"3\n", "chunked line ends with bare LF"),
        (b"3\r\nabcXY", "malformed chunked encoding"),
        (b"0\r\n" + b"A: b\r\n" * 3000, "malformed trailer"),
        (b"3;" + b"x" * 5000, "a chunk line is too long"),
    ],
)
def test_broken_chunks(data: bytes, text: str) -> None:
    with pytest.raises(HttpError, match=text):
        ChunkDecoder().feed(data)


# ---------------------------------------------------------------- on a socket


async def read_body(conn: object) -> bytes:
    body = b""
    while piece := await conn.read_body_some():  # type: ignore[attr-defined]
        body += piece
    return body


@BOTH
async def test_requests_follow_each_other_and_may_come_at_once(use_epoll: bool) -> None:
    async with client(use_epoll=use_epoll) as (conn, peer):
        await peer.send(POST + POST.replace(b"hello", b"world") + GET)
        bodies = []
        for _ in range(3):
            assert await conn.read_head() is not None
            bodies.append(await read_body(conn))
        assert bodies == [b"hello", b"world", b""]
        peer.sock.close()
        assert await conn.read_head() is None


@BOTH
async def test_byte_by_byte(use_epoll: bool) -> None:
    data = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    async def drip(peer: Peer) -> None:
        for i in range(len(data)):
            await peer.send(data[i : i + 1])
            await wait_all_tasks_blocked()

    async with client(use_epoll=use_epoll) as (conn, peer), trio.open_nursery() as nursery:
        nursery.start_soon(drip, peer)
        head = await conn.read_head()
        assert head is not None
        assert head.chunked
        assert await read_body(conn) == b"abcde"


async def test_a_large_body() -> None:
    body = bytes(range(256)) * 4096 * 3
    async with client() as (conn, peer), trio.open_nursery() as nursery:
        nursery.start_soon(peer.send, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body + GET)
        await conn.read_head()
        assert await read_body(conn) == body
        head = await conn.read_head()
        assert head is not None
        assert head.method == "GET"


async def test_a_head_that_is_too_large() -> None:
    async with client() as (conn, peer), trio.open_nursery() as nursery:
        nursery.start_soon(peer.send, b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (HEAD_MAX_BYTES + 1) + b"\r\n\r\n")
        with pytest.raises(HttpError) as caught:
            await conn.read_head()
        assert caught.value.status == 431


async def test_continue_is_said_when_the_body_is_first_read() -> None:
    async with client() as (conn, peer):
        await peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        await conn.read_head()
        with pytest.raises(BlockingIOError):
            peer.sock.recv(1)
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                assert await peer.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                await peer.send(b"ok")

            nursery.start_soon(answer)
            assert await read_body(conn) == b"ok"
        assert not conn.answered


async def test_a_body_nobody_asked_for_with_continue_closes() -> None:
    async with client() as (conn, peer):
        await peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        await conn.read_head()
        await conn.finish_body()
        assert conn.must_close


async def test_an_unread_body_is_drained_when_small_and_closes_when_large() -> None:
    async with client() as (conn, peer):
        await peer.send(POST + GET)
        await conn.read_head()
        await conn.finish_body()
        assert not conn.must_close
        assert await conn.read_head() is not None
    async with client() as (conn, peer):
        await peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        await conn.read_head()
        await conn.finish_body()
        assert conn.must_close


# ---------------------------------------------------------------- time


@BOTH
async def test_a_slow_head_is_a_408_and_each_byte_earns_nothing(use_epoll: bool) -> None:
    async with client(limits=Limits(head_s=10), use_epoll=use_epoll) as (conn, peer), trio.open_nursery() as nursery:
        caught: list[HttpError] = []

        async def read() -> None:
            try:
                await conn.read_head()
            except HttpError as error:
                caught.append(error)

        start = conn.watch.now
        nursery.start_soon(read)
        await peer.send(b"GET / H")
        await wait_all_tasks_blocked()
        for second in range(1, 13):
            conn.watch.sweep(start + second)
            await wait_all_tasks_blocked()
            if caught:
                break
            await peer.send(b"x")
            await wait_all_tasks_blocked()
        assert caught[0].status == 408
        assert second in (11, 12)
        assert conn.must_close
        await conn.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert await peer.until(b"\r\n\r\n")


async def test_an_idle_client_is_let_go_without_a_word() -> None:
    async with client(limits=Limits(idle_s=5)) as (conn, _), trio.open_nursery() as nursery:
        got: list[object] = []

        async def read() -> None:
            got.append(await conn.read_head())

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        assert conn.waits
        conn.watch.sweep(conn.watch.now + 4)
        await wait_all_tasks_blocked()
        assert not got
        conn.watch.sweep(conn.watch.now + 2)
        await wait_all_tasks_blocked()
        assert got == [None]


async def test_a_slow_body_is_a_408_but_a_steady_one_is_not() -> None:
    async with client(limits=Limits(body_s=5, body_bytes_per_s=10)) as (conn, peer), trio.open_nursery() as nursery:
        outcome: list[object] = []

        async def read() -> None:
            await conn.read_head()
            try:
                await read_body(conn)
            except HttpError as error:
                outcome.append(error.status)

        nursery.start_soon(read)
        await peer.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        await wait_all_tasks_blocked()
        for _ in range(10):  # 20 bytes in 2 s: as much patience as it costs
            conn.watch.sweep(conn.watch.now + 2)
            await peer.send(b"x" * 20)
            await wait_all_tasks_blocked()
        assert outcome == []
        for _ in range(8):  # one byte a second
            conn.watch.sweep(conn.watch.now + 1)
            await peer.send(b"x")
            await wait_all_tasks_blocked()
        assert outcome == [408]


async def test_a_client_that_does_not_read_is_dropped_and_blocks_nobody() -> None:
    async with client(limits=Limits(write_s=60)) as (conn, _):
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sent = 0
        dropped = False

        async def pour() -> None:
            nonlocal sent, dropped
            try:
                while True:
                    await conn.send(b"x" * 65536)
                    sent += 65536
            except ClientGone:
                dropped = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            await wait_all_tasks_blocked()
            assert sent >= BACKLOG_MAX_BYTES - 65536
            conn.watch.sweep(conn.watch.now + 59)
            await wait_all_tasks_blocked()
            assert not dropped
            conn.watch.sweep(conn.watch.now + 2)
        assert dropped
        assert conn.gone


async def test_a_slow_client_gets_everything_in_order() -> None:
    data = bytes(range(256)) * 4096 * 4
    async with client() as (conn, peer), trio.open_nursery() as nursery:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

        async def pour() -> None:
            for i in range(0, len(data), 100_000):
                await conn.send(data[i : i + 100_000])
            await conn.close_politely()

        nursery.start_soon(pour)
        await wait_all_tasks_blocked()
        assert await peer.rest() == data
        peer.sock.close()


async def test_a_write_deadline_that_was_met_does_no_harm_later() -> None:
    async with client(limits=Limits(write_s=60, idle_s=1000)) as (conn, peer), trio.open_nursery() as nursery:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        nursery.start_soon(conn.send, b"x" * (8 << 20))
        got = 0
        while got < 8 << 20:
            got += len(await peer.receive())
        await conn.flush()
        conn.watch.sweep(conn.watch.now + 100)
        await peer.send(GET)
        assert await conn.read_head() is not None


# ---------------------------------------------------------------- leaving


async def leave(conn: object, peer: Peer, how: str) -> None:
    if how == "half":
        peer.sock.shutdown(socket.SHUT_WR)
    elif how == "reset":
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.sock.close()
    else:
        peer.sock.close()
    if conn.watch.edges is False:  # type: ignore[attr-defined]
        conn.watch.peek()  # type: ignore[attr-defined]


@BOTH
@pytest.mark.parametrize("how", ["close", "half", "reset"])
async def test_leaving_cancels_the_work_at_once(how: str, use_epoll: bool) -> None:
    async with client(use_epoll=use_epoll) as (conn, peer):
        await peer.send(POST)
        await conn.read_head()
        await read_body(conn)
        with trio.CancelScope() as scope:
            conn.begin(scope)
            await leave(conn, peer, how)
            await trio.sleep_forever()
        conn.end()
        assert scope.cancelled_caught
        assert conn.gone
        with pytest.raises(ClientGone):
            await conn.send(b"x")


async def test_a_client_that_left_before_the_work_began() -> None:
    async with client() as (conn, peer):
        await peer.send(GET)
        peer.sock.shutdown(socket.SHUT_WR)
        await conn.read_head()
        with trio.CancelScope() as scope:
            conn.begin(scope)
            await trio.sleep_forever()
        assert conn.gone


async def test_pipelined_bytes_are_not_leaving() -> None:
    async with client() as (conn, peer):
        await peer.send(GET)
        await conn.read_head()
        with trio.move_on_after(10) as scope:
            conn.begin(scope)
            await peer.send(GET)
            await wait_all_tasks_blocked()
        conn.end()
        assert not scope.cancelled_caught
        assert not conn.gone
        assert await conn.read_head() is not None


async def test_leaving_within_a_head_or_a_body() -> None:
    for data in (GET[:10], POST[:-1]):
        async with client() as (conn, peer):
            await peer.send(data)
            peer.sock.close()
            with pytest.raises(ClientGone):
                await conn.read_head()
                await read_body(conn)


async def test_a_client_that_resets_while_it_is_sent_to() -> None:
    async with client() as (conn, peer):
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

        async def pour() -> None:
            with pytest.raises(ClientGone):
                while True:
                    await conn.send(b"x" * 65536)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour)
            await wait_all_tasks_blocked()
            peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.sock.close()
        assert conn.gone
        with pytest.raises(ClientGone):
            await conn.send(b"x")
        await conn.close_politely()
        assert conn.closed


async def test_closing_wakes_whoever_waits_to_send() -> None:
    async with client() as (conn, _), trio.open_nursery() as nursery:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

        async def pour() -> None:
            with pytest.raises(ClientGone):
                while True:
                    await conn.send(b"x" * 65536)

        nursery.start_soon(pour)
        await wait_all_tasks_blocked()
        conn.close()


async def test_the_last_answer_is_seen_though_the_client_still_sends() -> None:
    async with client() as (conn, peer), trio.open_nursery() as nursery:
        await peer.send(POST[:-5] + b"x" * 100_000)
        await conn.read_head()
        await conn.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        nursery.start_soon(conn.close_politely)
        assert await peer.rest() == b"HTTP/1.1 400 Bad Request\r\n\r\n"
        peer.sock.close()


async def test_stopping_closes_an_idle_connection_and_lets_a_busy_one_end() -> None:
    async with client() as (conn, peer), trio.open_nursery() as nursery:
        nursery.start_soon(conn.read_head)
        await wait_all_tasks_blocked()
        conn.stop_waiting()
        assert await peer.rest() == b""
    async with client() as (conn, peer):
        await peer.send(GET)
        await conn.read_head()
        conn.stop_waiting()
        assert conn.must_close
        assert not conn.closed
