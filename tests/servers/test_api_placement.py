"""`GET /api/placement`: the plan for what was asked, for those who may see it, computed seldom."""

from typing import Any

import pytest

import servers.api.placement as module
from core.advice import Question
from core.events import NodePolled, RequestCame, Route
from core.units import RequestId, UnixMs
from servers.settings import Settings
from tests.servers.house import STRANGER, House


@pytest.fixture
async def house() -> House:
    return House(Settings())


async def test_the_plan_names_what_should_be_warm(house: House) -> None:
    added = await house.ask("POST", "/api/agents/backends", {"url": "http://127.0.0.1:9", "name": "box"})
    rows = [{"name": "m:latest", "model": "m:latest", "size": 4_000_000_000, "digest": "d"}]
    house.driver.apply(NodePolled(agent_id=added.json["id"], version="0.33.0", installed=rows, loaded=[], now_unix=UnixMs(1)))
    request = RequestCame(request_id=RequestId("r"), route=Route.CHAT, model="m", client="c", stream=True, input_tokens=10)
    house.driver.apply(request)
    plan = (await house.ask("GET", "/api/placement")).json
    (placed,) = plan["placed"]
    assert (placed["node"], placed["model"], placed["share"], placed["loaded"]) == ("box", "m:latest", 1.0, False)
    assert plan["memory_guessed"] == ["box"]
    assert plan["capacity_per_s"] > plan["rate_per_s"] > 0
    assert plan["rates_per_s"].keys() == {"m:latest"}


async def test_a_plan_is_kept_for_a_while(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Question] = []

    async def answered(question: Question) -> dict[str, Any]:
        computed.append(question)
        return {"placed": []}

    monkeypatch.setattr(module, "_answered", answered)
    for _ in range(3):
        assert (await house.ask("GET", "/api/placement")).json == {"placed": []}
    assert len(computed) == 1
    monkeypatch.setattr(module, "KEPT_S", 0.0)
    await house.ask("GET", "/api/placement")
    assert len(computed) == 2


async def test_strangers_do_not_see_it(house: House) -> None:
    assert (await house.ask("GET", "/api/placement", **STRANGER)).status == 401
