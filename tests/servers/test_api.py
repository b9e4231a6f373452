"""The web app against the contract: every route, its errors, who may ask; the real router behind it."""

import re
import uuid
from typing import Any

import pytest
import trio

from core.config import RouterConfig
from core.events import Effect, NodePolled, RequestCame, Route
from core.messages import EndingReport
from core.router import Router
from core.units import AgentId, Instant, RequestId
from servers import clock
from servers.api.agents import ENDINGS_AT_ONCE
from servers.settings import Settings
from tests.servers.house import ADMIN, REGISTRATION, STRANGER, House, row


@pytest.fixture
async def house() -> House:
    return House(Settings())


# ---------------------------------------------------------------- registering


async def test_registering_by_the_seeds_own_example(house: House) -> None:
    first = await house.ask("POST", "/api/agents", REGISTRATION)
    assert first.status == 201
    assert first.json["status"] == "registered"
    assert uuid.UUID(first.json["agent_id"]).version == 4
    again = await house.ask("POST", "/api/agents", REGISTRATION)
    assert (again.status, again.json["status"], again.json["agent_id"]) == (200, "updated", first.json["agent_id"])
    (agent,) = (await house.ask("GET", "/api/agents")).json
    for name, value in REGISTRATION.items():
        assert agent[name] == value
    assert (agent["gpu_count"], agent["gpu_model"], agent["status"]) == (2, "NVIDIA RTX 4090", "online")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?Z", agent["registered_at"])


async def test_an_agent_with_a_gateway_gets_its_token_and_the_credential_to_expect(house: House) -> None:
    registered = await house.register(agent_api_port=11435)
    agent_id = AgentId(registered["agent_id"])
    assert registered["gateway_credential"] == house.tokens.gateway_credential(agent_id)
    assert house.tokens.agent_of(registered["agent_token"]) == agent_id
    view = house.driver.router.agent(agent_id)
    assert view is not None
    assert (view.upstream.host, view.upstream.port, view.upstream.gateway) == ("192.168.1.100", 11435, True)


async def test_an_agent_that_shows_its_token_keeps_it(house: House) -> None:
    first = await house.register()
    again = await house.ask("POST", "/api/agents", REGISTRATION, token=first["agent_token"], **STRANGER)
    assert (again.status, again.json["agent_id"]) == (200, first["agent_id"])
    assert "agent_token" not in again.json
    assert house.tokens.agent_of(first["agent_token"]) == first["agent_id"]


async def test_an_agent_without_a_gateway_is_asked_for_its_models(house: House) -> None:
    registered = await house.register()
    assert registered.get("gateway_credential") is None
    assert list(house.poller._nodes) == [registered["agent_id"]]
    await house.ask("POST", "/api/agents", {**REGISTRATION, "agent_api_port": 11435})
    assert not house.poller._nodes


async def test_a_strangers_registration_waits_and_gets_nothing_until_it_is_approved(house: House) -> None:
    pending = await house.ask("POST", "/api/agents", {**REGISTRATION, "agent_api_port": 11435}, **STRANGER)
    assert (pending.status, pending.json["status"]) == (202, "pending")
    assert re.fullmatch(r"[A-Z]{4}-\d{4}", pending.json["code"])
    assert "gateway_credential" not in pending.json
    token, agent_id = pending.json["agent_token"], pending.json["agent_id"]
    beat = {"agent_id": agent_id, "cpu_usage": 1, "memory_usage": 1, "installed_models": [row("m:latest")], "loaded_models": []}
    waiting = await house.ask("POST", "/api/health", beat, token=token, **STRANGER)
    assert (waiting.json["status"], waiting.json["gateway_credential"]) == ("pending", None)
    assert (await house.ask("GET", "/api/tags")).json == {"models": []}
    assert (await house.ask("POST", "/api/agents/approve", {"code": "WRNG-0000"})).status == 404
    approved = await house.ask("POST", "/api/agents/approve", {"code": pending.json["code"].lower()})
    assert approved.status == 200
    assert approved.json["status"] != "pending"
    let_in = await house.ask("POST", "/api/health", beat, token=token, **STRANGER)
    assert let_in.json["gateway_credential"] == house.tokens.gateway_credential(agent_id)
    assert [model["name"] for model in (await house.ask("GET", "/api/tags")).json["models"]] == ["m:latest"]


