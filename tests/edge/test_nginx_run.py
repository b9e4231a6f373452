"""Running nginx: when it gets new files (on virtual time), that it is a real one, and what the commands say."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from core.errors import ConfigError
from edge import nginx as files
from edge.nginx import Facts, Node, Options
from edge.nginx_run import FACTS, FOLLOW_EVERY_S, RELOAD_EVERY_S, Away, Changes, Runner, ask, saved
from tests.edge.nginx_stage import UnixServer, connects, free_port, installed
from tests.edge.test_nginx import facts, node
from tests.fleet.rawhttp import Caller, RawServer, talk, wait_until
from tests.fleet.rawhttp import ask as ask_http

ROOT = Path(__file__).parents[2]
HANGS_S = 120.0
"""Nothing here promises how long a program takes to start: what takes longer than this never will."""
A, B, C = node(), node("10.0.0.2"), node("10.0.0.3")


# ---------------------------------------------------------------- when


def test_a_node_that_came_is_worth_a_reload_but_not_before_its_time() -> None:
    changes = Changes(facts(A), now=100.0)
    assert not changes.due(facts(A, B), now=100.0 + RELOAD_EVERY_S - 0.1)
    assert changes.due(facts(A, B), now=100.0 + RELOAD_EVERY_S)
    changes.took(facts(A, B), now=110.0)
    assert not changes.due(facts(A, B, C), now=114.9)
    assert changes.due(facts(A, B, C), now=115.0)


def test_a_node_that_went_is_not_and_may_come_back_for_nothing() -> None:
    changes = Changes(facts(A, B), now=0.0)
    assert not changes.due(facts(A), now=50.0)
    assert not changes.due(facts(A, B), now=60.0)
    assert not changes.due(facts(), now=70.0)


@pytest.mark.parametrize("new", [facts(A, secret="t" * 32), facts(A, coordinator="127.0.0.1:8081"), facts(A, tally="127.0.0.1:9001")])
def test_a_coordinator_that_started_again_is(new: Facts) -> None:
    changes = Changes(facts(A), now=0.0)
    assert changes.due(new, now=10.0)


def test_what_nginx_refused_is_not_tried_again_until_something_changes() -> None:
    changes = Changes(facts(A), now=0.0)
    changes.refused(facts(A, B), now=10.0)
    assert not changes.due(facts(A, B), now=100.0)
    assert changes.due(facts(A, B, C), now=100.0)


# ---------------------------------------------------------------- following, on virtual time


class FakeRunner(Runner):
    """Follows for real; what would be given to nginx is kept."""

    def __init__(self, place: Path, told: Callable[[Path], Awaitable[Facts]], *, refuse: Node | None = None) -> None:
        self.lines: list[str] = []
        options = Options(selection=place / "s", listen=("127.0.0.1:8081",), directory=place)
        super().__init__(options, installed(), say=self.lines.append, ask=told)
        self.given: list[tuple[float, int]] = []
        self._refuse = refuse

    async def _give(self, facts: Facts) -> str:
        self.given.append((trio.current_time(), len(facts.nodes)))
        return "it does not like it" if self._refuse in facts.nodes else ""


@asynccontextmanager
async def following(runner: FakeRunner, loaded: Facts) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner._follow, Changes(loaded, now=trio.current_time()))
        yield
        nursery.cancel_scope.cancel()


async def test_a_fleet_that_grows_every_second_costs_a_reload_every_few(autojump_clock: MockClock, tmp_path: Path) -> None:
    began = trio.current_time()

    async def told(_: Path) -> Facts:
        return facts(*(node(f"10.0.1.{number + 1}") for number in range(int(trio.current_time() - began))))

    runner = FakeRunner(tmp_path, told)
    async with following(runner, facts()):
        await trio.sleep(60)
    times = [at for at, _ in runner.given]
    assert 8 <= len(times) <= 60 / RELOAD_EVERY_S
    assert all(later - earlier >= RELOAD_EVERY_S for earlier, later in pairwise(times))
    assert times[0] - began <= RELOAD_EVERY_S + FOLLOW_EVERY_S
    assert runner.given[-1][1] >= 50


async def test_a_fleet_that_stays_costs_nothing(autojump_clock: MockClock, tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        return facts(A, B) if int(trio.current_time()) % 20 < 10 else facts(A)

    runner = FakeRunner(tmp_path, told)
    async with following(runner, facts(A, B)):
        await trio.sleep(600)
    assert runner.given == []


async def test_a_coordinator_that_is_away_is_waited_for_and_said_once_a_minute(autojump_clock: MockClock, tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        if trio.current_time() < 300:
            raise Away("there is no such socket")
        return facts(A, secret="t" * 32)

    runner = FakeRunner(tmp_path, told)
    async with following(runner, facts(A)):
        await trio.sleep(310)
    assert len(runner.given) == 1
    assert 4 <= len([text for text in runner.lines if "there is no such socket" in text]) <= 6


async def test_what_nginx_refuses_is_said_and_nginx_goes_on(autojump_clock: MockClock, tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        return facts(A, B) if trio.current_time() < 100 else facts(A, C)

    runner = FakeRunner(tmp_path, told, refuse=B)
    async with following(runner, facts(A)):
        await trio.sleep(200)
    assert len(runner.given) == 2
    assert [text for text in runner.lines if "it does not like it" in text]


async def test_the_first_facts_are_waited_for(autojump_clock: MockClock, tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        if trio.current_time() < 30:
            raise Away("there is no such socket")
        return facts(A)

    runner = FakeRunner(tmp_path, told)
    assert await runner._first_facts() == facts(A)
    assert runner.lines == [f"waiting for the coordinator at {tmp_path / 's'}: there is no such socket"]


async def test_those_of_the_last_time_do_while_the_coordinator_is_away(tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        raise Away("there is no such socket")

    (tmp_path / FACTS).write_bytes(msgspec.json.encode(facts(A)))
    assert await FakeRunner(tmp_path, told)._first_facts() == facts(A)
    (tmp_path / FACTS).write_bytes(b"{")
    assert saved(tmp_path) is None


async def test_a_stop_before_there_was_a_coordinator_is_one(tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        raise Away("there is no such socket")

    runner = FakeRunner(tmp_path, told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(runner.run)
        await wait_until(lambda: runner.lines, what="the first line")
        runner.stop()
    assert runner.given == []


# ---------------------------------------------------------------- what the coordinator tells


@asynccontextmanager
async def coordinator(answer: Callable[[Caller], Awaitable[None]]) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        server = UnixServer(Path(place) / "selection.sock", answer)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            yield server.path
            nursery.cancel_scope.cancel()


async def test_facts_are_asked_for_over_the_socket() -> None:
    async def answer(caller: Caller) -> None:
        assert (caller.method, caller.target) == ("GET", "/nodes")
        await caller.answer(msgspec.json.encode({**msgspec.to_builtins(facts(A, B)), "more": 1}))

    async with coordinator(answer) as path:
        assert await ask(path) == facts(A, B)


@pytest.mark.parametrize(("status", "body", "raises"), [(503, b"{}", Away), (200, b"{}", ConfigError), (200, b"[", ConfigError)])
async def test_other_answers_are_none(status: int, body: bytes, raises: type[Exception]) -> None:
    async with coordinator(lambda caller: caller.answer(body, status=status)) as path:
        with pytest.raises(raises):
            await ask(path)


async def test_a_socket_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(Away, match="there is no such socket"):
        await ask(tmp_path / "selection.sock")


# ---------------------------------------------------------------- a real nginx


class Place:
    """A coordinator that tells of a node, the node, and the `Runner` in front of them."""

    def __init__(self, directory: Path, node_port: int, coordinator_port: int, *, stop_within_s: int = 30) -> None:
        self.port = free_port()
        self.lines: list[str] = []
        self.facts = Facts(secret="s" * 32, coordinator=f"127.0.0.1:{coordinator_port}")
        self.node = Node(group="n_0123456789ab", host="127.0.0.1", port=node_port)
        options = Options(
            selection=directory / "s", listen=(f"127.0.0.1:{self.port}",), directory=directory, workers=1, stop_within_s=stop_within_s
        )
        self.runner = Runner(options, installed(), say=self.lines.append, ask=self._tell)

    async def _tell(self, _: Path) -> Facts:
        return self.facts


@asynccontextmanager
async def a_place(script: Callable[[Caller], Awaitable[None]]) -> AsyncIterator[tuple[Place, trio.Event]]:
    """`script` answers for the coordinator. The event: nginx has ended."""
    ended = trio.Event()
    server = RawServer(script)
    with tempfile.TemporaryDirectory() as directory:
        async with trio.open_nursery() as nursery:
            port = await nursery.start(server.run)
            place = Place(Path(directory), port, port)

            async def run() -> None:
                await place.runner.run()
                ended.set()

            nursery.start_soon(run)
            await up(place)
            yield place, ended
            if not ended.is_set():
                place.runner.stop()
                place.runner.stop()
            await ended.wait()
            nursery.cancel_scope.cancel()


@pytest.fixture
def fast_clock() -> MockClock:
    """Time that runs twenty times as fast; nginx keeps its own pace."""
    return MockClock(rate=20)


async def held(caller: Caller) -> None:
    await caller.begin_chunks()
    await caller.chunk(b"one\n")
    while True:
        await trio.sleep(0.05)
        await caller.chunk(b"more\n")


@pytest.mark.slow
async def test_a_reload_cuts_no_stream(fast_clock: MockClock) -> None:
    go_on = trio.Event()

    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(b"one\n")
        await go_on.wait()
        await caller.chunk(b"two\n")
        await caller.end_chunks()

    async with a_place(script) as (place, _), talk(place.port, "GET", "/", b"") as heard:
        await heard.wait_for(b"one\n")
        place.facts = msgspec.structs.replace(place.facts, nodes=(place.node,))
        await wait_until(lambda: place.runner.reloads == 1, within_s=60, what="a reload")
        text = (place.runner._options.directory / "upstreams.conf").read_text()
        assert f"upstream {place.node.group} " in text
        await ask_until_new_worker(place)
        go_on.set()
        answer = await heard.rest()
        assert (answer.whole, answer.body) == (True, b"one\ntwo\n")


async def ask_until_new_worker(place: Place) -> None:
    """Until the master has more workers than one: the old one, that ends its stream, and the new one."""
    await wait_until(lambda: len(workers(place)) == 2, within_s=60, what="a new worker")


async def up(place: Place) -> None:
    """Until nginx serves; before it runs, its test of the configuration opens the port for a moment."""
    await wait_until(lambda: place.runner.pid is not None and pid_file(place), within_s=200, what="nginx")
    with trio.fail_after(200):
        while not await connects(place.port):
            pass


def pid_file(place: Place) -> str:
    path = place.runner._options.directory / "nginx.pid"
    return path.read_text() if path.exists() else ""


def workers(place: Place) -> list[int]:
    """nginx's worker processes."""
    master = place.runner.pid
    return [int(child) for child in Path(f"/proc/{master}/task/{master}/children").read_text().split()]


