"""Models of nodes over HTTP: what is asked for, all or nothing, and who may. The work itself is in `tests/fleet`."""

from typing import Any

import pytest

from core.events import NodePolled, NodeSilent
from core.tasks import Begin, NodesSeen
from core.units import AgentId, UnixMs
from servers.settings import Settings
from tests.servers.house import ADMIN, STRANGER, House, row
from tests.servers.test_api import OLLAMAS_MANAGEMENT, REFUSED


@pytest.fixture
async def house() -> House:
    return House(Settings())


async def two(house: House) -> tuple[str, str]:
    """Two nodes that are ready; both hold `m`, one with another digest."""
    first = await house.ready([row("m:latest", size=10)], machine_name="alpha")
    second = await house.ready([row("m:latest", digest="e", size=10), row("hf.co/user/repo:Q4_K_M")], machine_name="beta")
    return first, second


@pytest.mark.parametrize(("method", "path"), OLLAMAS_MANAGEMENT)
async def test_who_may_not_change_models_reads_a_sentence_that_the_ollama_command_shows(house: House, method: str, path: str) -> None:
    refused = await house.ask(method, path, {"model": "x"}, **STRANGER)
    assert refused.status == 403  # of a 401 that command shows no word
    assert "only an admin of this router may" in refused.json["error"]
    assert ("run 'ollama-router pull MODEL'" if path == "/api/pull" else "OLLAMA_HOST=127.0.0.1:8080 ollama ") in refused.json["error"]
    assert (await house.ask(method, path, {"model": "x"}, token="wrong", **STRANGER)).status == 401
    assert (await house.ask(method, path, {"model": "x"}, X_Forwarded_For="127.0.0.1")).status == 403
    assert (await house.ask(method, path, {"model": "x"}, token=ADMIN, **STRANGER)).status in (400, 404, 503)


@pytest.mark.parametrize(("method", "path"), REFUSED)
async def test_what_no_node_may_be_asked_is_refused_with_a_sentence(house: House, method: str, path: str) -> None:
    refused = await house.ask(method, path, {})
    assert refused.status == 403
    assert len(refused.json["error"]) > 30
    assert (await house.ask(method, path, {}, peer="203.0.113.9:1")).status == 401


# ---------------------------------------------------------------- distribution


async def test_a_distribution_makes_one_task_for_each_node(house: House) -> None:
    first, second = await two(house)
    answer = await house.ask("POST", "/api/models/distribute", {"model_name": "llama3.2:1b", "target": "all"})
    assert answer.status == 202
    tasks = (await house.ask("GET", "/api/tasks")).json
    assert {task["id"] for task in tasks} == set(answer.json["task_ids"])
    assert {(task["agent_id"], task["agent_name"], task["status"], task["kind"]) for task in tasks} == {
        (first, "alpha", "pending", "pull"), (second, "beta", "pending", "pull"),
    }  # fmt: skip
    again = await house.ask("POST", "/api/models/distribute", {"model_name": "LLAMA3.2:1b", "target": "specific", "agent_ids": [first]})
    assert again.json["task_ids"][0] in answer.json["task_ids"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "model_name"),
        ({"model_name": ""}, 400, "model is required"),
        ({"model_name": "a b"}, 400, "invalid model name"),
        ({"model_name": "x:cloud"}, 403, "cloud"),
        ({"model_name": "x", "target": "some"}, 400, "target"),
        ({"model_name": "x", "target": "specific"}, 400, "agent_ids"),
        ({"model_name": "x", "target": "specific", "agent_ids": []}, 400, "agent_ids"),
        ({"model_name": "x", "target": "specific", "agent_ids": ["nosuch-1", "FIRST", "nosuch-2"]}, 404, "nosuch-1, nosuch-2"),
        ({"model_name": 5}, 400, "model_name"),
    ],
)
async def test_a_distribution_is_refused_whole(house: House, body: dict[str, Any], status: int, words: str) -> None:
    first, _ = await two(house)
    if "agent_ids" in body:
        body = {**body, "agent_ids": [first if agent == "FIRST" else agent for agent in body["agent_ids"]]}
    answer = await house.ask("POST", "/api/models/distribute", body)
    assert answer.status == status
    assert words in answer.json["error"]
    assert (await house.ask("GET", "/api/tasks")).json == []


async def beat(house: House, agent_id: str, **numbers: Any) -> None:
    answer = await house.ask("POST", "/api/health", {"agent_id": agent_id, "cpu_usage": 1.0, "memory_usage": 1.0, **numbers})
    assert answer.status == 200


