"""Who is let in: a stranger's node gets nothing before it is approved, and whoever comes through a proxy is a stranger."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.rawhttp import wait_until

FOREIGN = {"Host": "router.example"}
"""A name that is not this machine's: the connection comes from loopback, and yet the caller is a stranger (DNS rebinding)."""
FORWARDED = {"X-Forwarded-For": "192.168.7.7"}
PUBLIC = {"X-Forwarded-For": "203.0.113.9"}


@pytest.fixture
async def node() -> AsyncIterator[ScriptedNode]:
    node = ScriptedNode(answer_well)
    async with serving(node):
        yield node


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    async with open_fleet() as fleet:
        yield fleet


def registration(port: int) -> dict[str, Any]:
    return {
        "machine_name": "stranger", "ip_address": "127.0.0.1", "ollama_version": "0.33.0", "ollama_port": port, "gpu_available": True,
        "gpu_devices": [{"model": "RTX 4090", "count": 1}],
    }  # fmt: skip


def heartbeat(agent_id: str, sequence: int) -> dict[str, Any]:
    row = {"name": "m:latest", "model": "m:latest", "size": 10**9, "digest": "a" * 64, "details": {}}
    lists = {"installed_models": [row], "loaded_models": [row]}
    return {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "active_requests": 0, "sequence": sequence, **lists}


async def test_a_stranger_is_pending_gets_nothing_and_works_after_approval(fleet: Fleet, node: ScriptedNode) -> None:
    answer = await fleet.ask("POST", "/api/agents", registration(node.port), headers=FOREIGN)
    assert answer.status == 202
    told = answer.json()
    assert told["status"] == "pending"
    token = {"Authorization": f"Bearer {told['agent_token']}"}

    beat = await fleet.ask("POST", "/api/health", heartbeat(told["agent_id"], 1), headers=token)
    assert (beat.status, beat.json()["status"]) == (200, "pending")
    (shown,) = (await fleet.ask("GET", "/api/agents")).json()
    assert (shown["status"], shown["code"]) == ("pending", told["code"])
    assert (await fleet.chat()).status in (404, 503)
    assert node.seen == []

    approved = await fleet.ask("POST", "/api/agents/approve", {"code": told["code"]})
    assert approved.status in (200, 202, 204), approved.body
    beat = await fleet.ask("POST", "/api/health", heartbeat(told["agent_id"], 2), headers=token)
    assert (beat.status, beat.json()["status"]) == (200, "ok")
    await wait_until(lambda: fleet.agents()[0].state == "ready", what="the approved node to be ready")
    assert (await fleet.chat()).status == 200
    assert len(node.seen) == 1


async def test_a_code_that_nobody_has_approves_nobody(fleet: Fleet, node: ScriptedNode) -> None:
    await fleet.ask("POST", "/api/agents", registration(node.port), headers=FOREIGN)
    answer = await fleet.ask("POST", "/api/agents/approve", {"code": "ZZZZ-0000"})
    assert answer.status == 404
    assert fleet.agents()[0].status == "pending"


async def test_this_machines_own_agent_is_let_in_at_once(fleet: Fleet, node: ScriptedNode) -> None:
    answer = await fleet.ask("POST", "/api/agents", registration(node.port))
    assert (answer.status, answer.json()["status"]) == (201, "registered")


async def test_a_join_token_lets_a_stranger_in(node: ScriptedNode) -> None:
    async with open_fleet(ROUTER_JOIN_TOKEN="correct-horse-battery") as fleet:
        good = FOREIGN | {"Authorization": "Bearer correct-horse-battery"}
        bad = FOREIGN | {"Authorization": "Bearer wrong-horse-battery"}
        assert (await fleet.ask("POST", "/api/agents", registration(node.port), headers=bad)).status in (202, 401)
        answer = await fleet.ask("POST", "/api/agents", registration(node.port), headers=good)
        assert answer.status in (200, 201)
        assert fleet.agents()[-1].status != "pending"


async def test_a_forwarded_registration_is_a_strangers(fleet: Fleet) -> None:
    claim = registration(11434) | {"ip_address": "192.168.7.7"}
    answer = await fleet.ask("POST", "/api/agents", claim, headers=FORWARDED)
    assert (answer.status, answer.json()["status"]) == (202, "pending")


@pytest.mark.parametrize(
    "headers", [FORWARDED, PUBLIC, FOREIGN, {"Origin": "http://localhost:3000"}], ids=["private", "public", "host", "origin"]
)
@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/api/agents"), ("POST", "/api/agents/approve"), ("DELETE", "/api/agents/x"), ("GET", "/metrics")]
)
async def test_strangers_manage_nothing(fleet: Fleet, method: str, path: str, headers: dict[str, str]) -> None:
    answer = await fleet.ask(method, path, {"code": "ABCD-1234"} if method == "POST" else None, headers=headers)
    assert answer.status == 401
    assert "admin token" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/api/agents", "/metrics", "/api/tags", "/api/chat"])
async def test_a_page_from_elsewhere_gets_nothing_at_all(fleet: Fleet, path: str) -> None:
    answer = await fleet.ask("POST" if path == "/api/chat" else "GET", path, headers={"Origin": "http://evil.example"})
    assert (answer.status, answer.body) == (403, b"")
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_the_admin_token_opens_what_strangers_may_not(fleet: Fleet) -> None:
    token = (fleet.data_dir / "admin-token").read_text().strip()
    answer = await fleet.ask("GET", "/api/agents", headers={**PUBLIC, "Authorization": f"Bearer {token}"})
    assert answer.status == 200
    answer = await fleet.ask("GET", "/api/agents", headers={**PUBLIC, "Authorization": f"Bearer {token[:-1]}"})
    assert answer.status == 401


async def test_inference_is_open_to_the_near_and_closed_to_the_far(node: ScriptedNode) -> None:
    async with open_fleet([node.port]) as fleet:
        assert (await fleet.ask("POST", "/api/chat", chat(), headers=FORWARDED)).status == 200
        assert (await fleet.ask("POST", "/api/chat", chat(), headers=PUBLIC)).status == 401
        answer = await fleet.ask("POST", "/v1/chat/completions", chat(), headers=PUBLIC)
        assert answer.status == 401
        assert answer.json()["error"]["message"]
    assert len(node.seen) == 1


async def test_nodes_never_see_what_is_the_clients(node: ScriptedNode) -> None:
    secret = {
        "Authorization": "Bearer mine",
        "Cookie": "a=b",
        "x-api-key": "k",
        "Origin": "http://127.0.0.1",
        "Referer": "http://127.0.0.1/",
    }
    async with open_fleet([node.port]) as fleet:
        assert (await fleet.ask("POST", "/api/chat", chat(), headers=secret)).status == 200
    fields = node.seen[0].fields
    assert not {name.lower() for name in secret} & set(fields)
    assert fields["host"] == f"127.0.0.1:{node.port}"
    assert fields["x-request-id"]
