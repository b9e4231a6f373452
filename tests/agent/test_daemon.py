"""The daemon between a real small coordinator and a real small Ollama, on loopback."""

import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.config import AgentConfig, GpuOverride, Identity
from agent.daemon import Daemon
from agent.log import configure
from core.messages import EndingReports, Heartbeat, Registration, decode
from tests.agent.fakes import DONE, LAST_CHUNK, LIMIT_S, STREAM_HEAD, Heard, Server, answer, chunk, free_port, line, serving, until

ID = "11111111-1111-4111-8111-111111111111"
REGISTERED = {"agent_id": ID, "status": "registered", "agent_token": "token-1", "gateway_credential": "credential-1"}


class Coordinator:
    """Answers as told: `registrations` and `beats` hold (status, body) for the next calls; without any, all is well."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.registrations: list[bytes] = []
        self.beats: list[bytes] = []
        self.endings: list[bytes] = []
        self.silent = False

    async def handle(self, stream: trio.SocketStream, heard: Heard) -> None:
        if self.silent:
            await trio.sleep_forever()
        if heard.target.endswith("/endings"):
            await stream.send_all(self.endings.pop(0) if self.endings else answer(200, {"taken": 1}))
        elif heard.target == "/api/agents":
            await stream.send_all(self.registrations.pop(0) if self.registrations else answer(201, REGISTERED))
        else:
            await stream.send_all(self.beats.pop(0) if self.beats else answer(200, {"status": "ok"}))

    @property
    def heard(self) -> list[Heard]:
        assert self.server is not None
        return self.server.heard

    def registered(self) -> list[Heard]:
        return [heard for heard in self.heard if heard.target == "/api/agents"]

    def told(self) -> list[tuple[str, ...]]:
        """Which requests' ends each message was about."""
        reports = [decode(heard.body, EndingReports).reports for heard in self.heard if heard.target == f"/api/agents/{ID}/endings"]
        return [tuple(report.request_id for report in some) for some in reports]

    def heartbeats(self) -> list[Heartbeat]:
        return [decode(heard.body, Heartbeat) for heard in self.heard if heard.target == "/api/health"]


class Ollama:
    """What it lists; `slow_ps` holds `/api/ps` back; `broken` closes every connection."""

    def __init__(self) -> None:
        self.installed: list[Any] = [{"name": "m:latest", "digest": "d"}]
        self.loaded: list[Any] = []
        self.slow_ps = False
        self.tags_fail = False
        self.broken = False
        self.finish = trio.Event()

    async def handle(self, stream: trio.SocketStream, heard: Heard) -> None:
        if self.slow_ps and heard.target == "/api/ps":
            await trio.sleep_forever()
        if self.broken:
            await stream.aclose()
            return
        match heard.target:
            case "/api/version":
                await stream.send_all(answer(200, {"version": "0.33.0"}))
            case "/api/tags":
                await stream.send_all(answer(500, {"error": "x"}) if self.tags_fail else answer(200, {"models": self.installed}))
            case "/api/ps":
                await stream.send_all(answer(200, {"models": self.loaded}))
            case _:
                await stream.send_all(STREAM_HEAD + chunk(line("one")))
                await self.finish.wait()
                await stream.send_all(chunk(DONE) + LAST_CHUNK)


class World:
    def __init__(self, daemon: Daemon, port: int, coordinator: Coordinator, ollama: Ollama, nursery: trio.Nursery) -> None:
        self.daemon = daemon
        self.port = port
        self.coordinator = coordinator
        self.ollama = ollama
        self.nursery = nursery
        self.stopped = False

    async def heartbeat(self, wanted: Callable[[Heartbeat], object], limit_s: float = LIMIT_S) -> Heartbeat:
        await until(lambda: any(wanted(beat) for beat in self.coordinator.heartbeats()), limit_s)
        return next(beat for beat in self.coordinator.heartbeats() if wanted(beat))


