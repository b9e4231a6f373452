"""A coordinator that starts again knows what it knew: nodes and their settings, sleeping models, keys, history; on both databases."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.servers.store.databases import Databases

BEAT = {"cpu_usage": 1.0, "memory_usage": 1.0, "installed_models": ["asleep:latest"], "loaded_models": [], "boot": 1, "sequence": 1}
AGENT = {
    "machine_name": "laptop", "ip_address": "127.0.0.1", "ollama_version": "0.33.0", "ollama_port": 1, "agent_api_port": 1, "boot": 1,
    "gpu_available": True, "gpu_devices": [{"model": "RTX", "count": 1}], "instance_id": "11111111-1111-4111-8111-111111111111",
}  # fmt: skip


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    found = Databases(tmp_path_factory.mktemp("databases"))
    yield found
    found.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, databases: Databases, tmp_path: Path) -> dict[str, str]:
    return {"DATABASE_URL": databases.setting(request.param), "ROUTER_DATA_DIR": str(tmp_path)}


async def add(fleet: Fleet, port: int) -> Any:
    made = await fleet.ask("POST", "/api/agents/backends", {"url": f"http://127.0.0.1:{port}", "name": "added"})
    assert made.status in (200, 201), made.body
    await fleet.wait_ready(1)
    return made.json()["id"]


async def test_everything_that_lasts_is_there_again(settings: dict[str, str]) -> None:
    node = ScriptedNode(answer_well)
    async with serving(node):
        async with open_fleet(**settings) as fleet:
            added = await add(fleet, node.port)
            wanted = {"custom_name": "Tower", "tags": ["fast"], "notes": "under the desk", "weight": 2.0}
            assert (await fleet.ask("PUT", f"/api/agents/{added}/settings", wanted)).status == 200
            registered = (await fleet.ask("POST", "/api/agents", AGENT)).json()
            beat = {**BEAT, "agent_id": registered["agent_id"]}
            assert (await fleet.ask("POST", "/api/health", beat)).status == 200
            key = (await fleet.ask("POST", "/api/keys", {"name": "k"})).json()["key"]
            request_id = (await fleet.ask("POST", "/api/chat", chat(), headers={"x-api-key": key})).headers["x-request-id"]
            await fleet.wait_settled()
            before = {agent.id: agent for agent in fleet.agents()}
        async with open_fleet(**settings, ROUTER_REQUIRE_API_KEY="true") as fleet:
            await fleet.wait_ready(1)
            after = {agent.id: agent for agent in fleet.agents()}
            assert after.keys() == before.keys()
            for agent_id, agent in after.items():
                for name in ("name", "custom_name", "tags", "notes", "weight", "registered_at", "installed"):
                    assert getattr(agent, name) == getattr(before[agent_id], name), name
            assert (await fleet.ask("POST", "/api/chat", chat())).status == 401
            assert (await fleet.ask("POST", "/api/chat", chat(), headers={"x-api-key": key})).status == 200
            record = await fleet.ask("GET", f"/api/dashboard/request-responses/{request_id}")
            assert record.json()["agent_name"] == "Tower"
            assert (await fleet.ask("GET", "/api/keys")).json()[0]["used"]["requests"] == 2
            told = await fleet.ask(
                "POST", "/api/health", {**beat, "sequence": 2}, headers={"Authorization": f"Bearer {registered['agent_token']}"}
            )
            assert told.json()["status"] == "ok"


async def test_a_model_that_only_a_sleeping_node_holds_is_503_with_its_name(settings: dict[str, str], fast_clock: MockClock) -> None:
    async with open_fleet(**settings) as fleet:
        registered = (await fleet.ask("POST", "/api/agents", AGENT)).json()
        assert (await fleet.ask("POST", "/api/health", {**BEAT, "agent_id": registered["agent_id"]})).status == 200
    async with open_fleet(**settings) as fleet:
        answers = []

        async def ask(model: str) -> None:
            answers.append((model, await fleet.chat(model)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "asleep")
            nursery.start_soon(ask, "never-seen")
        found = dict(answers)
        assert found["asleep"].status == 503
        assert "laptop" in found["asleep"].json()["error"]
        assert found["never-seen"].status == 404


async def test_a_node_that_left_the_settings_is_gone_and_a_deleted_one_stays_away(settings: dict[str, str]) -> None:
    node, other = ScriptedNode(answer_well), ScriptedNode(answer_well)
    async with serving(node, other):
        async with open_fleet({"listed": node.port}, **settings) as fleet:
            made = await fleet.ask("POST", "/api/agents/backends", {"url": f"http://127.0.0.1:{other.port}", "name": "added"})
            await fleet.wait_ready(2)
            assert (await fleet.ask("DELETE", f"/api/agents/{made.json()['id']}")).status == 204
        async with open_fleet(**settings) as fleet:
            assert fleet.agents() == []


async def test_tasks_and_the_policy_go_on(settings: dict[str, str]) -> None:
    rules = {"models": [{"model": "wanted", "count": 1}]}
    async with open_fleet(**settings) as fleet:
        registered = (await fleet.ask("POST", "/api/agents", AGENT)).json()
        asked = {"model_name": "asleep:latest", "target": "specific", "agent_ids": [registered["agent_id"]]}
        (waits,) = (await fleet.ask("POST", "/api/models/distribute", asked)).json()["task_ids"]
        (cancelled,) = (await fleet.ask("POST", "/api/models/distribute", {**asked, "model_name": "other"})).json()["task_ids"]
        await fleet.ask("DELETE", f"/api/tasks/{cancelled}")
        policy = await fleet.ask("PUT", "/api/models/policy", rules)
        assert policy.status == 200, policy.body
        before = {task["id"]: task["status"] for task in (await fleet.ask("GET", "/api/tasks")).json()}
    async with open_fleet(**settings) as fleet:
        after = {task["id"]: task["status"] for task in (await fleet.ask("GET", "/api/tasks")).json()}
        assert after == before
        assert (after[waits], after[cancelled]) == ("pending", "cancelled")
        assert (await fleet.ask("GET", "/api/models/policy")).json()["models"] == policy.json()["models"]