@pytest.mark.slow
async def test_a_stop_lets_streams_end_and_takes_no_new_connection() -> None:
    go_on = trio.Event()

    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(b"one\n")
        await go_on.wait()
        await caller.end_chunks()

    async with a_place(script) as (place, ended), talk(place.port, "GET", "/", b"") as heard:
        await heard.wait_for(b"one\n")
        place.runner.stop()
        with trio.fail_after(5):
            while await connects(place.port):
                pass
        assert not ended.is_set()
        go_on.set()
        assert (await heard.rest()).whole
        with trio.fail_after(5):
            await ended.wait()


@pytest.mark.slow
async def test_a_second_stop_cuts() -> None:
    async with a_place(held) as (place, ended), talk(place.port, "GET", "/", b"") as heard:
        await heard.wait_for(b"one\n")
        place.runner.stop()
        place.runner.stop()
        with trio.fail_after(5):
            await ended.wait()
        assert not (await heard.rest()).whole


@pytest.mark.slow
async def test_a_configuration_that_nginx_refuses_is_taken_back(tmp_path: Path) -> None:
    async with a_place(held) as (place, _):
        config = place.runner._options.directory / files.CONFIG
        before = config.read_text()
        assert not await place.runner._load(msgspec.structs.replace(place.facts, coordinator="127.0.0.1:70000"))
        assert config.read_text() == before
        assert [text for text in place.lines if "invalid port" in text], place.lines
        assert place.runner.reloads == 0
        await place.runner.reload()
        assert place.runner.reloads == 1


