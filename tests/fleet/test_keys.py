"""API keys end to end: a key for one model reaches no other, however the request spells it; limits; what a key has used."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from backports import zstd

from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, last_line, open_fleet, serving
from tests.fleet.rawhttp import Caller


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


async def judged(fleet: Fleet, key: str, path: str, body: bytes, **headers: str) -> int:
    """The status of a request with the key in a header, which is that of the same with the key in the path."""
    answer = await fleet.ask("POST", path, body, headers=bearer(key) | headers)
    again = await fleet.ask("POST", f"/k/{key}{path}", body, headers=headers)
    assert again.status == answer.status, (answer.body, again.body)
    return answer.status


V1 = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"]
FRAME = zstd.compress


@pytest.mark.parametrize("path", V1)
@pytest.mark.parametrize(
    ("packed", "status"),
    [
        (FRAME(b'{"model":"m"}'), 200),
        (FRAME(b'{"model":"other"}'), 403),
        (FRAME(b'{"model":"m","MODEL":"other"}'), 400),
        (FRAME(b'{"model":') + FRAME(b'"other"}'), 403),
        (b"\x50\x2a\x4d\x18\x0d\0\0\0" + b'{"model":"m"}' + FRAME(b'{"model":"other"}'), 403),  # a frame that decoders skip
        (FRAME(b'{"model":"m"}')[:-6], 400),
        (b'{"model":"m"}', 200),  # no zstd, and no frame begins like it: the node says so
        (b'{"model":"other"}', 403),
        (FRAME(b'{"model":"m"' + b" " * (21 << 20) + b"}"), 400),  # the node would read no more than 20 MiB
    ],
)
async def test_a_compressed_body_is_judged_by_what_it_holds(
    fleet: Fleet, node: ScriptedNode, path: str, packed: bytes, status: int
) -> None:
    node.script = answer_whole
    key = await make(fleet, models=["m"])
    assert await judged(fleet, key, path, packed, **{"Content-Encoding": "zstd"}) == status
    assert [caller.body for caller in node.seen] == ([packed, packed] if status == 200 else [])


async def test_a_body_that_its_node_would_not_decode_is_judged_as_it_is(fleet: Fleet, node: ScriptedNode) -> None:
    key = await make(fleet, models=["m"])
    for path in ("/api/chat", "/api/generate", "/api/show"):
        assert await judged(fleet, key, path, FRAME(b'{"model":"m"}'), **{"Content-Encoding": "zstd"}) == 400
    for coding in ("gzip", "identity, zstd", "br"):
        assert await judged(fleet, key, "/v1/chat/completions", FRAME(b'{"model":"m"}'), **{"Content-Encoding": coding}) == 400
    assert node.seen == []


def part(name: bytes, value: bytes, more: bytes = b"") -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (name, more, value)


@pytest.mark.parametrize(
    ("form", "query", "status"),
    [
        (part(b"model", b"m"), "", 200),
        (part(b"model", b"other"), "", 403),
        (part(b"model", b"m") + part(b"model", b"other"), "", 400),
        (part(b"model", b"other") + part(b"model", b"m"), "", 400),
        (part(b"model", b"m"), "?model=other", 400),
        (part(b"MODEL", b"m"), "", 400),
        (part(b"model", b"m", b'; filename="a"') + part(b"model", b"other"), "", 403),
        (part(b"model", b"m", b'; name="file"') + part(b"model", b"other"), "", 400),
        (b'{"model":"m"}', "", 400),
    ],
)
async def test_a_form_is_judged_by_its_model(fleet: Fleet, node: ScriptedNode, form: bytes, query: str, status: int) -> None:
    node.script = answer_whole
    key = await make(fleet, models=["m"])
    body = form + part(b"file", b"sound", b'; filename="a.wav"') + b"--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = await judged(fleet, key, f"/v1/audio/transcriptions{query}", body, **headers)
    assert answer == status
    assert len(node.seen) == (2 if status == 200 else 0)


ALIASES = "fast=other,m;both=m,other;strange=other;m=other;loop=both"


async def test_an_alias_opens_only_what_it_stands_for_and_the_key_opens() -> None:
    node = ScriptedNode(answer_whole, models=("m:latest", "n:latest", "other:latest"))
    async with serving(node), open_fleet([node.port], ROUTER_ALIASES="n2=n;" + ALIASES, ROUTER_REQUIRE_API_KEY="true") as fleet:
        key = await make(fleet, models=["n"])
        for named in ("n", "n2", "N2:latest"):
            assert await judged(fleet, key, "/api/chat", named_body(named)) == 200
        for named in ("fast", "both", "strange", "m", "library/m", "loop", "other"):
            assert await judged(fleet, key, "/api/chat", named_body(named)) == 403
            packed = FRAME(named_body(named))
            assert await judged(fleet, key, "/v1/chat/completions", packed, **{"Content-Encoding": "zstd"}) == 403
            assert await judged(fleet, key, "/v1/audio/transcriptions", form_of(named), **FORM) == 403
            assert (await fleet.ask("GET", f"/v1/models/{named}", headers=bearer(key))).status in (403, 404)
        of_m = await make(fleet, name="m", models=["m"])
        node.seen.clear()
        assert await judged(fleet, of_m, "/api/chat", named_body("m")) == 403  # the name is an alias: the node would see another model
        for named in ("fast", "both"):
            assert await judged(fleet, of_m, "/api/chat", named_body(named)) == 200
            packed = FRAME(named_body(named))
            assert await judged(fleet, of_m, "/v1/chat/completions", packed, **{"Content-Encoding": "zstd"}) == 200
            assert await judged(fleet, of_m, "/v1/audio/transcriptions", form_of(named), **FORM) == 200
        assert await judged(fleet, of_m, "/api/chat", b'{"model":"both","MODEL":"fast"}') == 400
        assert len(node.seen) == 12
        assert all(b"other" not in caller.body and b"both" not in caller.body for caller in node.seen)


async def answer_whole(caller: Caller) -> None:
    await caller.answer(last_line(content="one").rstrip())


def named_body(model: str) -> bytes:
    return json.dumps({"model": model, "messages": [], "stream": False}).encode()


FORM = {"Content-Type": "multipart/form-data; boundary=x"}


def form_of(model: str) -> bytes:
    return part(b"model", model.encode()) + b"--x--\r\n"


async def test_the_key_opens_no_work_on_models_wherever_it_is_shown(fleet: Fleet, node: ScriptedNode) -> None:
    key = await make(fleet, models=["m"])
    work: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/api/pull", {"model": "m"}),
        ("DELETE", "/api/delete", {"model": "m"}),
        ("POST", "/api/copy", {"source": "other", "destination": "m"}),
    ]
    for method, path, body in work:
        for where, headers in (("", bearer(key)), ("", {"x-api-key": key}), (f"/k/{key}", {})):
            answer = await fleet.ask(method, where + path, body, headers=headers)
            assert answer.status == 403, (path, answer.body)
            assert "only an admin of this router may" in answer.json()["error"]
    for method, path in (("GET", "/api/keys"), ("GET", "/api/agents"), ("GET", "/api/tasks"), ("GET", "/api/dashboard/request-responses")):
        assert (await fleet.ask(method, f"/k/{key}{path}")).status == 401, path
    for body in ({"model": "other", "keep_alive": 0}, {"model": "other", "keep_alive": "0s", "prompt": ""}):
        assert await judged(fleet, key, "/api/generate", json.dumps(body).encode()) == 403
        assert await judged(fleet, key, "/api/chat", json.dumps(body).encode()) == 403
    assert node.seen == []


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
