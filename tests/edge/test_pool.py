"""Which idle connection is used next, and when one is too old."""

import socket
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from core.events import Upstream
from edge.pool import DialFailed, Pool
from edge.wire import UpstreamConnection
from tests.edge.sockets import NODE, Peer, running_watch, tcp_pair

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def used(conn: UpstreamConnection, node: Peer) -> UpstreamConnection:
    """`conn` after one good exchange."""
    await node.send(ANSWER)
    await conn.read_head()
    while await conn.read_some():
        pass
    return conn


async def connections(pool: Pool, count: int) -> list[tuple[UpstreamConnection, Peer]]:
    made = []
    for _ in range(count):
        near, far = tcp_pair()
        node = Peer(far)
        made.append((await used(UpstreamConnection(near, NODE, pool._watch), node), node))
    return made


async def test_the_last_one_given_back_is_taken_first() -> None:
    async with running_watch() as watch:
        pool = Pool(watch)
        (first, _), (second, _) = await connections(pool, 2)
        assert pool.take(NODE) is None
        pool.give_back(first)
        pool.give_back(second)
        assert pool.idle_count(NODE) == 2
        assert pool.take(NODE) is second
        assert second.reused
        assert pool.take(NODE) is first
        assert pool.take(NODE) is None
        first.close()
        second.close()


async def test_one_in_mid_answer_is_closed() -> None:
    async with running_watch() as watch:
        pool = Pool(watch)
        near, far = tcp_pair()
        conn = UpstreamConnection(near, NODE, watch)
        await Peer(far).send(ANSWER[:-1])
        await conn.read_head()
        pool.give_back(conn)
        assert pool.take(NODE) is None
        assert await Peer(far).rest() == b""


async def test_the_number_and_the_age_of_idle_ones_are_limited() -> None:
    async with running_watch() as watch:
        pool = Pool(watch, idle_max=2, idle_s=60)
        for conn, _ in await connections(pool, 3):
            pool.give_back(conn)
        assert pool.idle_count(NODE) == 2
        watch.sweep(watch.now + 59)
        assert pool.idle_count(NODE) == 2
        watch.sweep(watch.now + 2)
        assert pool.idle_count(NODE) == 0
        assert len(watch) == 0


@pytest.mark.parametrize("use_epoll", [True, False])
@pytest.mark.parametrize("what", ["close", "bytes"])
async def test_what_the_node_closed_or_spoke_on_is_not_used(what: str, use_epoll: bool) -> None:
    async with running_watch(use_epoll=use_epoll) as watch:
        pool = Pool(watch)
        [(conn, node)] = await connections(pool, 1)
        pool.give_back(conn)
        if what == "close":
            node.sock.close()
        else:
            await node.send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await wait_all_tasks_blocked()
        if not use_epoll:
            watch.peek()
        assert pool.take(NODE) is None
        assert conn.closed


async def test_idle_ones_can_be_closed_by_upstream_or_all() -> None:
    async with running_watch() as watch:
        pool = Pool(watch)
        for conn, _ in await connections(pool, 2):
            pool.give_back(conn)
        pool.close_idle(Upstream(host="127.0.0.1", port=1))
        assert pool.idle_count(NODE) == 2
        pool.close_idle(NODE)
        assert pool.idle_count(NODE) == 0
        pool.close_idle()


async def test_dialling() -> None:
    async with running_watch() as watch:
        pool = Pool(watch)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            for host in ("127.0.0.1", "localhost"):
                conn = await pool.dial(Upstream(host=host, port=port))
                assert not conn.reused
                conn.close()
        with pytest.raises(DialFailed, match="refused"):
            await pool.dial(Upstream(host="127.0.0.1", port=port))


async def test_a_silent_connection_asks_whether_the_other_end_is_there() -> None:
    async with running_watch() as watch:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            conn = await Pool(watch).dial(Upstream(host="127.0.0.1", port=listening.getsockname()[1]))
            assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            conn.close()


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "web"
    async with running_watch() as watch:
        pool = Pool(watch)
        with pytest.raises(DialFailed, match="No such file"):
            await pool.dial(Upstream(host=f"unix:{path}", port=0))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen()
            conn = await pool.dial(Upstream(host=f"unix:{path}", port=0))
            far, _ = listening.accept()
            far.setblocking(False)
            pool.give_back(await used(conn, Peer(far)))
            assert pool.take(conn.upstream) is conn
            pool.give_back(await used(conn, Peer(far)))
            far.close()
            await wait_all_tasks_blocked()
            assert pool.take(conn.upstream) is None


async def test_a_name_that_is_none() -> None:
    async with running_watch() as watch:
        with pytest.raises(DialFailed):
            await Pool(watch).dial(Upstream(host="no such host", port=1))


async def test_dialling_is_limited_in_time(autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object, **__: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio.socket, "getaddrinfo", never)
    async with running_watch() as watch:
        started = trio.current_time()
        with pytest.raises(DialFailed, match="within 3 s"):
            await Pool(watch).dial(Upstream(host="slow", port=1))
        assert trio.current_time() - started == pytest.approx(3)
