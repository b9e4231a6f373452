"""Aliases end to end: which node gets which model's name, byte for byte, in every protocol; lists; what a key may reach by one."""

import json
from typing import Any

import pytest
from backports import zstd

from tests.fleet.fleet import ScriptedNode, chat, last_line, open_fleet, serving
from tests.fleet.rawhttp import Caller

ALIASES = "claude-sonnet=big:30b,small:7b;gpt-4o=small:7b;small:7b-fast=small:7b;nobody=none:1b"


async def whole(caller: Caller) -> None:
    await caller.answer(last_line(content="one").rstrip())


def sent_to(node: ScriptedNode) -> list[bytes]:
    return [caller.body for caller in node.seen]


async def test_the_first_model_that_a_ready_node_holds_and_only_its_name_is_replaced() -> None:
    big, small = ScriptedNode(whole, models=["big:30b"]), ScriptedNode(whole, models=["small:7b"])
    body = b' {"messages":[{"role":"user","content":"model \\u00e9"}] , "model" : "claude-sonnet" ,"stream":false, "x":1.0}'
    async with serving(big, small), open_fleet({"big": big.port, "small": small.port}, ROUTER_ALIASES=ALIASES) as fleet:
        answer = await fleet.ask("POST", "/api/chat", body)
        assert (answer.status, answer.headers["x-ollama-node"]) == (200, "big")
        assert sent_to(big) == [body.replace(b'"claude-sonnet"', b'"big:30b"')]
        answer = await fleet.ask("POST", "/api/chat", body.replace(b'"model"', b'"model":"gpt-4o","MODEL"'))
        assert sent_to(big)[1] == body.replace(b'"model" : "claude-sonnet"', b'"model":"gpt-4o","MODEL" : "big:30b"')
        answer = await fleet.ask("POST", "/api/chat", body.replace(b"claude-sonnet", b"GPT-4o:latest"))
        assert answer.headers["x-ollama-node"] == "small"
        assert sent_to(small) == [body.replace(b'"claude-sonnet"', b'"small:7b"')]
        answer = await fleet.ask("POST", "/api/chat", body.replace(b"claude-sonnet", b"nobody"))
        assert (answer.status, answer.json()) == (404, {"error": "model 'none:1b' not found"})


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": []}),
        ("/api/generate", {"prompt": "a", "stream": False}),
        ("/api/embed", {"input": "a"}),
        ("/api/embeddings", {"prompt": "a"}),
        ("/api/show", {}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "a"}]}),
    ],
)
async def test_every_protocol(path: str, body: dict[str, Any]) -> None:
    node = ScriptedNode(whole, models=["small:7b"])
    async with serving(node), open_fleet({"small": node.port}, ROUTER_ALIASES=ALIASES) as fleet:
        asked = json.dumps({"model": "gpt-4o", **body}).encode()
        assert (await fleet.ask("POST", path, asked)).status == 200
        assert sent_to(node) == [asked.replace(b"gpt-4o", b"small:7b")]
        if path == "/api/show":
            assert (await fleet.ask("POST", path, b'{"name":"gpt-4o"}')).status == 200
            assert sent_to(node)[1] == b'{"name":"small:7b"}'
            assert (await fleet.ask("GET", "/v1/models/gpt-4o")).status == 200
            assert node.seen[-1].target == "/v1/models/small:7b"


async def test_compressed_bodies_and_forms() -> None:
    node = ScriptedNode(whole, models=["small:7b"])
    plain = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "a" * 5000}]}).encode()
    real = plain.replace(b"gpt-4o", b"small:7b")
    async with serving(node), open_fleet({"small": node.port}, ROUTER_ALIASES=ALIASES) as fleet:
        headers = {"Content-Encoding": "zstd"}
        assert (await fleet.ask("POST", "/v1/chat/completions", zstd.compress(plain), headers=headers)).status == 200
        assert node.seen[-1].body == real
        assert b"content-encoding" not in node.seen[-1].head.lower()
        packed = zstd.compress(real)
        assert (await fleet.ask("POST", "/v1/chat/completions", packed, headers=headers)).status == 200
        assert node.seen[-1].body == packed  # nothing is named anew: byte for byte
        assert b"content-encoding: zstd" in node.seen[-1].head.lower()
        field = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
        form = field % (b"model", b"gpt-4o") + field % (b'file"; filename="a', b"\x00\xff") + b"--x--\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        assert (await fleet.ask("POST", "/v1/audio/transcriptions", form, headers=headers)).status == 200
        assert node.seen[-1].body == form.replace(b"gpt-4o", b"small:7b")


async def test_aliases_are_listed_as_such() -> None:
    node = ScriptedNode(whole, models=["small:7b", "plain:1b"])
    async with serving(node), open_fleet({"small": node.port}, ROUTER_ALIASES=ALIASES + ";plain:1b=small:7b") as fleet:
        rows = (await fleet.ask("GET", "/api/tags")).json()["models"]
        assert {row["name"]: row.get("alias_of") for row in rows} == {
            "small:7b": None,
            "claude-sonnet": ["big:30b", "small:7b"],
            "gpt-4o": ["small:7b"],
            "small:7b-fast": ["small:7b"],
            "plain:1b": ["small:7b"],
        }
        assert len(rows) == 5
        assert len({row["digest"] for row in rows}) == 1
        listed = (await fleet.ask("GET", "/v1/models")).json()["data"]
        assert {row["id"]: row.get("alias_of") for row in listed}["gpt-4o"] == ["small:7b"]


async def test_a_key_for_one_model_reaches_no_other_by_an_alias() -> None:
    big, small = ScriptedNode(whole, models=["big:30b"]), ScriptedNode(whole, models=["small:7b"])
    async with serving(big, small), open_fleet({"big": big.port, "small": small.port}, ROUTER_ALIASES=ALIASES + ";large=big:30b") as fleet:
        made = await fleet.ask("POST", "/api/keys", {"name": "k", "models": ["small:7b"]})
        key = made.json()["key"]
        answer = await fleet.ask("POST", f"/k/{key}/api/chat", chat("claude-sonnet", stream=False))
        assert (answer.status, answer.headers["x-ollama-node"]) == (200, "small")
        answer = await fleet.ask("POST", f"/k/{key}/api/chat", chat("large", stream=False))
        assert answer.status == 403
        packed = zstd.compress(json.dumps({"model": "small:7b", "MODEL": "big:30b", "messages": []}).encode())
        answer = await fleet.ask("POST", f"/k/{key}/v1/chat/completions", packed, headers={"Content-Encoding": "zstd"})
        assert answer.status in (400, 403)
        assert big.seen == []