@asynccontextmanager
async def living(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ollama: Ollama | None = None,
    coordinator: Coordinator | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    monkeypatch.setattr("agent.daemon.POLL_S", 0.05)
    monkeypatch.setattr("agent.daemon.FIRST_LOOK_S", 0.5)
    ollama, coordinator = ollama or Ollama(), coordinator or Coordinator()
    async with serving(ollama.handle) as ollama_server, serving(coordinator.handle) as server, trio.open_nursery() as nursery:
        coordinator.server = server
        settings.setdefault("router_url", server.url)
        settings.setdefault("ollama_url", ollama_server.url)
        config = AgentConfig(ollama_port=ollama_server.port, api_port=0, data_dir=tmp_path, **settings)
        daemon = Daemon(config, Identity(instance_id="i-1", boot=42), dice=lambda n: 0)
        world = World(daemon, daemon.listen(), coordinator, ollama, nursery)

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await daemon.run(task_status=task_status)
            world.stopped = True

        with trio.fail_after(LIMIT_S):
            await nursery.start(run)
        yield world
        nursery.cancel_scope.cancel()


async def test_it_registers_with_the_truth_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GpuOverride(model="RTX 4090", count=2, memory_bytes=24 << 30)
    async with living(tmp_path, monkeypatch, join_token="join-me", gpu=gpu, slots=3) as world:
        beat = await world.heartbeat(lambda beat: beat.installed_models)
        (heard,) = world.coordinator.registered()
        registration = decode(heard.body, Registration)
        assert (registration.ip_address, registration.agent_api_port, registration.instance_id, registration.boot) == (
            "127.0.0.1",
            world.port,
            "i-1",
            42,
        )
        assert (registration.ollama_version, registration.slots, registration.gpu_available) == ("0.33.0", 3, True)
        assert (registration.gpu_count, registration.gpu_model, registration.gpu_devices[0].memory) == (2, "RTX 4090", 24 << 30)
        assert registration.machine_name
        assert heard.header("X-Router-Join-Token") == "join-me"
        assert (beat.agent_id, beat.boot, beat.ollama_ok, beat.ollama_version, beat.installed_models) == (
            ID,
            42,
            True,
            "0.33.0",
            world.ollama.installed,
        )
        assert all(heard.header("Authorization") == "Bearer token-1" for heard in world.coordinator.heard if heard.target == "/api/health")
        assert all(heard.header("X-Router-Join-Token") is None for heard in world.coordinator.heard if heard.target == "/api/health")
        await world.heartbeat(lambda beat: beat.memory_usage > 0)


async def test_a_model_that_is_loaded_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch, heartbeat_interval_s=60) as world:
        await world.heartbeat(lambda beat: beat.loaded_models == [])
        world.ollama.loaded = [{"name": "m:latest", "digest": "d", "size_vram": 1}]
        await world.heartbeat(lambda beat: beat.loaded_models == world.ollama.loaded, 1.5)


async def test_a_slow_ps_is_no_sign_of_death_and_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama = Ollama()
    ollama.slow_ps = True
    async with living(tmp_path, monkeypatch, ollama=ollama, heartbeat_interval_s=1) as world:
        await until(lambda: len(world.coordinator.heartbeats()) >= 3)
        assert all(beat.ollama_ok and beat.loaded_models is None for beat in world.coordinator.heartbeats())


async def test_an_ollama_that_does_not_list_is_alive_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama = Ollama()
    ollama.tags_fail = True
    async with living(tmp_path, monkeypatch, ollama=ollama) as world:
        beat = await world.heartbeat(lambda beat: beat.ollama_ok)
        assert beat.installed_models is None
        ollama.tags_fail = False
        await world.heartbeat(lambda beat: beat.installed_models)


async def test_without_an_ollama_the_agent_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch, ollama_url=f"http://127.0.0.1:{free_port()}") as world:
        assert not (await world.heartbeat(lambda beat: True)).ollama_ok


async def test_an_ollama_that_breaks_is_reported_and_so_is_its_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch, heartbeat_interval_s=60) as world:
        await world.heartbeat(lambda beat: beat.ollama_ok)
        world.ollama.broken = True
        broken = await world.heartbeat(lambda beat: not beat.ollama_ok)
        world.ollama.broken = False
        await world.heartbeat(lambda beat: beat.ollama_ok and beat.sequence > broken.sequence)


# ---------------------------------------------------------------- the coordinator