async def test_what_fits_on_no_chosen_disk_is_a_507(house: House) -> None:
    first, second = await two(house)
    await beat(house, first, disk_free_bytes=10**9)
    body = {"model_name": "gpt-oss:20b", "target": "specific", "agent_ids": [first]}
    answer = await house.ask("POST", "/api/models/distribute", body)
    assert answer.status == 507
    assert "13.8 GB" in answer.json["error"]
    assert "1.0 GB" in answer.json["error"]
    assert (await house.ask("POST", "/api/models/distribute", {**body, "agent_ids": [first, second]})).status == 202
    assert (await house.ask("POST", f"/api/agents/{first}/models/pull", {"model": "gpt-oss:20b"})).status == 507
    assert (await house.ask("POST", "/api/models/distribute", {**body, "model_name": "m"})).status == 202


async def test_no_node_at_all(house: House) -> None:
    assert (await house.ask("POST", "/api/models/distribute", {"model_name": "x"})).status == 503
    assert (await house.ask("POST", "/api/pull", {"model": "x"})).status == 503
    assert (await house.ask("GET", "/api/models/available")).json["source"] == "packaged"


# ---------------------------------------------------------------- one node


async def test_the_models_of_a_node(house: House) -> None:
    _, second = await two(house)
    shown = (await house.ask("GET", f"/api/agents/{second}/models")).json
    assert shown[0] == {"name": "m:latest", "size_gb": 0.0, "digest": "e", "installed_at": "2026-01-02T03:04:05Z", "loaded": False}
    deleted = await house.ask("DELETE", f"/api/agents/{second}/models/hf.co/user/repo:Q4_K_M")
    assert deleted.status == 202
    task = (await house.ask("GET", f"/api/tasks/{deleted.json['task_id']}")).json
    assert (task["kind"], task["model"], task["agent_name"]) == ("delete", "hf.co/user/repo:Q4_K_M", "beta")
    assert (await house.ask("DELETE", f"/api/agents/{second}/models/nosuch")).status == 404
    assert (await house.ask("GET", "/api/agents/x/models")).status == 404


async def test_a_node_that_waits_for_approval_is_given_nothing(house: House) -> None:
    pending = await house.ask("POST", "/api/agents", {"machine_name": "x", "ip_address": "192.168.1.7", "ollama_version": "1",
        "ollama_port": 1, "gpu_available": True, "gpu_devices": [{"model": "g"}]}, **STRANGER)  # fmt: skip
    refused = await house.ask("POST", f"/api/agents/{pending.json['agent_id']}/models/pull", {"model": "x"})
    assert (refused.status, "approv" in refused.json["error"]) == (409, True)


# ---------------------------------------------------------------- tasks


async def test_a_task_is_shown_cancelled_and_then_over(house: House) -> None:
    first, _ = await two(house)
    task_id = (await house.ask("POST", f"/api/agents/{first}/models/pull", {"model_name": "x"})).json["task_id"]
    shown = (await house.ask("GET", f"/api/tasks/{task_id}")).json
    assert (shown["status"], shown["progress"], shown["error"], shown["download_speed_bps"]) == ("pending", 0.0, None, None)
    assert shown["created_at"].endswith("Z")
    cancelled = (await house.ask("DELETE", f"/api/tasks/{task_id}")).json
    assert (cancelled["status"], cancelled["error"]) == ("cancelled", "cancelled by an admin")
    assert (await house.ask("DELETE", f"/api/tasks/{task_id}")).status == 409
    assert (await house.ask("GET", "/api/tasks?limit=0")).status == 400
    assert (await house.ask("GET", "/api/tasks?limit=x")).status == 400
    for method in ("GET", "DELETE"):
        assert (await house.ask(method, "/api/tasks/%00nosuch")).status == 404