async def test_forwarded_callers_are_strangers(house: House) -> None:
    pending = await house.ask("POST", "/api/agents", REGISTRATION, X_Forwarded_For="127.0.0.1")
    assert pending.status == 202
    by_id = await house.ask("POST", f"/api/agents/{pending.json['agent_id']}/approve")
    assert by_id.status == 200


async def test_a_join_token_lets_an_agent_in_at_once(house: House) -> None:
    minted = await house.ask("POST", "/api/admin/join-tokens")
    assert minted.status == 201
    assert minted.json["expires_at"].endswith("Z")
    answer = await house.ask("POST", "/api/agents", REGISTRATION, token=minted.json["token"], **STRANGER)
    assert answer.status == 201


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu_available": False}, "gpu"),
        ({"gpu_devices": []}, "gpu"),
        ({"gpu_devices": [{"model": " ", "count": 1}]}, "gpu"),
        ({"gpu_devices": [{"model": "x", "count": 0}]}, "gpu"),
    ],
)
async def test_a_gpu_is_required_of_agents_from_elsewhere(house: House, changes: dict[str, Any], reason: str) -> None:
    token = (await house.ask("POST", "/api/admin/join-tokens")).json["token"]
    refused = await house.ask("POST", "/api/agents", {**REGISTRATION, **changes}, token=token, **STRANGER)
    assert refused.status == 403
    assert refused.json["error"].startswith("GPU hardware is required for agent registration: ")
    assert "ROUTER_REQUIRE_GPU" in refused.json["error"]
    assert (await house.ask("POST", "/api/agents", {**REGISTRATION, **changes})).status == 201
    lenient = House(Settings(require_gpu=False, auth="off"))
    assert (await lenient.ask("POST", "/api/agents", {**REGISTRATION, **changes}, **STRANGER)).status == 201


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (b"", 400, "JSON"),
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        ({**REGISTRATION, "ollama_port": 0}, 422, "ollama_port"),
        ({**REGISTRATION, "ollama_port": "x"}, 400, "ollama_port"),
        ({**REGISTRATION, "machine_name": " "}, 400, "machine_name"),
        ({"machine_name": "x"}, 400, "ip_address"),
        ({**REGISTRATION, "ip_address": "gpu1"}, 400, "ip_address"),
        ({**REGISTRATION, "ip_address": "169.254.169.254"}, 422, "169.254.169.254"),
    ],
)
async def test_registrations_that_make_no_sense(house: House, body: Any, status: int, word: str) -> None:
    answer = await house.ask("POST", "/api/agents", body)
    assert (answer.status, word in answer.json["error"]) == (status, True), answer.body
    assert (await house.ask("GET", "/api/agents")).json == []


async def test_a_registration_that_is_too_large_is_413(house: House) -> None:
    answer = await house.ask("POST", "/api/agents", b" " * (17 << 20))
    assert answer.status == 413


# ---------------------------------------------------------------- lists and settings