async def test_a_forgetful_coordinator_is_told_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator()
    coordinator.beats = [answer(200, {"status": "ok"}), answer(404, {"error": "unknown agent"})]
    async with living(tmp_path, monkeypatch, coordinator=coordinator, heartbeat_interval_s=1) as world:
        await until(lambda: len(world.coordinator.registered()) == 2)
        again = world.coordinator.heard.index(world.coordinator.registered()[1])
        await until(lambda: len(world.coordinator.heard) > again + 1)
        assert decode(world.coordinator.heard[again + 1].body, Heartbeat).installed_models == world.ollama.installed


async def test_waiting_for_approval_and_then_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator()
    coordinator.registrations = [answer(202, {"agent_id": ID, "status": "pending", "code": "ABCD-1234"})]
    coordinator.beats = [
        answer(200, {"status": "pending"}),
        answer(200, {"status": "ok", "agent_token": "token-2", "gateway_credential": "credential-2"}),
    ]
    async with living(tmp_path, monkeypatch, coordinator=coordinator, heartbeat_interval_s=1) as world:
        await until(lambda: world.daemon.gateway.credential == b"credential-2")
        await until(lambda: len(world.coordinator.heartbeats()) == 3)
        assert [heard.header("Authorization") for heard in world.coordinator.heard] == [None, None, None, "Bearer token-2"]


@pytest.mark.parametrize(
    "first",
    [
        answer(503, {"error": "full"}, Retry_After="0"),
        answer(503, {"error": "full"}, Retry_After="tomorrow"),
        answer(403, b"<html>", Retry_After="1"),
        answer(200, b"<html>"),
        answer(200, {"agent_id": 5}),
        answer(200, b"x" * ((1 << 20) + 1)),
        answer(307, b"", Location="http://elsewhere"),
        b"nonsense\r\n\r\n",
    ],
    ids=range(8),
)
async def test_a_registration_that_fails_is_tried_again(first: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator()
    coordinator.registrations = [first]
    async with living(tmp_path, monkeypatch, coordinator=coordinator) as world:
        await world.heartbeat(lambda beat: True)
        assert len(world.coordinator.registered()) == 2


async def test_a_silent_coordinator_is_given_up_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.daemon.CALL_TIMEOUT_S", 0.1)
    coordinator = Coordinator()
    coordinator.silent = True
    async with living(tmp_path, monkeypatch, coordinator=coordinator) as world:
        await until(lambda: len(world.coordinator.registered()) == 1)
        coordinator.silent = False
        await world.heartbeat(lambda beat: True)


async def test_no_proxy_stands_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    async with living(tmp_path, monkeypatch) as world:
        await world.heartbeat(lambda beat: beat.ollama_ok)


async def test_what_the_operator_advertises_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch, advertise_address="localhost") as world:
        await until(lambda: world.coordinator.registered())
        assert world.coordinator.registered()[0].json["ip_address"] == "localhost"


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        ({}, "127.0.0.1"),
        ({"router_url": "http://[::1]:8080"}, "127.0.0.1"),
        ({"router_url": "http://10.0.0.1:8080"}, "0.0.0.0"),
        ({"advertise_address": "10.0.0.2"}, "0.0.0.0"),
        ({"advertise_address": "fd00::2"}, "::"),
    ],
)
def test_the_gateway_listens_only_where_it_must(settings: dict[str, str], host: str) -> None:
    daemon = Daemon(AgentConfig(**settings), Identity(instance_id="i", boot=1), dice=lambda n: 0)  # type: ignore[arg-type]
    assert daemon._gateway_host() == host


# ---------------------------------------------------------------- requests, and leaving


async def ask(world: World, request_id: str, *, via: str = "embedded") -> trio.SocketStream:
    stream = await trio.open_tcp_stream("127.0.0.1", world.port)
    body = b'{"model":"m","messages":[]}'
    head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nX-Ollama-Router-Credential: credential-1\r\nX-Request-Id: {request_id}\r\n"
    head += f"X-Ollama-Router-Edge: {via}\r\n"
    await stream.send_all(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return stream


async def read_until(stream: trio.SocketStream, end: bytes) -> bytes:
    got = b""
    with trio.fail_after(LIMIT_S):
        while end not in got and (data := await stream.receive_some()):
            got += data
    return got


async def test_it_tells_that_it_stops_and_lets_requests_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch, heartbeat_interval_s=60) as world:
        await until(lambda: world.daemon.gateway.credential)
        async with await ask(world, "r-1") as stream:
            await read_until(stream, line("one"))
            world.daemon.stop()
            beat = await world.heartbeat(lambda beat: beat.draining)
            assert (beat.in_flight, beat.active_requests) == (["r-1"], 1)
            assert not world.stopped
            world.ollama.finish.set()
            assert (await read_until(stream, LAST_CHUNK)).endswith(LAST_CHUNK)
            await until(lambda: world.stopped)
        last = world.coordinator.heartbeats()[-1]
        assert (last.draining, last.in_flight) == (True, [])