async def test_an_agents_reports_move_its_own_tasks_only(house: House) -> None:
    first = await house.register(machine_name="alpha", agent_api_port=5)
    second = await house.register(machine_name="beta", agent_api_port=6)
    ids = [AgentId(registered["agent_id"]) for registered in (first, second)]
    for agent_id in ids:
        await beat(house, agent_id, installed_models=[], loaded_models=[])
    task_id = (await house.ask("POST", f"/api/agents/{ids[0]}/models/pull", {"model": "x"})).json["task_id"]
    start(house, ids)
    heard = await house.ask("POST", "/api/health", {"agent_id": ids[0], "cpu_usage": 1, "memory_usage": 1})
    (order,) = heard.json["tasks"]
    assert (order["task_id"], order["attempt"], order["model"]) == (task_id, 1, "x")
    report = {"task_id": task_id, "attempt": 1, "phase": "pulling d", "layers": [{"digest": "d", "total": 100, "completed": 40}]}
    path = f"/api/agents/{ids[0]}/tasks"
    assert (await house.ask("POST", path, {"reports": [report]}, token="wrong", **STRANGER)).status == 401
    assert (await house.ask("POST", path, {"reports": [report]}, token=first["agent_token"], **STRANGER)).json == {"stop": []}
    assert (await house.ask("GET", f"/api/tasks/{task_id}")).json["progress"] == 0.4
    other = await house.ask("POST", f"/api/agents/{ids[1]}/tasks", {"reports": [{**report, "over": False}]})
    assert other.json == {"stop": [task_id]}
    await house.ask("DELETE", f"/api/tasks/{task_id}")
    assert (await house.ask("POST", path, {"reports": [report]})).json == {"stop": [task_id]}
    assert (await house.ask("POST", path, {"reports": [{**report, "over": True, "error": "stopped"}]})).json == {"stop": []}
    assert (await house.ask("POST", "/api/agents/x/tasks", {"reports": []})).status == 404


def start(house: House, ids: list[AgentId]) -> None:
    """As the loop does it when it looks: the first attempts are begun. Orders are not sent, for nothing runs here."""
    begun = house.moves.tasks.handle(NodesSeen(known=ids, ready=ids, now_unix=UnixMs(1)), now=house.driver.now())
    assert any(isinstance(effect, Begin) for effect in begun)


# ---------------------------------------------------------------- the policy


async def test_a_policy_is_kept_and_says_how_far_the_fleet_is_from_it(house: House) -> None:
    await two(house)
    put = await house.ask("PUT", "/api/models/policy", {"models": [{"model": "hf.co/user/repo:Q4_K_M"}, {"model": "m", "count": 1}]})
    assert put.status == 200
    got = (await house.ask("GET", "/api/models/policy")).json
    assert got["models"] == [{"model": "hf.co/user/repo:Q4_K_M"}, {"model": "m", "count": 1}]
    assert got["auto_distribute"] is True
    assert [state["missing_on"] for state in got["state"]] == [["alpha"], []]
    await house.web.keeping.look()
    (task,) = (await house.ask("GET", "/api/tasks")).json
    assert (task["agent_name"], task["model"], task["origin"]) == ("alpha", "hf.co/user/repo:Q4_K_M", "policy")
    await house.web.keeping.look()
    assert len((await house.ask("GET", "/api/tasks")).json) == 1
    refused = await house.ask("DELETE", "/api/delete", {"model": "m"})
    assert (refused.status, "policy" in refused.json["error"]) == (409, True)


@pytest.mark.parametrize(
    ("policy", "status", "words"),
    [
        ({"models": [{"model": "a b"}]}, 400, "invalid model name"),
        ({"models": [{"model": "x", "nodes": ["alpha", "gamma", "delta"]}]}, 404, "gamma, delta"),
        ({"models": [{"model": "x", "count": 0}]}, 400, "count"),
        ({"models": [{"model": "x", "where": "there"}]}, 400, "where"),
        ({"models": [{"model": "x"}, {"model": "X:latest"}]}, 400, "twice"),
        ([], 400, "object"),
    ],
)
async def test_a_policy_that_cannot_be_meant_changes_nothing(house: House, policy: Any, status: int, words: str) -> None:
    await two(house)
    answer = await house.ask("PUT", "/api/models/policy", policy)
    assert answer.status == status
    assert words in answer.json["error"]
    assert (await house.ask("GET", "/api/models/policy")).json["models"] == []


# ---------------------------------------------------------------- Ollama's own routes: what is wrong with a request


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("POST", "/api/pull", b"", 400, "missing request body"),
        ("POST", "/api/pull", b'{"model":"x"', 400, "unexpected EOF"),
        ("POST", "/api/pull", b"[]", 400, "json: cannot unmarshal array into Go value of type api.PullRequest"),
        ("POST", "/api/pull", {"model": "a b"}, 400, "invalid model name"),
        ("POST", "/api/pull", {}, 400, "invalid model name"),
        ("POST", "/api/pull", {"model": "x:cloud"}, 403, "ollama cloud is disabled: remote model is unavailable"),
        ("POST", "/api/pull", {"model": "x", "insecure": "yes"}, 400,
         "json: cannot unmarshal string into Go struct field PullRequest.insecure of type bool"),
        ("DELETE", "/api/delete", {}, 400, "model is required"),
        ("DELETE", "/api/delete", {"name": "a b"}, 400, 'name "a b" is invalid'),
        ("DELETE", "/api/delete", {"NAME": "nosuch"}, 404, "model 'nosuch' not found"),
        ("DELETE", "/api/delete", {"model": 5}, 400,
         "json: cannot unmarshal number into Go struct field DeleteRequest.model of type string"),
        ("POST", "/api/copy", {"source": "a b", "destination": "x"}, 400, 'source "a b" is invalid'),
        ("POST", "/api/copy", {"source": " m", "destination": "x"}, 400, 'source " m" is invalid'),
        ("POST", "/api/copy", {"source": "m", "destination": ""}, 400, 'destination "" is invalid'),
        ("POST", "/api/copy", {"source": "nosuch", "destination": "x"}, 404, 'model "nosuch" not found'),
    ],
)  # fmt: skip
async def test_ollamas_words_for_what_is_wrong(house: House, method: str, path: str, body: Any, status: int, text: str) -> None:
    await two(house)
    answer = await house.ask(method, path, body)
    assert (answer.status, answer.json["error"]) == (status, text)