async def test_long_lists_of_agents_too(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.api.agents.SHOWN_INLINE", 1)
    ids = [await house.ready([], machine_name=name) for name in ("a", "b")]
    assert [agent["id"] for agent in (await house.ask("GET", "/api/agents")).json] == ids


async def test_lists_are_filtered(house: House) -> None:
    first = await house.ready([row("llama3.2:3b")], machine_name="a")
    second = await house.ready([row("qwen3:8b")], machine_name="b")
    await house.ask("PUT", f"/api/agents/{second}/settings", {"tags": ["big"]})

    async def ids(query: str) -> list[str]:
        return [agent["id"] for agent in (await house.ask("GET", f"/api/agents?{query}")).json]

    assert await ids("") == [first, second]
    assert await ids("status=online") == [first, second]
    assert await ids("status=offline") == []
    assert await ids("tag=big") == [second]
    assert await ids("model=library/LLAMA3.2:3b") == [first]
    assert await ids("model=qwen3:8b&tag=small") == []
    assert (await house.ask("GET", "/api/agents?status=asleep")).status == 400
    assert (await house.ask("GET", "/api/agents?model=!!")).status == 400


async def test_an_agent_shows_what_contract_3_adds(house: House) -> None:
    agent_id = await house.ready([row("m:latest")], agent_version="1.2", slots=4)
    agent = (await house.ask("GET", f"/api/agents/{agent_id}")).json
    assert (agent["state"], agent["detail"], agent["slots"], agent["agent_version"]) == ("ready", "takes requests", 4, "1.2")
    assert (agent["installed_models"], agent["loaded_models"], agent["tags"], agent["custom_name"]) == (["m:latest"], [], [], None)
    assert (agent["cpu_usage"], agent["in_flight"], agent["ejections"]) == (10.0, 0, [])
    assert "code" not in agent


async def test_settings_absent_leaves_null_clears(house: House) -> None:
    agent_id = await house.ready([])
    path = f"/api/agents/{agent_id}/settings"
    changed = await house.ask("PUT", path, {"custom_name": "big one", "tags": ["a"], "notes": "n", "weight": 2, "max_concurrent": 3})
    assert changed.status == 200
    assert (changed.json["custom_name"], changed.json["name"], changed.json["weight"]) == ("big one", "big one", 2)
    left = (await house.ask("PUT", path, {"notes": None})).json
    assert (left["custom_name"], left["notes"], left["tags"], left["max_concurrent"]) == ("big one", None, ["a"], 3)
    for wrong in ({"custom_name": "x" * 101}, {"tags": ["a"] * 21}, {"tags": ["x" * 51]}, {"notes": "x" * 2001}, {"weight": "x"}):
        assert (await house.ask("PUT", path, wrong)).status == 400


async def test_commands(house: House) -> None:
    agent_id = await house.ready([row("m:latest")])

    async def state(order: str) -> str:
        answer = await house.ask("POST", f"/api/agents/{agent_id}/{order}")
        assert answer.status == 202
        return str(answer.json["state"])

    assert await state("drain") == "held"
    assert await state("connect") == "ready"
    assert await state("disconnect") == "held"
    assert await state("connect") == "ready"
    assert await state("disconnect?now=true") == "held"
    assert (await house.ask("POST", f"/api/agents/{agent_id}/disconnect?now=perhaps")).status == 400
    deleted = await house.ask("DELETE", f"/api/agents/{agent_id}")
    assert (deleted.status, deleted.body) == (204, b"")
    assert (await house.ask("GET", f"/api/agents/{agent_id}")).status == 404
    assert house.tokens.agent_of("x") is None
    assert not house.poller._nodes


@pytest.mark.parametrize("unknown", [str(uuid.UUID(int=5)), "not-a-uuid", "1", "%00", "a" * 5000, "Ω"])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/api/agents/{}", None),
        ("DELETE", "/api/agents/{}", None),
        ("PUT", "/api/agents/{}/settings", {}),
        ("POST", "/api/agents/{}/drain", None),
        ("POST", "/api/agents/{}/connect", None),
        ("POST", "/api/agents/{}/disconnect", None),
        ("POST", "/api/agents/{}/approve", None),
        ("POST", "/api/agents/{}/metrics", {"cpu_usage": 1, "memory_usage": 1}),
        ("POST", "/api/agents/{}/endings", {"reports": []}),
        ("GET", "/api/requests/{}/why", None),
    ],
)
async def test_an_unknown_id_is_404_whatever_it_looks_like(house: House, method: str, path: str, body: Any, unknown: str) -> None:
    answer = await house.ask(method, path.format(unknown), body)
    assert (answer.status, answer.headers["Content-Type"].partition(";")[0]) == (404, "application/json")


# ---------------------------------------------------------------- reports


async def test_health_is_accepted_and_asks_for_what_is_missing(house: House) -> None:
    registered = await house.register(agent_api_port=11435)
    beat = {"agent_id": registered["agent_id"], "cpu_usage": 45.5, "memory_usage": 60.2, "active_requests": 3}
    answer = await house.ask("POST", "/api/health", beat, token=registered["agent_token"], **STRANGER)
    assert (answer.status, answer.json["status"], answer.json["send_inventory"]) == (200, "ok", True)
    assert answer.json["gateway_credential"] == registered["gateway_credential"]
    (load,) = (await house.ask("GET", "/api/agents/metrics")).json
    assert (load["cpu_usage"], load["memory_usage"], load["active_requests"]) == (45.5, 60.2, 3)
    assert (await house.ask("POST", "/api/health", {**beat, "agent_id": "nobody"})).status == 404
    assert (await house.ask("POST", "/api/health", beat, token="wrong", **STRANGER)).status == 401