async def test_ends_are_told_until_they_are_heard_and_the_last_before_it_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator = Coordinator()
    coordinator.endings = [answer(503, {"error": "later"}), answer(404, {"error": "who?"})]
    async with living(tmp_path, monkeypatch, coordinator=coordinator, heartbeat_interval_s=1) as world:
        await until(lambda: world.daemon.gateway.credential)
        world.ollama.finish.set()
        async with await ask(world, "r-1", via="nginx") as stream:
            await read_until(stream, LAST_CHUNK)
        await until(lambda: len(coordinator.told()) == 3)
        assert coordinator.told() == [("r-1",)] * 3
        assert coordinator.heard[-1].header("Authorization") == "Bearer token-1"
        coordinator.endings = [answer(400, {"error": "unheard of"})]
        async with await ask(world, "r-2", via="nginx") as stream:
            await read_until(stream, LAST_CHUNK)
        await until(lambda: len(coordinator.told()) == 4)
        world.ollama.finish = trio.Event()
        async with await ask(world, "r-3", via="nginx") as stream:
            await read_until(stream, line("one"))
            assert (await world.heartbeat(lambda beat: beat.in_flight == ["r-3"])).active_requests == 1
            world.daemon.stop()
            await world.heartbeat(lambda beat: beat.draining)
            world.ollama.finish.set()
            await until(lambda: world.stopped)
        assert coordinator.told()[3:] == [("r-2",), ("r-3",)]


async def test_an_agent_that_leaves_does_not_wait_long_for_a_coordinator_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.daemon.LAST_WORDS_S", 0.2)
    coordinator = Coordinator()
    async with living(tmp_path, monkeypatch, coordinator=coordinator) as world:
        await until(lambda: world.daemon.gateway.credential)
        world.ollama.finish.set()
        coordinator.endings = [answer(500, {})] * 100
        async with await ask(world, "r-1", via="nginx") as stream:
            await read_until(stream, LAST_CHUNK)
        await until(coordinator.told)
        world.daemon.stop()
        await until(lambda: world.stopped)


async def test_the_patience_for_requests_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch, stop_timeout_s=0.2) as world:
        await until(lambda: world.daemon.gateway.credential)
        async with await ask(world, "r-1") as stream:
            await read_until(stream, line("one"))
            world.daemon.stop()
            await until(lambda: world.stopped)
            assert LAST_CHUNK not in await read_until(stream, LAST_CHUNK), "a cut is a cut"


async def test_the_second_order_to_stop_is_obeyed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with living(tmp_path, monkeypatch) as world:
        await until(lambda: world.daemon.gateway.credential)
        async with await ask(world, "r-1") as stream:
            await read_until(stream, line("one"))
            world.daemon.stop()
            world.daemon.stop()
            await until(lambda: world.stopped, 1.0)


async def test_stopping_before_anything_was_said(tmp_path: Path) -> None:
    config = AgentConfig(
        api_port=0, ollama_url=f"http://127.0.0.1:{free_port()}", router_url=f"http://127.0.0.1:{free_port()}", data_dir=tmp_path
    )
    daemon = Daemon(config, Identity(instance_id="i", boot=1), dice=lambda n: 0)
    daemon.listen()
    daemon.stop()
    with trio.fail_after(LIMIT_S):
        await daemon.run()


async def test_its_log_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are read by people, and by whoever asks `/logs`."""
    out = io.StringIO()
    tail = configure("debug", "console", out=out)
    async with living(tmp_path, monkeypatch, join_token="join-me", warnings=("an old name",)) as world:
        await world.heartbeat(lambda beat: beat.installed_models)
    said = "\n".join(tail.last(100))
    assert "registered with the coordinator" in said
    assert "an old name" in said
    assert not [secret for secret in ("join-me", "token-1", "credential-1") if secret in said]
