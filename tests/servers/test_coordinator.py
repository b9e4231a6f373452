"""The whole coordinator on real loopback sockets: start, serve, stop."""

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from agent.simulated.server import SimulatedOllama
from core.config import RouterConfig
from core.errors import ConfigError
from servers.coordinator import Coordinator
from servers.listen import CannotListen, internal_socket, open_ports, ports_of
from servers.settings import Backend, Settings, parse_upstream


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return replace(Settings(host="127.0.0.1", port=0, data_dir=tmp_path / "data", stop_timeout_s=10.0), **changes)


@asynccontextmanager
async def running(chosen: Settings) -> AsyncIterator[tuple[Coordinator, httpx.AsyncClient]]:
    """A coordinator that serves, and a client of it. Stopped in order at the end."""
    coordinator = Coordinator(chosen)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(coordinator.run)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{coordinator.ports[0]}", trust_env=False, timeout=20) as client:
                yield coordinator, client
            coordinator.stop()


async def until_ready(client: httpx.AsyncClient, *, models: int = 1) -> None:
    with trio.fail_after(10):
        while len((await client.get("/api/tags")).json()["models"]) < models:  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_an_empty_coordinator_answers_and_stops(tmp_path: Path) -> None:
    async with running(settings(tmp_path)) as (coordinator, client):
        assert (await client.get("/")).text == "Ollama is running"
        assert (await client.get("/readyz")).status_code == 200
        unknown = await client.post("/api/chat", json={"model": "nobody-has-it", "messages": []})
        assert unknown.status_code in (404, 503)
        assert unknown.json()["error"]
        port = coordinator.ports[0]
    with pytest.raises(OSError):
        await trio.open_tcp_stream("127.0.0.1", port)


async def test_a_backend_of_the_environment_serves_at_once(tmp_path: Path) -> None:
    node = SimulatedOllama(models=["llama3.2:1b"], speed=1000.0)
    async with node.serve():
        chosen = settings(tmp_path, backends=(Backend("box", parse_upstream(node.url), 2),))
        async with running(chosen) as (coordinator, client):
            await until_ready(client)
            answer = await client.post(
                "/api/chat", json={"model": "llama3.2:1b", "messages": [{"role": "user", "content": "x"}], "stream": False}
            )
            assert (answer.status_code, answer.json()["done"], answer.headers["X-Ollama-Node"]) == (200, True, "box")
            (agent,) = (await client.get("/api/agents")).json()
            assert (agent["name"], agent["slots"], agent["state"], agent["agentless"]) == ("box", 2, "ready", True)
            why = await client.get(f"/api/requests/{answer.headers['X-Request-Id']}/why")
            assert why.status_code == 200
            metrics = (await client.get("/metrics")).text
            assert 'ollama_router_request_duration_seconds_count{route="chat"} 1.0' in metrics
            assert [record.status for record in coordinator.records.newest] == [200]


async def test_a_record_is_told_to_who_listens(tmp_path: Path) -> None:
    async with running(settings(tmp_path)) as (coordinator, client):
        told: list[Any] = []
        coordinator.records.listeners.append(told.append)
        await client.post("/api/show", json={"model": "x"}, timeout=30)
        assert told == list(coordinator.records.newest)
        assert len(told) == 1


async def test_two_ports_serve_the_same(tmp_path: Path) -> None:
    async with running(settings(tmp_path, ollama_port=0)) as (coordinator, _):
        first, second = coordinator.ports
        assert first != second
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"http://127.0.0.1:{second}/")).text == "Ollama is running"


async def test_a_stop_lets_a_stream_end_and_takes_nothing_new(tmp_path: Path) -> None:
    node = SimulatedOllama(models=["llama3.2:1b"], load_s=0.01)
    async with node.serve():
        chosen = settings(tmp_path, backends=(Backend("box", parse_upstream(node.url)),))
        async with running(chosen) as (coordinator, client):
            await until_ready(client)
            body = {"model": "llama3.2:1b", "prompt": "x", "options": {"num_predict": 40}}
            async with client.stream("POST", "/api/generate", json=body) as answer:
                lines = answer.aiter_lines()
                assert not json.loads(await anext(lines))["done"]
                coordinator.stop()
                await trio.testing.wait_all_tasks_blocked(0.01)
                with pytest.raises(OSError):
                    await trio.open_tcp_stream("127.0.0.1", coordinator.ports[0])
                rest = [json.loads(line) async for line in lines]
            assert rest[-1]["done"] is True
            assert "error" not in rest[-1]


async def test_a_stop_cuts_what_does_not_end_within_the_limit(tmp_path: Path) -> None:
    node = SimulatedOllama(models=["llama3.2:1b"], load_s=0.01, speed=0.01)
    async with node.serve():
        chosen = settings(tmp_path, stop_timeout_s=0.2, backends=(Backend("box", parse_upstream(node.url)),))
        async with running(chosen) as (coordinator, client):
            await until_ready(client)
            with pytest.raises(httpx.TransportError):
                async with client.stream("POST", "/api/generate", json={"model": "llama3.2:1b", "prompt": "x"}) as answer:
                    coordinator.stop()
                    async for _ in answer.aiter_lines():
                        pass


async def test_a_port_in_use_is_one_line_that_names_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=f"port {port}.*ROUTER_PORT"):
            await Coordinator(settings(tmp_path, port=port)).run()
        with pytest.raises(CannotListen, match="ROUTER_OLLAMA_PORT"):
            await Coordinator(settings(tmp_path, ollama_port=port)).run()
    with pytest.raises(CannotListen, match="ROUTER_HOST"):
        await Coordinator(settings(tmp_path, host="no-such-host.invalid")).run()


def test_a_data_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    with pytest.raises(ConfigError, match="ROUTER_DATA_DIR"):
        Coordinator(settings(tmp_path))


async def test_nodes_beyond_the_limit_stop_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RouterConfig(agents_max=1)
    monkeypatch.setattr(Settings, "router_config", lambda _: config)
    backends = tuple(Backend(name, parse_upstream(f"http://127.0.0.1:{port}")) for port, name in enumerate(("a", "b"), 1))
    with pytest.raises(ConfigError, match="the node b cannot be added"):
        await Coordinator(settings(tmp_path, backends=backends)).run()


# ---------------------------------------------------------------- sockets


def test_ports_are_listed_once_and_all_closed_when_one_fails() -> None:
    sockets = open_ports("localhost", [("ROUTER_PORT", 0)])
    assert len(ports_of(sockets)) == 1
    taken = ports_of(sockets)[0]
    with pytest.raises(CannotListen):
        open_ports("127.0.0.1", [("A", 0), ("B", taken)])
    for sock in sockets:
        sock.close()


def test_the_internal_socket_is_for_this_user_only_and_leaves_nothing_behind() -> None:
    with internal_socket() as (_, upstream):
        path = Path(upstream.host.removeprefix("unix:"))
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.parent.exists()


def test_without_unix_sockets_the_web_app_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with internal_socket() as (sock, upstream):
        assert (upstream.host, upstream.port) == sock.getsockname()
        assert upstream.host == "127.0.0.1"