async def test_metrics_are_taken_and_used(house: House) -> None:
    registered = await house.register()
    path = f"/api/agents/{registered['agent_id']}/metrics"
    body = {
        "agent_id": registered["agent_id"], "cpu_usage": 45.5, "memory_usage": 60.2, "active_requests": 3, "avg_response_time_ms": 250.5,
        "timestamp": "2025-11-02T10:00:00Z",
    }  # fmt: skip
    answer = await house.ask("POST", path, body)
    assert (answer.status, answer.body) == (204, b"")
    (load,) = (await house.ask("GET", "/api/agents/metrics")).json
    assert (load["cpu_usage"], load["average_response_time_ms"]) == (45.5, 250.5)
    summary = (await house.ask("GET", "/api/metrics/summary")).json
    assert (summary["total_agents"], summary["online_agents"], summary["active_requests"]) == (1, 1, 3)
    assert summary["average_cpu_usage"] == 45.5
    assert (summary["model_loads"], summary["model_reloads"], summary["model_reloads_avoided"]) == (0, 0, 0)
    for wrong in (b'{"cpu_usage":101,"memory_usage":1}', b'{"cpu_usage":-1,"memory_usage":1}', b'{"cpu_usage":NaN,"memory_usage":1}'):
        assert (await house.ask("POST", path, wrong)).status in (400, 422)
    assert (await house.ask("POST", path, body, **STRANGER)).status == 401


# ---------------------------------------------------------------- nodes without an agent


async def test_nodes_without_an_agent(house: House) -> None:
    added = await house.ask("POST", "/api/agents/backends", {"url": "http://127.0.0.1:9", "name": "box", "slots": 2})
    assert added.status == 201
    assert (added.json["name"], added.json["agentless"], added.json["slots"], added.json["status"]) == ("box", True, 2, "offline")
    assert list(house.poller._nodes) == [added.json["id"]]
    again = await house.ask("POST", "/api/agents/backends", {"url": "http://127.0.0.1:9"})
    assert (again.status, again.json["id"], again.json["name"]) == (200, added.json["id"], "127.0.0.1:9")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400), ({"url": 5}, 400), ({"url": "ftp://x"}, 400), ({"url": "https://x"}, 400), ({"url": "http://"}, 400),
        ({"url": "http://169.254.169.254"}, 422), ({"url": "http://0.0.0.0"}, 422), ({"url": "http://x", "slots": 0}, 422),
        ({"url": "http://x", "name": "n" * 101}, 400),
    ],
)  # fmt: skip
async def test_nodes_that_cannot_be(house: House, body: Any, status: int) -> None:
    assert (await house.ask("POST", "/api/agents/backends", body)).status == status


# ---------------------------------------------------------------- the fleet as one Ollama


async def test_the_fleet_as_one_ollama(house: House) -> None:
    first = await house.ready(
        [row("m:latest"), row("old:latest", modified="2025-01-01T00:00:00Z")], machine_name="a", ollama_version="0.33.0"
    )
    await house.ready([row("m:latest")], machine_name="b", ollama_version="0.12.5")
    tags = await house.ask("GET", "/api/tags")
    assert tags.headers["Content-Type"] == "application/json; charset=utf-8"
    assert [model["name"] for model in tags.json["models"]] == ["m:latest", "old:latest"]
    assert (await house.ask("GET", "/api/version")).json == {"version": "0.12.5"}
    models = await house.ask("GET", "/v1/models")
    assert models.headers["Content-Type"] == "application/json"
    assert models.body.endswith(b"]}\n")
    assert [model["id"] for model in models.json["data"]] == ["m:latest", "old:latest"]
    loaded = {**row("m:latest"), "size_vram": 7, "expires_at": "2026-01-02T03:04:05Z"}
    beat = {"agent_id": first, "cpu_usage": 1, "memory_usage": 1, "loaded_models": [loaded]}
    assert (await house.ask("POST", "/api/health", beat)).status == 200
    assert [model["name"] for model in (await house.ask("GET", "/api/ps")).json["models"]] == ["m:latest"]
    assert (await house.ask("DELETE", f"/api/agents/{first}")).status == 204
    assert [model["name"] for model in (await house.ask("GET", "/api/tags")).json["models"]] == ["m:latest"]


