"""The process that writes: fed, heard, gone and followed by another; a thread in its place; everything there at the end, once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from sqlalchemy import Engine, select, text
from structlog.testing import capture_logs

from core.errors import RemoteError
from servers.store import feed as module
from servers.store.feed import Feed
from servers.store.filters import Filters
from servers.store.messages import Config, Delete, Sync, framed
from servers.store.tables import requests
from servers.yielding import YIELDS
from tests.fleet.rawhttp import wait_until
from tests.servers.drafts import NOW, draft
from tests.servers.store.databases import Databases

LIMIT_S = 20.0


def config_of(engine: Engine) -> Config:
    return Config(
        url=engine.url.render_as_string(hide_password=False), coordinator_id="c", retention_days=36_500, max_bytes=10**9, bodies="full",
        body_max_bytes=1000,
    )  # fmt: skip


@asynccontextmanager
async def running(engine: Engine, *, ready: bool = True) -> AsyncIterator[Feed]:
    feed = Feed(engine, config_of(engine))
    feed.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        if ready:
            await wait_until(lambda: feed.pid is not None, within_s=LIMIT_S, what="the process")
        yield feed
        nursery.cancel_scope.cancel()
    feed.close(limit_s=LIMIT_S)


def ids(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [row[0] for row in connection.execute(select(requests.c.request_id).order_by(requests.c.number))]


def names(count: int) -> list[str]:
    return [f"id-{number}" for number in range(count)]


def put(feed: Feed, first: int, end: int) -> None:
    for number in range(first, end):
        feed.outbox.put(draft(number))


async def test_what_was_put_is_written_by_the_process_and_what_is_asked_answered(engine: Engine) -> None:
    async with running(engine) as feed:
        put(feed, 0, 600)
        await feed.ask(Sync)
        assert await trio.to_thread.run_sync(ids, engine) == names(600)
        assert (feed.outbox.written.records, feed.thread_writes) == (600, False)
        assert await feed.ask(lambda number: Delete(number, Filters(start=NOW))) == 500
        put(feed, 600, 700)
    assert ids(engine) == names(700)[500:]
    assert feed.outbox.written.records == 700
    assert feed.outbox.is_empty


async def test_it_yields_to_what_serves_in_all_its_threads(engine: Engine) -> None:
    async with running(engine) as feed:
        assert feed.pid is not None
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        for thread in os.listdir(f"/proc/{feed.pid}/task"):
            assert os.getpriority(os.PRIO_PROCESS, int(thread)) == min(19, ours + YIELDS)


async def test_before_the_process_is_there_a_thread_writes(engine: Engine) -> None:
    async with running(engine, ready=False) as feed:
        put(feed, 0, 10)
        await wait_until(lambda: feed.outbox.written.records == 10, within_s=LIMIT_S, what="ten records")
        await wait_until(lambda: feed.pid is not None, within_s=LIMIT_S, what="the process")
        put(feed, 10, 20)
    assert ids(engine) == names(20)


async def test_a_process_that_is_killed_is_followed_by_another_and_nothing_is_lost_or_there_twice(engine: Engine) -> None:
    with capture_logs() as logs:
        async with running(engine) as feed:
            for number in range(40):
                put(feed, 50 * number, 50 * number + 50)
                if number == 20:
                    assert feed.pid is not None
                    os.kill(feed.pid, signal.SIGKILL)
                await trio.sleep(0.01)
            await feed.ask(Sync)
            await wait_until(lambda: feed.pid is not None, within_s=LIMIT_S, what="another process")
            put(feed, 2000, 2001)
    assert ids(engine) == names(2001)
    assert feed.outbox.written.records == 2001
    assert [said["log_level"] for said in logs] == ["error", "info"]


async def test_when_it_is_killed_at_the_end_what_waits_is_written_all_the_same(engine: Engine) -> None:
    async with running(engine) as feed:
        assert feed.pid is not None
        os.kill(feed.pid, signal.SIGSTOP)
        put(feed, 0, 1000)
        await trio.sleep(2 * module.FLUSH_S)
        os.kill(feed.pid, signal.SIGKILL)
    assert ids(engine) == names(1000)
    assert feed.outbox.written.records_dropped == 0


async def test_signals_for_both_do_not_end_it(engine: Engine) -> None:
    async with running(engine) as feed:
        pid = feed.pid
        assert pid is not None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
        put(feed, 0, 10)
        await feed.ask(Sync)
        assert feed.pid == pid
    assert not _alive(pid)


def test_a_close_without_a_loop_writes_everything(engine: Engine) -> None:
    feed = Feed(engine, config_of(engine))
    feed.start()
    put(feed, 0, 300)
    feed.outbox.put_thing("key", "1", b"x")
    feed.close(limit_s=LIMIT_S)
    assert ids(engine) == names(300)


async def test_texts_that_no_encoding_takes_do_not_keep_the_others_from_the_disk(engine: Engine) -> None:
    async with running(engine) as feed:
        feed.outbox.put(draft(0, model="\ud800"))
        put(feed, 1, 3)
    assert ids(engine) == names(3)


async def test_while_nothing_can_be_written_it_says_so_once_and_refuses_what_is_asked(engine: Engine) -> None:
    def rename(before: str, after: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {before} RENAME TO {after}"))

    with capture_logs() as logs:
        async with running(engine) as feed:
            await trio.to_thread.run_sync(rename, "models", "elsewhere")
            put(feed, 0, 5)
            await wait_until(lambda: feed.outbox.written.failures >= 2, within_s=LIMIT_S, what="failures")
            assert feed.outbox.written.failing is not None
            with pytest.raises(RemoteError, match="does not answer"):
                await feed.ask(Sync)
            await trio.to_thread.run_sync(rename, "elsewhere", "models")
            await wait_until(lambda: feed.outbox.written.failing is None, within_s=LIMIT_S, what="a recovery")
            await feed.ask(Sync)
    assert ids(engine) == names(5)
    assert [said["log_level"] for said in logs] == ["error", "info"]


async def test_a_process_that_dies_while_nothing_can_be_written_does_not_leave_that_behind(engine: Engine) -> None:
    def rename(before: str, after: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(f"ALTER TABLE {before} RENAME TO {after}"))

    async with running(engine) as feed:
        await trio.to_thread.run_sync(rename, "models", "elsewhere")
        put(feed, 0, 5)
        await wait_until(lambda: feed.outbox.written.failures > 0, within_s=LIMIT_S, what="a failure")
        assert feed.pid is not None
        os.kill(feed.pid, signal.SIGKILL)
        await wait_until(lambda: feed.pid is None, within_s=LIMIT_S, what="its end")
        await trio.to_thread.run_sync(rename, "elsewhere", "models")
        await wait_until(lambda: feed.outbox.written.failing is None, within_s=LIMIT_S, what="a recovery")
    assert ids(engine) == names(5)


async def test_when_no_process_can_be_started_a_thread_writes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with capture_logs() as logs:
        async with running(engine, ready=False) as feed:
            put(feed, 0, 10)
            await feed.ask(Sync)
    assert ids(engine) == names(10)
    assert [said["why"] for said in logs] == ["No such file or directory"]


def test_a_process_whose_coordinator_is_killed_writes_what_it_was_sent_and_ends(databases: Databases, kind: str) -> None:
    with databases.engine(kind) as engine:
        code = (
            "import sys, os, signal\n"
            "from servers.store.feed import Child\n"
            "from servers.store.messages import config_of\n"
            "from servers.store.packed import Packed\n"
            "from tests.servers.drafts import draft\n"
            "child = Child(config_of(sys.stdin.buffer.read()))\n"
            "child.socket.setblocking(True)\n"
            "for number in range(100):\n"
            "    packed = Packed()\n"
            "    packed.add(draft(number), 0)\n"
            "    packed.close(number, [])\n"
            "    child.socket.sendall(packed.frame)\n"
            "print(child.process.pid, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], input=bytes(framed(config_of(engine))[4:]), capture_output=True, check=False)
        pid = int(done.stdout)
        assert _gone(pid), done.stderr
        assert ids(engine) == names(100)


def _gone(pid: int) -> bool:
    return any(not _alive(pid) for _ in _looks())


def _looks() -> Iterator[None]:
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.02)):
        yield
        pause.wait(0.02)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