async def test_a_model_that_only_sleeping_nodes_hold_names_them(house: House) -> None:
    first, second = await two(house)
    for agent_id in (first, second):
        await house.ask("POST", f"/api/agents/{agent_id}/disconnect")
    for method, path, body in (("DELETE", "/api/delete", {"model": "m"}), ("POST", "/api/copy", {"source": "m", "destination": "n"})):
        answer = await house.ask(method, path, body)
        assert answer.status == 503
        assert "alpha, beta" in answer.json["error"]
    assert (await house.ask("POST", "/api/pull", {"model": "x"}, X_Ollama_Node="gamma")).status == 404
    assert ADMIN not in answer.body.decode()


async def test_who_one_is_and_what_is_recommended_is_answered_here(house: House) -> None:
    me = await house.ask("POST", "/api/me", {})
    assert (me.status, me.json) == (401, {"error": "unauthorized"})
    assert (await house.ask("GET", "/api/experimental/model-recommendations")).json == {"recommendations": []}
    head = await house.ask("HEAD", "/api/blobs/sha256:00")
    assert head.status == 403


# ---------------------------------------------------------------- the fleet's lists


async def test_a_list_is_merged_anew_only_where_it_changed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = await two(house)
    before = (await house.ask("GET", "/api/tags")).json["models"]
    assert [found["name"] for found in before] == ["hf.co/user/repo:Q4_K_M", "m:latest"]
    assert [found["id"] for found in (await house.ask("GET", "/v1/models")).json["data"]] == ["hf.co/user/repo:Q4_K_M", "m:latest"]
    written: list[Any] = []

    def write(value: Any) -> bytes:
        written.append(value)
        return b"{}"

    monkeypatch.setattr("servers.api.fleet.go_json", write)
    await house.ask("GET", "/api/tags")
    assert written == []
    await beat(house, first, installed_models=[row("m:latest", size=10), row("new:latest")])
    await house.ask("GET", "/api/tags")
    assert {found.get("name") or found["id"] for found in written} == {"new:latest", "m:latest"}  # alpha's row of m is another object


async def test_a_long_list_of_loaded_models_is_merged_off_the_loop(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.api.fleet.MERGE_INLINE_ROWS", 1)
    first, second = await two(house)
    for agent_id in (first, second):
        await beat(house, agent_id, loaded_models=[row("m:latest", digest="e")])
    for _ in range(2):
        assert len((await house.ask("GET", "/api/ps")).json["models"]) == 1


async def test_models_of_a_node_that_went_offline_stay_listed_for_a_while(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    added = await house.ask("POST", "/api/agents/backends", {"url": "http://127.0.0.1:9", "name": "box"})
    agent_id = AgentId(added.json["id"])
    rows = [row("m:latest")]
    house.driver.apply(NodePolled(agent_id=agent_id, version="0.33.0", installed=rows, loaded=rows, now_unix=UnixMs(1)))

    async def listed(path: str) -> int:
        return len((await house.ask("GET", path)).json["models"])

    assert (await listed("/api/tags"), await listed("/api/ps")) == (1, 1)
    house.driver.apply(NodeSilent(agent_id=agent_id, refused=True))
    assert (await listed("/api/tags"), await listed("/api/ps")) == (1, 0)
    monkeypatch.setattr("servers.api.fleet.GRACE_S", 0.0)
    assert await listed("/api/tags") == 0
    monkeypatch.setattr("servers.api.fleet.GRACE_S", 60.0)
    assert await listed("/api/tags") == 0
    house.driver.apply(NodePolled(agent_id=agent_id, version="0.33.0", installed=rows, now_unix=UnixMs(2)))
    assert await listed("/api/tags") == 1
    await house.ask("POST", f"/api/agents/{agent_id}/disconnect")
    assert await listed("/api/tags") == 0