async def test_an_empty_fleet_as_one_ollama(house: House) -> None:
    root = await house.ask("GET", "/")
    assert (root.body, root.headers["Content-Type"]) == (b"Ollama is running", "text/plain; charset=utf-8")
    assert (await house.ask("GET", "/api/tags")).body == b'{"models":[]}'
    assert (await house.ask("GET", "/api/ps")).body == b'{"models":[]}'
    assert (await house.ask("GET", "/v1/models")).body == b'{"object":"list","data":null}\n'
    assert (await house.ask("GET", "/api/status")).json == {"cloud": {"disabled": True, "source": "config"}}
    for path in ("/", "/api/version", "/api/tags"):
        assert (await house.ask("HEAD", path)).status == 200


# ---------------------------------------------------------------- Ollama's manners


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/api/tags", "HEAD, GET"), ("HEAD", "/api/ps", "GET"), ("POST", "/", "HEAD, GET"), ("GET", "/api/chat", "POST"),
        ("PUT", "/api/generate", "POST"), ("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models", "GET"),
        ("GET", "/api/delete", "DELETE"), ("OPTIONS", "/api/tags", "HEAD, GET"),
    ],
)  # fmt: skip
async def test_a_wrong_method_on_a_path_of_ollamas(house: House, method: str, path: str, allow: str) -> None:
    answer = await house.ask(method, path)
    assert (answer.status, answer.headers["Allow"], answer.headers["Content-Type"]) == (405, allow, "text/plain")
    assert answer.body in (b"405 method not allowed", b"")


@pytest.mark.parametrize("path", ["/api/nosuch", "/nosuch", "/debug/pprof", "/v1/files", "/api"])
async def test_an_unknown_path(house: House, path: str) -> None:
    answer = await house.ask("GET", path)
    assert (answer.status, answer.headers["Content-Type"], answer.body) == (404, "text/plain", b"404 page not found")


async def test_a_slash_too_many(house: House) -> None:
    moved = await house.ask("GET", "/api/tags/?x=1")
    assert (moved.status, moved.headers["Location"], moved.body) == (
        301,
        "/api/tags?x=1",
        b'<a href="/api/tags">Moved Permanently</a>.\n\n',
    )
    assert (await house.ask("POST", "/api/tags/")).status == 307


async def test_a_wrong_method_on_a_path_of_ours(house: House) -> None:
    answer = await house.ask("PATCH", "/api/agents")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD, POST")
    assert (await house.ask("GET", "/api/agents/x/nosuch")).headers["Content-Type"].startswith("application/json")


async def test_reports_of_endings_go_to_who_knows_the_requests(house: House) -> None:
    first = await house.register(machine_name="alpha", agent_api_port=5)
    second = await house.register(machine_name="beta", agent_api_port=6)
    path, token = f"/api/agents/{first['agent_id']}/endings", first["agent_token"]
    reports = [{"request_id": f"r{number}", "ending": "success", "output_tokens": number} for number in range(ENDINGS_AT_ONCE + 1)]
    unknown = await house.ask("POST", path, {"reports": reports}, token=token, **STRANGER)
    assert (unknown.status, unknown.json) == (200, {"taken": ENDINGS_AT_ONCE + 1, "gather_s": 0.25})
    assert f"ollama_router_endings_unknown_total {ENDINGS_AT_ONCE + 1}.0" in (await house.ask("GET", "/metrics")).body.decode()
    taken: list[tuple[str, list[EndingReport]]] = []
    house.web.endings = lambda agent_id, some: taken.append((agent_id, some))
    assert (await house.ask("POST", path, {"reports": reports}, token=token, **STRANGER)).json["taken"] == ENDINGS_AT_ONCE + 1
    assert [(agent_id, len(some)) for agent_id, some in taken] == [(first["agent_id"], ENDINGS_AT_ONCE), (first["agent_id"], 1)]
    assert [report.output_tokens for _, some in taken for report in some] == list(range(ENDINGS_AT_ONCE + 1))
    assert (await house.ask("POST", path, {"reports": [], "dropped": 3}, token=token, **STRANGER)).json["taken"] == 0
    assert 'ollama_router_endings_dropped_total{agent="alpha"} 3.0' in (await house.ask("GET", "/metrics")).body.decode()
    for number in range(29):
        await house.register(machine_name=f"gamma-{number}")
    assert (await house.ask("POST", path, {"reports": []}, token=token)).json["gather_s"] == 31 / 40
    taken.clear()
    for wrong in ("wrong", second["agent_token"]):
        assert (await house.ask("POST", path, {"reports": reports}, token=wrong, **STRANGER)).status == 401
    assert (await house.ask("POST", path, {"reports": reports * 20}, token=token)).status == 400
    assert (await house.ask("POST", path, {"reports": [{"request_id": "r", "ending": "lost"}]}, token=token)).status == 400
    assert taken == []