@pytest.mark.slow
async def test_a_second_nginx_with_the_same_files_is_refused() -> None:
    async with a_place(held) as (place, _):
        with pytest.raises(ConfigError, match=r"nginx already runs with .*kill -QUIT"):
            await place.runner.run()


@pytest.mark.slow
async def test_a_second_nginx_on_the_same_port_is_refused(tmp_path: Path) -> None:
    async with a_place(held) as (place, _):
        (address,) = place.runner._options.listen
        for listen in (address, f"localhost:{place.port}"):
            options = dataclasses.replace(place.runner._options, listen=(listen,), directory=tmp_path)
            with pytest.raises(ConfigError, match=f"somebody listens on {listen} already"):
                await Runner(options, installed(), say=place.lines.append).run()


@pytest.mark.slow
async def test_a_reload_that_is_asked_for_while_nginx_starts_is_not_lost(tmp_path: Path) -> None:
    async def script(caller: Caller) -> None:
        await caller.answer(b"")

    server = RawServer(script)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.run)
        place = Place(tmp_path, port, port)
        async with trio.open_nursery() as running:
            running.start_soon(place.runner.run)
            running.start_soon(place.runner.reload)  # sooner than nginx, which SIGHUP would kill before it has its handlers
            await wait_until(lambda: place.runner.reloads == 1, within_s=HANGS_S, what="the reload")
            assert [line.partition(" ")[0] for line in place.lines] == ["nginx", "reloaded:"]
            place.runner.stop()
        nursery.cancel_scope.cancel()


