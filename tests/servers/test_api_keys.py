"""`/api/keys`: make, list, remove, and what is refused."""

from typing import Any

import pytest

from servers.settings import Settings
from tests.servers.house import ADMIN, STRANGER, House


@pytest.fixture
async def house() -> House:
    return House(Settings())


async def make(house: House, **wanted: Any) -> Any:
    answer = await house.ask("POST", "/api/keys", {"name": "laptop", **wanted})
    assert answer.status == 201, answer.body
    return answer.json


async def test_a_key_is_made_listed_and_removed(house: House) -> None:
    made = await make(house, models=["Llama3"], expires_at="2999-01-01T00:00:00Z", requests_per_minute=3, tokens_per_day=9)
    secret = made.pop("key")
    assert secret.startswith("ork-")
    assert made["models"] == ["llama3:latest"]
    assert made["expires_at"] == "2999-01-01T00:00:00Z"
    assert made["used"] == {
        "requests": 0, "refused": 0, "prompt_tokens": 0, "output_tokens": 0, "tokens_today": 0, "last_used_at": None,
    }  # fmt: skip
    listed = await house.ask("GET", "/api/keys")
    assert listed.json == [made]
    assert secret.encode() not in listed.body
    assert house.tokens.key_of(secret) == made["id"]
    assert (await house.ask("DELETE", f"/api/keys/{made['id']}")).status == 204
    assert house.tokens.key_of(secret) is None
    assert (await house.ask("DELETE", f"/api/keys/{made['id']}")).status == 404
    assert (await house.ask("GET", "/api/keys")).json == []


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
        ({"models": ["a b"]}, "models"),
        ({"scopes": ["root"]}, "scopes"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": "2999-01-01T00:00:00"}, "expires_at"),
        ({"expires_at": "2001-01-01T00:00:00Z"}, "expires_at"),
        ({"requests_per_minute": 0}, "requests_per_minute"),
        ({"tokens_per_day": -1}, "tokens_per_day"),
        ({"token_per_day": 1}, "token_per_day"),
    ],
)
async def test_a_bad_field_is_named(house: House, wanted: dict[str, Any], named: str) -> None:
    answer = await house.ask("POST", "/api/keys", {"name": "laptop", **wanted})
    assert answer.status == 400
    assert named in answer.json["error"]


async def test_keys_are_the_admins_business(house: House) -> None:
    for method, path in (("GET", "/api/keys"), ("POST", "/api/keys"), ("DELETE", "/api/keys/1")):
        assert (await house.ask(method, path, {}, **STRANGER)).status == 401
    assert (await house.ask("GET", "/api/keys", token=ADMIN, **STRANGER)).status == 200


async def test_a_key_opens_what_its_scopes_say() -> None:
    house = House(Settings(auth="required"))
    made = (await house.ask("POST", "/api/keys", {"name": "ops", "scopes": ["management"]}, token=ADMIN)).json["key"]
    asking = (await house.ask("POST", "/api/keys", {"name": "app"}, token=ADMIN)).json["key"]
    for path, opened_by in (("/api/agents", made), ("/api/tags", asking)):
        for key in (made, asking):
            answer = await house.ask("GET", path, token=key, **STRANGER)
            assert answer.status == (200 if key == opened_by else 401), (path, key == made)
