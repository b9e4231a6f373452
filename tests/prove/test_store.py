"""History under bad luck: the disk full, its directory read-only, PostgreSQL gone for half a minute."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from sqlalchemy import select, text

from servers.store.engine import database_url, open_engine
from servers.store.tables import requests
from tests.bench.programs import free_port
from tests.fleet.fleet import ROOT, ScriptedNode, chat, last_line, serving
from tests.fleet.programs import needed
from tests.fleet.rawhttp import Caller, ask, wait_until
from tests.servers.store.databases import Databases

pytestmark = pytest.mark.prove

AWAY_S = 30.0
FAILS, AGAIN = "history cannot be written", "history is written again"
MIRROR_FAILS = "the mirror of history cannot be written"


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    found = Databases(tmp_path_factory.mktemp("databases"))
    yield found
    found.close()


@pytest.fixture
def place() -> Iterator[Path]:
    """A data directory."""
    path = Path(tempfile.mkdtemp(prefix="store-", dir="/tmp"))
    yield path
    path.chmod(0o700)
    shutil.rmtree(path)


class Coordinator:
    """A coordinator as a process, without privileges where modes of files matter, and what it logged.

    Where root runs the tests (its Python may lie where no other user comes), the process is root's without any capability: the mode of a
    file or directory binds it as it binds everybody.
    """

    def __init__(self, place: Path, database: str, **environ: str) -> None:
        self.port = free_port()
        self.place = place
        self.database = database
        self.log: list[str] = []
        self._environ = {
            "PATH": os.environ["PATH"], "HOME": str(place), "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": str(self.port),
            "ROUTER_DATA_DIR": str(place), "DATABASE_URL": database, "ROUTER_LOG_FORMAT": "json", "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1", "ROUTER_AUTH": "off", **environ,
        }  # fmt: skip
        self.process: subprocess.Popen[str]

    def start(self) -> None:
        command = [sys.executable, "-m", "servers.cli", "serve"]
        if os.getuid() == 0 and self.database.startswith("sqlite"):  # PostgreSQL's private socket is another user's
            command = [needed("setpriv", "util-linux"), "--bounding-set=-all", "--inh-caps=-all", *command]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._environ, cwd=ROOT
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.log.extend(self.process.stdout)  # until it has ended

    def said(self, what: str) -> int:
        return sum(what in line for line in self.log)

    def end(self, how: signal.Signals) -> None:
        if self.process.poll() is None:
            self.process.send_signal(how)
        self.process.wait(60)

    def may_grow_files(self, limit_bytes: int) -> None:
        """The quota of this process: writing a file beyond it fails."""
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit_bytes, hard))

    async def chat(self) -> str | None:
        """The id of a request that was answered well and whole; None: it was not."""
        try:
            answer = await ask(self.port, "POST", "/api/chat", chat(stream=False))
        except (OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        good = answer.status == 200 and answer.whole and b'"done": true' in answer.body
        return answer.headers["x-request-id"] if good else None

    async def chats(self, count: int) -> list[str]:
        """So many of them, all good, one after the other."""
        ids = []
        for _ in range(count):
            request_id = await self.chat()
            assert request_id is not None, self.log[-5:]
            ids.append(request_id)
        return ids

    async def metric(self, name: str) -> float:
        scraped = (await ask(self.port, "GET", "/metrics")).body.decode()
        return next(float(line.split()[1]) for line in scraped.splitlines() if line.startswith(f"ollama_router_history_{name} "))

    async def until_metric(self, name: str, low: float, high: float) -> None:
        for _ in range(600):
            if low <= await self.metric(name) <= high:
                return
            await trio.sleep(0.1)
        raise AssertionError(f"{name} is {await self.metric(name)}")

    def recorded(self) -> list[str]:
        """The ids of all records; the database is opened as at a start."""
        engine = open_engine(database_url(self.database, self.place))
        try:
            with engine.connect() as connection:
                if connection.dialect.name == "sqlite":
                    assert connection.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"
                return [row[0] for row in connection.execute(select(requests.c.request_id))]
        finally:
            engine.dispose()


async def answer(caller: Caller) -> None:
    await caller.answer(last_line(content="one").rstrip())


@asynccontextmanager
async def running(place: Path, database: str, node_port: int, **environ: str) -> AsyncIterator[Coordinator]:
    """A coordinator that answers. It is stopped in order, unless it has ended already."""
    coordinator = Coordinator(place, database, OLLAMA_BACKENDS=f"n=http://127.0.0.1:{node_port};slots=64", **environ)
    coordinator.start()
    try:
        with trio.fail_after(60):
            while await coordinator.chat() is None:
                assert coordinator.process.poll() is None, coordinator.log
                await trio.sleep(0.05)
        yield coordinator
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(coordinator.end, signal.SIGTERM)


@contextmanager
def read_only(directory: Path) -> Iterator[None]:
    directory.chmod(0o500)
    try:
        yield
    finally:
        directory.chmod(0o700)


async def test_on_a_full_disk_requests_go_on_and_history_comes_back(place: Path) -> None:
    async with serving(ScriptedNode(answer)) as (port,), running(place, "sqlite://coordinator.db", port) as coordinator:
        ids = await coordinator.chats(20)
        coordinator.may_grow_files(4096)
        ids += await coordinator.chats(50)
        await coordinator.until_metric("failing", 1, 1)
        await coordinator.until_metric("write_failures_total", 3, 1e9)
        ids += await coordinator.chats(50)
        assert coordinator.said(FAILS) == 1
        coordinator.may_grow_files(resource.RLIM_INFINITY)
        await coordinator.until_metric("failing", 0, 0)
        assert (coordinator.said(FAILS), coordinator.said(AGAIN), await coordinator.metric("records_dropped_total")) == (1, 1, 0)
        ids += await coordinator.chats(5)
    found = coordinator.recorded()
    assert set(ids) <= set(found)
    assert len(set(found)) == len(found)


async def test_in_a_directory_that_became_read_only_requests_go_on(place: Path) -> None:
    settings = {"HISTORY_JSON": "true"}
    async with serving(ScriptedNode(answer)) as (port,), running(place, "sqlite://coordinator.db", port, **settings) as coordinator:
        mirror = place / "request_history.json"
        await wait_until(mirror.exists, within_s=30, what="a mirror")
        with read_only(place):
            ids = await coordinator.chats(30)
            await wait_until(lambda: coordinator.said(MIRROR_FAILS) > 0, within_s=30, what="an error")
            ids += await coordinator.chats(30)
            await trio.sleep(11)  # two more looks
            assert coordinator.said(MIRROR_FAILS) == 1
        await wait_until(lambda: ids[-1] in mirror.read_text(), within_s=30, what="the mirror with the last record")
    assert set(ids) <= set(coordinator.recorded())


async def test_a_start_in_a_read_only_directory_is_refused_with_a_sentence(place: Path) -> None:
    coordinator = Coordinator(place, "sqlite://coordinator.db")
    with read_only(place):
        coordinator.start()
        status = await trio.to_thread.run_sync(coordinator.process.wait, 60)
        await wait_until(lambda: bool(coordinator.log), within_s=10, what="a sentence")
    assert (status, [line.rstrip() for line in coordinator.log]) == (
        2, [f"ollama-router: ROUTER_DATA_DIR: the directory {place} cannot be written to"],
    )  # fmt: skip


async def test_requests_go_on_while_postgresql_is_away(databases: Databases, place: Path) -> None:
    database = databases.setting("postgresql")
    async with serving(ScriptedNode(answer)) as (port,), running(place, database, port) as coordinator:
        ids = await coordinator.chats(20)
        await trio.to_thread.run_sync(databases.postgres.stop)
        try:
            began = trio.current_time()
            while trio.current_time() < began + AWAY_S:
                ids += await coordinator.chats(5)
                await trio.sleep(0.5)
            await coordinator.until_metric("failing", 1, 1)
        finally:
            await trio.to_thread.run_sync(databases.postgres.start)
        await coordinator.until_metric("failing", 0, 0)
        assert (coordinator.said(FAILS), coordinator.said(AGAIN), await coordinator.metric("records_dropped_total")) == (1, 1, 0)
    found = coordinator.recorded()
    assert set(ids) <= set(found)
    assert len(set(found)) == len(found)