async def test_a_stop_while_the_first_files_are_tried_is_one(tmp_path: Path) -> None:
    async def told(_: Path) -> Facts:
        return facts(A)

    class StoppedMeanwhile(FakeRunner):
        async def _give(self, facts: Facts) -> str:
            self.stop()
            return await super()._give(facts)

    runner = StoppedMeanwhile(tmp_path, told)
    await runner.run()
    assert (len(runner.given), runner.pid) == (1, None)


@pytest.mark.slow
async def test_nginx_that_ends_by_itself_is_a_failure() -> None:
    async def script(caller: Caller) -> None:
        await caller.answer(b"")

    with tempfile.TemporaryDirectory() as directory:
        place = Place(Path(directory), 1, 1)
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                with pytest.raises(ConfigError, match="nginx ended by itself"):
                    await place.runner.run()

            nursery.start_soon(run)
            await up(place)
            assert place.runner.pid is not None
            orphans = workers(place)
            os.kill(place.runner.pid, signal.SIGKILL)
            for child in orphans:
                os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------- the commands


def edge(*words: str, place: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "ROUTER_DATA_DIR": str(place)}
    return subprocess.run(
        [sys.executable, "-m", "edge", *words], cwd=ROOT, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        check=False, timeout=30,
    )  # fmt: skip


def complaint(done: subprocess.CompletedProcess[str], status: int) -> str:
    assert done.returncode == status, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge: ")
    return line


