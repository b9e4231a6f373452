"""API keys end to end: a key for one model reaches no other, however the request spells it; limits; what a key has used."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving


@pytest.fixture
async def node() -> AsyncIterator[ScriptedNode]:
    node = ScriptedNode(answer_well, models=("m:latest", "other:latest"))
    async with serving(node):
        yield node


@pytest.fixture
async def fleet(node: ScriptedNode) -> AsyncIterator[Fleet]:
    async with open_fleet([node.port], ROUTER_REQUIRE_API_KEY="true") as fleet:
        yield fleet


async def make(fleet: Fleet, **wanted: Any) -> str:
    answer = await fleet.ask("POST", "/api/keys", {"name": "laptop", **wanted})
    assert answer.status == 201, answer.body
    return str(answer.json()["key"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


MESSAGES = '"messages":[{"role":"user","content":"Hello"}]'

NOT_FOR_IT = [
    ("/api/chat", b'{"model":"other",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"MODEL":"other",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"model":"m","model":"other",%b}' % MESSAGES.encode(), 400),
    ("/api/chat", b'{"model":"other","model":"m",%b}' % MESSAGES.encode(), 400),
    ("/api/chat", b'{"model":"m","Model":"other",%b}' % MESSAGES.encode(), 400),
    ("/api/chat", b'{"model":"m",%b,"mode\\u006c":"other"}' % MESSAGES.encode(), 400),
    ("/api/chat", b'{"model":"m",%b,"model":null}' % MESSAGES.encode(), 400),
    ("/api/chat", b'{"model":"OTHER:latest",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"model":"registry.ollama.ai/library/other",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"model":" other ",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"model":"oth\\u0065r",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"model":"m:cloud",%b}' % MESSAGES.encode(), 403),
    ("/api/chat", b'{"model":7,%b}' % MESSAGES.encode(), 400),
    ("/api/chat", b"{%b}" % MESSAGES.encode(), 400),
    ("/api/chat", b'{"model":"m"', 400),
    ("/api/chat", b"[]", 400),
    ("/api%2Fchat", b'{"model":"other",%b}' % MESSAGES.encode(), 403),
    ("/api/generate", b'{"model":"other","prompt":"x"}', 403),
    ("/api/generate", b'{"model":"other","keep_alive":0}', 403),
    ("/api/embed", b'{"model":"other","input":"x"}', 403),
    ("/api/embeddings", b'{"model":"other","prompt":"x"}', 403),
    ("/api/show", b'{"model":"other"}', 403),
    ("/api/show", b'{"name":"other"}', 403),
    ("/api/show", b'{"model":"m","name":"other"}', 400),
    ("/api/show", b'{"model":"","name":"other"}', 400),
    ("/v1/chat/completions", b'{"model":"other",%b}' % MESSAGES.encode(), 403),
    ("/v1/completions", b'{"model":"other","prompt":"x"}', 403),
    ("/v1/embeddings", b'{"model":"other","input":"x"}', 403),
    ("/v1/responses", b'{"model":"other","input":"x"}', 403),
    ("/v1/messages", b'{"model":"other","max_tokens":5,%b}' % MESSAGES.encode(), 403),
]


@pytest.mark.parametrize(("path", "body", "status"), NOT_FOR_IT)
async def test_a_key_for_one_model_reaches_no_other(fleet: Fleet, node: ScriptedNode, path: str, body: bytes, status: int) -> None:
    key = await make(fleet, models=["m"])
    answer = await fleet.ask("POST", path, body, headers=bearer(key))
    assert answer.status == status, answer.body
    assert b"API key 'laptop'" in answer.body
    assert node.seen == []
    (listed,) = (await fleet.ask("GET", "/api/keys")).json()
    assert (listed["used"]["requests"], listed["used"]["refused"]) == (1, 1)


async def test_the_path_names_a_model_too(fleet: Fleet, node: ScriptedNode) -> None:
    key = await make(fleet, models=["m"])
    assert (await fleet.ask("GET", "/v1/models/other", headers=bearer(key))).status == 403
    assert node.seen == []


@pytest.mark.parametrize("spelling", ["m", "M", "m:latest", "library/m", "registry.ollama.ai/library/m:latest"])
async def test_its_own_model_is_reached_in_every_spelling(fleet: Fleet, node: ScriptedNode, spelling: str) -> None:
    key = await make(fleet, models=["m"])
    answer = await fleet.ask("POST", "/api/chat", chat(spelling), headers=bearer(key))
    assert answer.status == 200, answer.body
    assert len(node.seen) == 1
    assert "authorization" not in {name.lower() for name in node.seen[0].fields}


async def test_a_body_too_large_for_the_quick_look_is_judged_alike(fleet: Fleet, node: ScriptedNode) -> None:
    key = await make(fleet, models=["m"])
    body = b'{"model":"m",%b,"pad":"%b","MODEL":"other"}' % (MESSAGES.encode(), b"x" * (2 << 20))
    assert (await fleet.ask("POST", "/api/chat", body, headers=bearer(key))).status == 400
    assert node.seen == []


async def test_requests_per_minute_and_tokens_per_day_end(fleet: Fleet) -> None:
    key = await make(fleet, requests_per_minute=1)
    assert (await fleet.ask("POST", "/api/chat", chat(), headers=bearer(key))).status == 200
    answer = await fleet.ask("POST", "/v1/chat/completions", chat(), headers=bearer(key))
    assert answer.status == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert "slow down" in json.loads(answer.body)["error"]["message"]
    spent = await make(fleet, name="spent", tokens_per_day=3)
    assert (await fleet.ask("POST", "/api/chat", chat(stream=False), headers=bearer(spent))).status == 200
    await fleet.wait_settled()
    answer = await fleet.ask("POST", "/api/chat", chat(stream=False), headers=bearer(spent))
    assert answer.status == 429
    assert "tokens for today" in answer.json()["error"]
    used = {one["name"]: one["used"] for one in (await fleet.ask("GET", "/api/keys")).json()}
    assert used["spent"]["tokens_today"] == 3
    assert (used["laptop"]["requests"], used["laptop"]["refused"]) == (1, 1)


async def test_no_key_a_wrong_one_and_a_removed_one(fleet: Fleet) -> None:
    assert (await fleet.chat()).status == 401
    assert (await fleet.ask("POST", "/api/chat", chat(), headers=bearer("ork-nonsense"))).status == 401
    key = await make(fleet)
    assert (await fleet.ask("POST", "/api/chat", chat(), headers={"x-api-key": key})).status == 200
    (listed,) = (await fleet.ask("GET", "/api/keys")).json()
    assert (await fleet.ask("DELETE", f"/api/keys/{listed['id']}")).status == 204
    assert (await fleet.ask("POST", "/api/chat", chat(), headers={"x-api-key": key})).status == 401


async def test_a_key_without_the_scope_asks_no_model(fleet: Fleet) -> None:
    key = await make(fleet, scopes=["management"])
    answer = await fleet.ask("POST", "/api/chat", chat(), headers=bearer(key))
    assert answer.status == 401
    assert "not made for asking models" in answer.json()["error"]
