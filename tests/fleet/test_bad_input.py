"""What clients, agents and operators get wrong, each with the error that tells them; and what looks wrong but Ollama serves."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import ROOT, Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.rawhttp import Answer, Caller, ask, parse_answer, raw_request, request_bytes

BODY_MAX_BYTES = 100_000
ELSEWHERE = {"X-Forwarded-For": "192.168.7.7"}
NATIVE_JSON = "application/json; charset=utf-8"


@pytest.fixture
async def node() -> AsyncIterator[ScriptedNode]:
    """A node whose answers to bad bodies are its own."""

    async def script(caller: Caller) -> None:
        try:
            value = json.loads(caller.body)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            await answer_well(caller)
        else:
            await caller.answer(b'{"error":"said by the node"}', status=400)

    node = ScriptedNode(script)
    async with serving(node):
        yield node


@pytest.fixture
async def fleet(node: ScriptedNode) -> AsyncIterator[Fleet]:
    async with open_fleet([node.port], ROUTER_BODY_MAX_BYTES=str(BODY_MAX_BYTES)) as fleet:
        yield fleet


def error_of(answer: Answer, status: int) -> str:
    """The text of a native error, which is one sentence and shows nothing of the inside."""
    assert answer.status == status, answer.body
    value = answer.json()
    assert list(value) == ["error"]
    text = value["error"]
    assert isinstance(text, str)
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    assert ".py" not in text
    return text


# ---------------------------------------------------------------- bodies: the node's own error is the answer


@pytest.mark.parametrize(
    "body",
    [b"", b'{"model": "m", "messages": [', b"not json", b"null", b'{"messages": []}', b'{"model": 7}', b'{"model": null}', b"[1]"],
    ids=["empty", "truncated", "garbage", "null", "without model", "model a number", "model null", "array"],
)
async def test_a_body_whose_model_cannot_be_read_gets_the_nodes_own_error(fleet: Fleet, node: ScriptedNode, body: bytes) -> None:
    answer = await fleet.ask("POST", "/api/chat", body)
    assert (answer.status, answer.body) == (400, b'{"error":"said by the node"}')
    assert [caller.body for caller in node.seen] == [body]


@pytest.mark.parametrize("body", [b"", b'{"model": "m"', b'{"messages": []}'], ids=["empty", "broken", "without model"])
async def test_with_no_node_the_router_says_it_itself(body: bytes) -> None:
    async with open_fleet() as fleet:
        answer = await fleet.ask("POST", "/api/chat", body)
    error_of(answer, answer.status)
    assert 400 <= answer.status < 504


async def test_an_unknown_model_gets_ollamas_text(fleet: Fleet, node: ScriptedNode) -> None:
    assert error_of(await fleet.chat("nosuch"), 404) == "model 'nosuch' not found"
    answer = await fleet.ask("POST", "/v1/chat/completions", chat("nosuch"))
    assert answer.status == 404
    assert answer.json()["error"]["message"] == "model 'nosuch' not found"
    assert answer.json()["error"]["type"] == "not_found_error"
    assert node.seen == []


@pytest.mark.parametrize("model", ["../etc/passwd", "a b", ":latest", "x" * 400, "\u0000"])
async def test_an_invalid_model_name_gets_ollamas_text(model: str) -> None:
    ollama = SimulatedOllama()
    async with ollama.serve(), open_fleet([ollama.port]) as fleet:
        answer = await fleet.chat(model)
        assert error_of(answer, 400) == "invalid model name"
        assert (await ask(ollama.port, "POST", "/api/chat", chat(model))).body == answer.body


# ---------------------------------------------------------------- bodies: limits and framing


async def test_a_body_over_the_limit_is_413_before_it_is_read(fleet: Fleet, node: ScriptedNode) -> None:
    head = request_bytes("POST", "/api/chat", b"", {"Content-Length": str(BODY_MAX_BYTES + 1)})
    answer = parse_answer(await raw_request(fleet.port, head))
    assert "ROUTER_BODY_MAX_BYTES" in error_of(answer, 413)
    assert node.seen == []


async def test_a_chunked_body_over_the_limit_is_413(fleet: Fleet, node: ScriptedNode) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"%x\r\n%s\r\n" % (60_000, b" " * 60_000)
    answer = parse_answer(await raw_request(fleet.port, head + chunk * 2 + b"0\r\n\r\n"))
    assert "ROUTER_BODY_MAX_BYTES" in error_of(answer, 413)
    assert node.seen == []


async def test_both_content_length_and_transfer_encoding_are_refused(fleet: Fleet, node: ScriptedNode) -> None:
    body = b"0\r\n\r\nPOST /api/delete HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(body)
    data = await raw_request(fleet.port, head + body)
    error_of(parse_answer(data), 400)
    assert data.count(b"HTTP/1.1 ") == 1, "what followed was taken for a request"
    assert node.seen == []


async def test_oversize_headers_are_431(fleet: Fleet) -> None:
    data = request_bytes("GET", "/api/tags", headers={"X-Long": "a" * 2_000_000})
    error_of(parse_answer(await raw_request(fleet.port, data)), 431)


async def send_slowly(port: int, data: bytes) -> bytes:
    """A byte each second, until an answer comes."""
    received = b""
    with trio.fail_after(600):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream, trio.open_nursery() as nursery:

            async def drip() -> None:
                try:
                    for at in range(len(data)):
                        await stream.send_all(data[at : at + 1])
                        await trio.sleep(1)
                except trio.BrokenResourceError:
                    pass

            nursery.start_soon(drip)
            try:
                while some := await stream.receive_some():
                    received += some
            except trio.BrokenResourceError:
                pass
            nursery.cancel_scope.cancel()
    return received


@pytest.mark.parametrize("sent_at_once", [0, 1], ids=["head", "body"])
async def test_a_client_that_sends_a_byte_a_second_is_408(fast_clock: MockClock, sent_at_once: int) -> None:
    async with open_fleet() as fleet:
        body = json.dumps(chat(content="x" * 500)).encode()
        head = request_bytes("POST", "/api/chat", headers={"Content-Length": str(len(body))})
        if sent_at_once:
            answer = await slow_body(fleet.port, head, body)
        else:
            answer = parse_answer(await send_slowly(fleet.port, head))
        error_of(answer, 408)


async def slow_body(port: int, head: bytes, body: bytes) -> Answer:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    received = b""
    async with stream, trio.open_nursery() as nursery:
        await stream.send_all(head)

        async def drip() -> None:
            try:
                for at in range(len(body)):
                    await stream.send_all(body[at : at + 1])
                    await trio.sleep(1)
            except trio.BrokenResourceError:
                pass

        nursery.start_soon(drip)
        with trio.fail_after(600):
            while b"}" not in received and (some := await stream.receive_some()):
                received += some
        nursery.cancel_scope.cancel()
    return parse_answer(received)


# ---------------------------------------------------------------- paths


@pytest.mark.parametrize(
    "path",
    [
        "/api%2Fdelete",
        "/api/../api/delete",
        "/api/chat/../delete",
        "//api/delete",
        "/api/./delete",
        "/%61pi/delete",
        "/api/delete/",
        "/api//delete",
    ],
)
@pytest.mark.parametrize("method", ["DELETE", "POST"])
async def test_no_spelling_of_a_path_reaches_a_node(fleet: Fleet, node: ScriptedNode, method: str, path: str) -> None:
    """From somebody who may not delete: what the plain spelling refuses is refused in each."""
    answer = await fleet.ask(method, path, b'{"model":"m"}', headers=ELSEWHERE)
    assert answer.status in (301, 307, 308, 403, 404, 405)
    if answer.status < 400:
        assert answer.headers["location"] in ("/api/delete", "/api/delete/")
    assert node.seen == []


async def test_an_encoded_spelling_of_a_served_path_is_served_alike(fleet: Fleet, node: ScriptedNode) -> None:
    assert (await fleet.ask("POST", "/api%2Fchat", chat())).status == 200
    assert len(node.seen) == 1


# ---------------------------------------------------------------- agents


def registration(**more: Any) -> dict[str, Any]:
    made = {"machine_name": "box", "ip_address": "192.168.7.7", "ollama_version": "0.33.0", "ollama_port": 11434}
    return {**made, "gpu_available": True, "gpu_devices": [{"model": "RTX 4090", "count": 1}], **more}


@pytest.mark.parametrize(
    "claim",
    [
        {"gpu_available": False},
        {"gpu_devices": []},
        {"gpu_devices": [{"model": "  ", "count": 1}]},
        {"gpu_devices": [{"model": "RTX 4090", "count": 0}]},
    ],
    ids=["none", "no device", "blank model", "count 0"],
)
async def test_an_agent_with_a_wrong_gpu_claim_is_403(fleet: Fleet, claim: dict[str, Any]) -> None:
    answer = await fleet.ask("POST", "/api/agents", registration(**claim), headers=ELSEWHERE)
    text = error_of(answer, 403)
    assert text.startswith("GPU hardware is required for agent registration: ")
    assert "ROUTER_REQUIRE_GPU" in text


@pytest.mark.parametrize("text", ["NaN", "-1", "101", "1e999", "Infinity"])
async def test_metrics_that_cannot_be_are_422(fleet: Fleet, text: str) -> None:
    agent = fleet.agents()[0].id
    body = b'{"cpu_usage": %s, "memory_usage": 10, "active_requests": 0}' % text.encode()
    assert "cpu_usage" in error_of(await fleet.ask("POST", f"/api/agents/{agent}/metrics", body), 422)


UNKNOWN = "550e8400-e29b-41d4-a716-446655440000"


@pytest.mark.parametrize("agent_id", [UNKNOWN, "nonsense", "%00", "..%2f.."])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/agents/{}", None),
        ("DELETE", "/api/agents/{}", None),
        ("PUT", "/api/agents/{}/settings", {"notes": "x"}),
        ("POST", "/api/agents/{}/drain", None),
        ("POST", "/api/agents/{}/connect", None),
        ("POST", "/api/agents/{}/disconnect", None),
        ("POST", "/api/agents/{}/metrics", {"cpu_usage": 1, "memory_usage": 1}),
        ("GET", "/api/requests/{}/why", None),
    ],
)
async def test_unknown_ids_are_404(fleet: Fleet, method: str, path: str, body: dict[str, Any] | None, agent_id: str) -> None:
    answer = await fleet.ask(method, path.format(agent_id), body)
    assert answer.status in (404, 307, 405), answer.body


async def test_a_heartbeat_of_an_unknown_agent_is_404_so_that_it_registers_again(fleet: Fleet) -> None:
    error_of(await fleet.ask("POST", "/api/health", {"agent_id": UNKNOWN, "cpu_usage": 1, "memory_usage": 1}), 404)


# ---------------------------------------------------------------- operators


def start(**environ: str) -> subprocess.CompletedProcess[str]:
    """The coordinator as an operator starts it; it is expected to stop by itself."""
    command = [sys.executable, "-m", "servers"]
    settings = {**os.environ, "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": "0", **environ}
    return subprocess.run(
        command, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that it says before it gives up."""
    assert done.returncode != 0
    said = [text for text in (done.stdout + done.stderr).splitlines() if text.strip()]
    assert len(said) == 1, said
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AGENT_TIMEOUT", "banana"),
        ("LOAD_BALANCER_MODE", "fastest"),
        ("ROUTER_PORT", "99999"),
        ("OLLAMA_BACKENDS", "http://"),
        ("ROUTER_AUTH", "maybe"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line(tmp_path: Path, name: str, value: str) -> None:
    text = complaint(start(**{"ROUTER_DATA_DIR": str(tmp_path), name: value}))
    assert name in text
    assert value in text


@pytest.mark.slow
def test_a_port_in_use_stops_the_start_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        text = complaint(start(ROUTER_DATA_DIR=str(tmp_path), ROUTER_PORT=port))
    assert port in text
    assert "ROUTER_PORT" in text


# ---------------------------------------------------------------- what looks wrong but is served

ODD_BODIES = {
    "9,990 levels deep": b'{"model":"m","messages":[],"x":' + b"[" * 9_990 + b"]" * 9_990 + b"}",
    "broken UTF-8": b'{"model":"m","messages":[{"role":"user","content":"\xff\xfe\xc3"}]}',
    "colliding keys": b'{"model":"other","MODEL":"m","messages":[],"Stream":true,"stream":false}',
    "bytes after the value": b'{"model":"m","messages":[]} and then {"model":"other"}',
    "a lone surrogate": b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
    "space before": b'\r\n\t {"model":"m"}',
}


@pytest.mark.parametrize("body", ODD_BODIES.values(), ids=ODD_BODIES.keys())
async def test_odd_bodies_that_ollama_serves_reach_the_node_as_they_are(body: bytes) -> None:
    async def script(caller: Caller) -> None:
        await caller.answer(b'{"model":"m","message":{"role":"assistant","content":""},"done":true}', kind=NATIVE_JSON)

    node = ScriptedNode(script)
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await ask(fleet.port, "POST", "/api/chat", body)
    assert answer.status == 200, answer.body
    assert [caller.body for caller in node.seen] == [body]
