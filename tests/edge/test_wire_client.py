"""Where an answer begins, ends, or was cut."""

import socket
import struct

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from edge.wire import UpstreamConnection, UpstreamCut, UpstreamGarbled
from edge.wire_heads import HEAD_MAX_BYTES, parse_response_head
from tests.edge.sockets import NODE, Peer, running_watch, tcp_pair, upstream

BOTH = pytest.mark.parametrize("use_epoll", [True, False])
CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"


async def read_all(conn: UpstreamConnection) -> bytes:
    await conn.read_head()
    body = b""
    while piece := await conn.read_some():
        body += piece
    return body


@pytest.mark.parametrize(
    ("data", "framing", "keeps"),
    [
        (CHUNKED, "chunked", True),
        (LENGTH, "length", True),
        (LENGTH.replace(b"1.1", b"1.0"), "length", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\ncontent-length: 5\r\nConnection: x, Close\r\n\r\n", "length", False),
        (b"HTTP/1.1 200 OK\r\n\r\n", "close", False),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", "none", True),
        (b"HTTP/1.1 499 \r\nContent-Length: 0\r\n\r\n", "length", True),
        (b"HTTP/1.1 200\r\nX: y \r\n\r\n", "close", False),
    ],
)
def test_heads(data: bytes, framing: str, keeps: bool) -> None:
    head = parse_response_head(data, no_body=False)
    assert (head.framing, head.keeps) == (framing, keeps)
    assert parse_response_head(data, no_body=True).framing == "none"


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad\r\n\r\n",
        b"HTTP/1.1 200 OK\nX: y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    ],
)
def test_heads_that_cannot_be(data: bytes) -> None:
    with pytest.raises(ValueError):
        parse_response_head(data, no_body=False)


@BOTH
async def test_one_connection_after_another_framing(use_epoll: bool) -> None:
    async with upstream(use_epoll=use_epoll) as (conn, node):
        for answer, body, chunks in [
            (LENGTH + b"hello", b"hello", 0),
            (CHUNKED + b"3\r\nabc\r\n2;x\r\nde\r\n0\r\nT: u\r\n\r\n", b"abcde", 2),
            (b"HTTP/1.1 204 No Content\r\n\r\n", b"", 0),
            (CHUNKED + b"0\r\n\r\n", b"", 0),
            (b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early\r\nA: b\r\n\r\n" + LENGTH + b"world", b"world", 0),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", 0),
        ]:
            await conn.send(b"GET / HTTP/1.1\r\n\r\n")
            await node.until(b"\r\n\r\n")
            await node.send(answer)
            assert await read_all(conn) == body
            assert conn.chunks_seen == chunks
            assert conn.bytes_received == len(answer)
            assert conn.reusable
            conn.start(reused=True)


async def test_a_body_without_length_ends_with_the_connection() -> None:
    async with upstream() as (conn, node):
        await node.send(b"HTTP/1.1 200 OK\r\n\r\nabc")
        await conn.read_head()
        assert await conn.read_some() == b"abc"
        node.sock.close()
        assert await conn.read_some() == b""
        assert not conn.reusable


async def test_a_head_asked_for_has_no_body_and_the_connection_stays_good() -> None:
    async with upstream() as (conn, node):
        conn.start(reused=False, no_body=True)
        await node.send(LENGTH)
        assert await read_all(conn) == b""
        assert conn.reusable
        conn.start(reused=True)
        await node.send(LENGTH + b"hello")
        assert await read_all(conn) == b"hello"


async def test_what_one_read_brought_comes_joined() -> None:
    async with upstream() as (conn, node):
        await node.send(CHUNKED + b"1\r\na\r\n" * 50)
        await conn.read_head()
        assert await conn.read_some() == b"a" * 50
        assert conn.chunks_seen == 50


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    ("answer", "before"),
    [
        (b"", b""),
        (b"HTTP/1.1 20", b""),
        (LENGTH + b"hell", b"hell"),
        (LENGTH, b""),
        (CHUNKED, b""),
        (CHUNKED + b"3\r\nab", b"ab"),
        (CHUNKED + b"3\r\nabc\r\n", b"abc"),
        (CHUNKED + b"3\r\nabc\r\n0\r\n", b"abc"),
    ],
)
async def test_a_cut_is_never_an_end(answer: bytes, before: bytes, how: str) -> None:
    async with upstream() as (conn, node):
        await node.send(answer)
        if answer:
            await wait_all_tasks_blocked()
        if how == "reset" and not before:
            node.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        node.sock.close()
        body = b""
        with pytest.raises(UpstreamCut) as caught:
            await conn.read_head()
            while piece := await conn.read_some():
                body += piece
        assert body == before
        assert not isinstance(caught.value, UpstreamGarbled)
        assert not conn.reusable


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        (b"SSH-2.0-x\r\n", b""),
        (b"\x15\x03\x01\x00\x02\x02\x46", b""),
        (b"HTTP/1.1 200 OK\r\nbad line\r\n\r\n", b""),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * HEAD_MAX_BYTES, b""),
        (CHUNKED + b"3\r\nabc\r\nzz\r\n", b"abc"),
        (CHUNKED + b"3\r\nabcdef", b"abc"),
    ],
)
async def test_what_is_not_http(answer: bytes, before: bytes) -> None:
    async with upstream() as (conn, node), trio.open_nursery() as nursery:
        nursery.start_soon(node.send, answer)
        body = b""
        with pytest.raises(UpstreamGarbled):
            await conn.read_head()
            while piece := await conn.read_some():
                body += piece
        assert body == before
        assert not conn.reusable