@pytest.mark.slow
def test_an_argument_that_cannot_be_used_is_exit_status_2(tmp_path: Path) -> None:
    for command in ("render", "run", "check"):
        assert "--listen takes ADDRESS:PORT" in complaint(edge(command, "--listen", "80", place=tmp_path), 2)


@pytest.mark.slow
def test_without_a_coordinator_nothing_can_be_rendered(tmp_path: Path) -> None:
    line = complaint(edge("render", place=tmp_path), 1)
    assert f"{tmp_path}/selection.sock" in line
    assert "--selection" in line


@pytest.mark.slow
def test_check_says_what_is_missing(tmp_path: Path) -> None:
    done = edge("check", place=tmp_path)
    assert done.returncode == 1
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert kinds == ["ok", "missing", "ok"]
    assert "start it, or name its socket with --selection" in done.stdout


@pytest.mark.slow
async def test_render_and_check_with_a_coordinator(tmp_path: Path) -> None:
    async with coordinator(lambda caller: caller.answer(msgspec.json.encode(facts(A)))) as path:
        words = ("--selection", str(path), "--listen", "127.0.0.1:8081", "--dir", str(tmp_path / "out"))
        done = await trio.to_thread.run_sync(lambda: edge("render", *words, place=tmp_path))
        assert (done.returncode, done.stderr) == (0, "")
        assert {entry.name for entry in (tmp_path / "out").iterdir()} >= {files.CONFIG, files.UNIT, "upstreams.conf", FACTS}
        assert f"--selection {path} --dir {tmp_path / 'out'} --listen 127.0.0.1:8081" in (tmp_path / "out" / files.UNIT).read_text()
        done = await trio.to_thread.run_sync(lambda: edge("check", *words, place=tmp_path))
        assert done.returncode == 0, done.stdout
        assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 3
        assert "1 that nginx may reach itself" in done.stdout


@asynccontextmanager
async def edge_runs(*words: str) -> AsyncIterator[trio.Process]:
    """`python -m edge run`; killed, with its nginx, when the block is left before it has ended."""
    command = [sys.executable, "-m", "edge", "run", *words]
    process = await trio.lowlevel.open_process(command, stdin=None, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            for number in (signal.SIGTERM, signal.SIGTERM):  # the second does not wait for streams
                if process.poll() is None:
                    process.send_signal(number)
            await process.wait()


async def until_said(process: trio.Process, words: bytes) -> None:
    """Until it says so. Machines may be as busy as they like: whoever hangs is told after `HANGS_S`."""
    assert process.stderr is not None
    said = b""
    with trio.fail_after(HANGS_S):
        while words not in said:
            some = await process.stderr.receive_some()
            assert some, said
            said += some


def policies_below(pid: int) -> set[int]:
    """How the system schedules a process and all that descends from it."""
    children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return {os.sched_getscheduler(pid)}.union(*map(policies_below, children))


@pytest.mark.slow
async def test_run_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    server = RawServer(lambda caller: caller.answer(b'{"version":"1"}'))
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.run)
        told = Facts(secret="s" * 32, coordinator=f"127.0.0.1:{port}")
        async with coordinator(lambda caller: caller.answer(msgspec.json.encode(told))) as path:
            listen = free_port()
            words = ("--selection", str(path), "--listen", f"127.0.0.1:{listen}", "--dir", str(tmp_path))
            async with edge_runs(*words) as process:
                await until_said(process, b" serves ")
                assert (await ask_http(listen, "GET", "/api/version")).json() == {"version": "1"}
                assert policies_below(int((tmp_path / "nginx.pid").read_text())) == {os.SCHED_BATCH}, "workers too"
                process.send_signal(signal.SIGHUP)
                await until_said(process, b"reloaded")
                process.send_signal(signal.SIGTERM)
                with trio.fail_after(HANGS_S):
                    assert await process.wait() == 0
            assert not await connects(listen)
        nursery.cancel_scope.cancel()