# ---------------------------------------------------------------- who may ask


OPEN = [("GET", "/"), ("GET", "/livez"), ("GET", "/readyz")]
INFERENCE = [("GET", "/api/tags"), ("GET", "/api/ps"), ("GET", "/api/version"), ("GET", "/v1/models"), ("GET", "/api/status")]
MANAGEMENT = [
    ("GET", "/api/agents"), ("GET", "/api/agents/x"), ("DELETE", "/api/agents/x"), ("PUT", "/api/agents/x/settings"),
    ("POST", "/api/agents/x/drain"), ("POST", "/api/agents/x/connect"), ("POST", "/api/agents/x/disconnect"),
    ("POST", "/api/agents/x/approve"), ("POST", "/api/agents/approve"), ("POST", "/api/agents/backends"), ("GET", "/api/agents/metrics"),
    ("GET", "/api/metrics/summary"), ("POST", "/api/admin/join-tokens"), ("GET", "/api/queue"), ("GET", "/api/admin/dump"),
    ("GET", "/api/placement"), ("GET", "/api/requests/x/why"), ("GET", "/metrics"),
    ("GET", "/api/models/available"), ("GET", "/api/models/drift"), ("POST", "/api/models/distribute"),
    ("GET", "/api/models/policy"), ("PUT", "/api/models/policy"),
    ("GET", "/api/agents/x/models"), ("POST", "/api/agents/x/models/pull"), ("DELETE", "/api/agents/x/models/x"),
    ("GET", "/api/tasks"), ("GET", "/api/tasks/x"), ("DELETE", "/api/tasks/x"),
    ("GET", "/api/dashboard/request-responses"), ("DELETE", "/api/dashboard/request-responses"),
    ("GET", "/api/dashboard/request-responses/x"), ("GET", "/api/dashboard/request-responses/export"),
    ("GET", "/api/dashboard/request-history"), ("GET", "/api/dashboard/request-sums"),
]  # fmt: skip
AGENTS_OWN = [
    ("POST", "/api/health"), ("POST", "/api/agents/<agent_id>/metrics"), ("POST", "/api/agents/<agent_id>/tasks"), ("POST", "/api/agents"),
    ("POST", "/api/agents/<agent_id>/endings"),
]  # fmt: skip
OLLAMAS_MANAGEMENT = [("POST", "/api/pull"), ("DELETE", "/api/delete"), ("POST", "/api/copy")]
REFUSED = [
    ("POST", "/api/create"), ("POST", "/api/push"), ("POST", "/api/blobs/x"), ("POST", "/api/signout"), ("DELETE", "/api/user/keys/x"),
    ("POST", "/api/experimental/web_search"), ("POST", "/api/experimental/web_fetch"),
]  # fmt: skip
LOCAL = [("POST", "/api/me"), ("GET", "/api/experimental/model-recommendations")]


async def test_every_route_has_its_area(house: House) -> None:
    listed = (*OPEN, *INFERENCE, *MANAGEMENT, *OLLAMAS_MANAGEMENT, *REFUSED, *LOCAL)
    known = {(method, re.sub(r"/x(?=/|$)", "/<>", path)) for method, path in listed} | {
        (method, path.replace("<agent_id>", "<>")) for method, path in AGENTS_OWN
    }
    served = {
        (method, re.sub("<[^>]*>", "<>", rule.rule))
        for rule in house.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if not rule.rule.startswith("/api/keys")  # tests/servers/test_api_keys.py
    }
    assert served == known