@pytest.mark.parametrize("answer", [LENGTH + b"hello!", CHUNKED + b"0\r\n\r\nHTTP/1.1 200 OK\r\n", CHUNKED + b"0\r\n\r\n\0"])
async def test_bytes_after_an_answer_end_the_connection_but_not_the_answer(answer: bytes) -> None:
    async with upstream() as (conn, node):
        await node.send(answer)
        await read_all(conn)
        assert not conn.reusable


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=6), st.integers(1, 30), st.booleans())
async def test_any_pieces_give_the_same_body(chunks: list[bytes], step: int, whole: bool) -> None:
    data = CHUNKED + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    near, far = tcp_pair()
    with far:
        async with running_watch() as watch:
            conn = UpstreamConnection(near, NODE, watch)
            for at in range(0, len(data) - (0 if whole else 1), step):
                conn._feed(data[at : at + step] if whole else data[: len(data) - 1][at : at + step])
            assert b"".join(conn._pieces) == b"".join(chunks)
            assert conn._complete is whole
            conn.close()


# ---------------------------------------------------------------- sending


async def test_a_large_body_is_sent_as_the_node_takes_it() -> None:
    data = bytes(range(256)) * 8192 * 4
    async with upstream() as (conn, node), trio.open_nursery() as nursery:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        nursery.start_soon(conn.send, data)
        await wait_all_tasks_blocked()
        got = b""
        while len(got) < len(data):
            got += await node.receive()
        assert got == data
        await wait_all_tasks_blocked()
        assert conn.bytes_sent == len(data)


@BOTH
@pytest.mark.parametrize("close", [False, True])
async def test_an_early_answer_is_read(close: bool, use_epoll: bool) -> None:
    answer = b"HTTP/1.1 413 Request Entity Too Large\r\nContent-Length: 5\r\n\r\nlarge"
    async with upstream(use_epoll=use_epoll) as (conn, node), trio.open_nursery() as nursery:
        conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

        async def refuse() -> None:
            await node.receive(1000)
            await node.send(answer)
            if close:
                node.sock.close()

        nursery.start_soon(refuse)
        await conn.send(b"x" * (32 << 20))
        await conn.send(b"x")
        assert conn.answer_waiting()
        assert await read_all(conn) == b"large"
        assert not conn.reusable


async def test_a_node_that_goes_while_it_is_sent_to() -> None:
    async with upstream() as (conn, node), trio.open_nursery() as nursery:

        async def vanish() -> None:
            await node.receive(1000)
            node.sock.close()

        nursery.start_soon(vanish)
        with pytest.raises(UpstreamCut):
            await conn.send(b"x" * (32 << 20))
        assert not conn.answer_waiting()


async def test_sending_on_a_broken_connection() -> None:
    async with upstream() as (conn, node):
        node.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        node.sock.close()
        await wait_all_tasks_blocked()
        with pytest.raises(UpstreamCut):
            await conn.send(b"x")
        assert conn.bytes_sent == 0


async def test_a_node_that_takes_nothing_is_given_up() -> None:
    async with upstream() as (conn, _), trio.open_nursery() as nursery:
        cut = False

        async def send() -> None:
            nonlocal cut
            try:
                await conn.send(b"x" * (32 << 20))
            except UpstreamCut:
                cut = True

        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        conn.watch.sweep(conn.watch.now + 59)
        await wait_all_tasks_blocked()
        assert not cut
        for _ in range(5):  # the kernel may still have taken a little
            conn.watch.sweep(conn.watch.now + 61)
            await wait_all_tasks_blocked()
        assert cut


@BOTH
async def test_closing_wakes_who_reads(use_epoll: bool) -> None:
    async with upstream(use_epoll=use_epoll) as (conn, _), trio.open_nursery() as nursery:
        outcome: list[str] = []

        async def read() -> None:
            try:
                await conn.read_head()
            except UpstreamCut as cut:
                outcome.append(str(cut))

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        conn.close()
        await wait_all_tasks_blocked()
        assert outcome == ["the connection was closed"]


async def test_a_fast_stream_lets_others_run() -> None:
    async with upstream() as (conn, node), trio.open_nursery() as nursery:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        nursery.start_soon(node.send, LENGTH.replace(b"5", b"%d" % (16 << 20)) + b"x" * (16 << 20))
        await wait_all_tasks_blocked()
        nursery.start_soon(other)
        await conn.read_head()
        reads = 0
        while await conn.read_some():
            reads += 1
        nursery.cancel_scope.cancel()
        assert turns >= reads // 16


async def test_silence_is_no_failure() -> None:
    async with upstream() as (conn, node), trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def read() -> None:
            got.append(await read_all(conn))

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        conn.watch.sweep(conn.watch.now + 86_400)
        await wait_all_tasks_blocked()
        await node.send(LENGTH + b"hello")
        await wait_all_tasks_blocked()
        assert got == [b"hello"]
        assert isinstance(node, Peer)