@pytest.mark.parametrize(("method", "path"), MANAGEMENT)
async def test_management_is_for_this_machine_and_admins(house: House, method: str, path: str) -> None:
    refused = await house.ask(method, path, {}, **STRANGER)
    assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert ADMIN not in refused.body.decode()
    assert (await house.ask(method, path, {}, token="wrong", **STRANGER)).status == 401
    assert (await house.ask(method, path, {}, X_Forwarded_For="127.0.0.1")).status == 401
    assert (await house.ask(method, path, {}, Origin="https://evil.example")).status == 401
    assert (await house.ask(method, path, {}, token=ADMIN, **STRANGER)).status != 401
    assert (await house.ask(method, path, {})).status != 401


@pytest.mark.parametrize(("method", "path"), INFERENCE)
async def test_the_fleets_lists_are_open_to_the_lan_alone(house: House, method: str, path: str) -> None:
    assert (await house.ask(method, path, **STRANGER)).status == 200
    refused = await house.ask(method, path, peer="203.0.113.9:1")
    assert refused.status == 401
    if path.startswith("/v1/"):
        assert refused.json["error"]["message"]
    assert (await house.ask(method, path, peer="203.0.113.9:1", token=ADMIN)).status == 200


async def test_only_the_listener_may_ask(house: House) -> None:
    assert (await house.ask("GET", "/", X_Router_Secret="wrong")).status == 403


# ---------------------------------------------------------------- health and the rest


async def test_livez_and_readyz(house: House) -> None:
    assert (await house.ask("GET", "/livez", peer="203.0.113.9:1")).status == 200
    assert (await house.ask("GET", "/readyz")).status == 200
    agent_id = (await house.register())["agent_id"]
    waiting = await house.ask("GET", "/readyz")
    assert (waiting.status, waiting.headers["Retry-After"]) == (503, "1")
    house.driver.apply(
        NodePolled(
            agent_id=agent_id, version="0.33.0", installed=[row("m:latest")], loaded=[], now_unix=clock.unix_ms(), asked_at=clock.now()
        )
    )
    assert (await house.ask("GET", "/readyz")).status == 200
    house.listening = False
    assert (await house.ask("GET", "/readyz")).status == 503


async def test_metrics_can_be_scraped(house: House) -> None:
    await house.ready([])
    answer = await house.ask("GET", "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b'ollama_router_agent_ready{agent="my-machine"}' in answer.body


async def test_who_waits_and_why() -> None:
    house = House(Settings())
    agent_id = await house.ready([row("m:latest")], slots=1)
    request_id = RequestId(str(uuid.uuid4()))
    house.driver.open_desk(request_id)
    house.driver.apply(RequestCame(request_id=request_id, route=Route.CHAT, model="m"))
    why = await house.ask("GET", f"/api/requests/{request_id}/why")
    assert (why.status, why.json["request_id"], why.json["model"] in ("m", "m:latest")) == (200, request_id, True)
    queue = await house.ask("GET", "/api/queue")
    assert (queue.status, queue.json) == (200, {"waiting": [], "total": 0})
    other = RequestId(str(uuid.uuid4()))
    assert (await house.ask("POST", f"/api/agents/{agent_id}/drain")).status == 202
    house.driver.open_desk(other)
    house.driver.apply(RequestCame(request_id=other, route=Route.CHAT, model="m", client="c"))
    queue = await house.ask("GET", "/api/queue")
    assert [waiting["request_id"] for waiting in queue.json["waiting"]] in ([other], [])


async def test_what_nobody_expected_is_a_500_with_a_sentence(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Router) -> list[Effect]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(Router, "agents", fail)
    answer = await house.ask("GET", "/api/agents")
    assert answer.status == 500
    assert answer.headers["X-Request-Id"] in answer.json["error"]
    assert b"secret detail" not in answer.body


def test_the_routers_settings_reach_it() -> None:
    config = Settings(agent_timeout_s=7.0, queue_max=5, queue_per_client=5).router_config()
    assert isinstance(config, RouterConfig)
    assert (config.agent_timeout_s, config.queue_max) == (7.0, 5)


async def test_time_is_the_drivers(house: House) -> None:
    before: Instant = house.driver.now()
    await trio.lowlevel.checkpoint()
    assert house.driver.now() >= before


async def test_paths_can_be_made_of_their_parts(house: House) -> None:
    paths = house.app.url_map.bind("localhost")
    made = {rule.rule: paths.build(rule.endpoint, dict.fromkeys(rule.arguments, "a b")) for rule in house.app.url_map.iter_rules()}
    assert {path: re.sub("<[^>]*>", "a%20b", path) for path in made} == made
