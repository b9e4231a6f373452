"""The drop-in checklist: what programs that talk to Ollama rely on beyond any one library, each item as a check on a fleet.

Each check speaks HTTP itself, for what it looks at is what libraries hide.
"""

import json
import re
from collections.abc import Awaitable, Callable

import trio

from servers.settings import load
from tests.conformance.stage import HUGE_BYTES, MODELS, Stage
from tests.fleet.clients import CHAT, EMBED
from tests.fleet.fleet import chat, open_fleet
from tests.fleet.rawhttp import parse_answer, raw_request, wait_until

Check = Callable[[Stage], Awaitable[None]]
CHECKLIST: dict[str, Check] = {}
NATIVE_JSON = "application/json; charset=utf-8"


def item(text: str) -> Callable[[Check], Check]:
    """Declare the check of one item."""

    def declare(check: Check) -> Check:
        assert text not in CHECKLIST
        CHECKLIST[text] = check
        return check

    return declare


@item("`HEAD /` is 200, `GET /` has Ollama's text, `GET /api/version` a plain number in JSON")
async def alive(stage: Stage) -> None:
    head = await stage.fleet.ask("HEAD", "/")
    assert (head.status, head.headers["content-length"], head.body) == (200, "17", b"")
    found = await stage.fleet.ask("GET", "/")
    assert (found.body, found.headers["content-type"]) == (b"Ollama is running", "text/plain; charset=utf-8")
    version = await stage.fleet.ask("GET", "/api/version")
    assert version.headers["content-type"] == NATIVE_JSON
    assert re.fullmatch(r"\d+\.\d+\.\d+", version.json()["version"])


@item("lists: `models` is always an array, digests have 64 hex digits, `name` and `model` always a tag")
async def lists(stage: Stage) -> None:
    await stage.load_chat()
    for path in ("/api/tags", "/api/ps"):
        answer = await stage.fleet.ask("GET", path)
        assert answer.headers["content-type"] == NATIVE_JSON
        assert answer.json()["models"], path
        for row in answer.json()["models"]:
            assert row["name"] == row["model"]
            assert ":" in row["name"]
            assert re.fullmatch(r"[0-9a-f]{64}", row["digest"])
    async with open_fleet() as empty:
        for path in ("/api/tags", "/api/ps"):
            assert (await empty.ask("GET", path)).json() == {"models": []}


@item("`show` has `model_info`, `capabilities`, `details`, `template`, all as the node says it, which sees the client's `User-Agent`")
async def shown(stage: Stage) -> None:
    agent = "GitHubCopilotChat/1.0"
    answer = await stage.fleet.ask("POST", "/api/show", {"name": CHAT}, headers={"User-Agent": agent})
    assert answer.json().keys() >= {"model_info", "capabilities", "details", "template"}
    assert answer.body == (await stage.ask_node(stage.nodes[0], "/api/show", {"name": CHAT})).body
    fields = [dict(entry.headers) for node in stage.nodes for entry in node.log if entry.route == "/api/show"]
    assert agent in {value.decode() for one in fields for name, value in one.items() if name.lower() == b"user-agent"}


@item("unknown models: `model 'X' not found` with 404; every native error is one string")
async def not_found(stage: Stage) -> None:
    for path, body in (("/api/chat", chat("nosuch")), ("/api/generate", {"model": "nosuch", "prompt": "x"})):
        answer = await stage.fleet.ask("POST", path, body)
        assert (answer.status, answer.json()) == (404, {"error": "model 'nosuch' not found"})
    for method, path, body in (
        ("POST", "/api/chat", b"{"), ("POST", "/api/show", b""), ("POST", "/api/embed", b'{"model": "nosuch"}'),
        ("POST", "/api/pull", b"{}"), ("DELETE", "/api/delete", b'{"model": "nosuch"}'), ("POST", "/api/create", b"{}"),
    ):  # fmt: skip
        answer = await stage.fleet.ask(method, path, body)
        assert answer.status >= 400, path
        assert list(answer.json()) == ["error"], path
        assert isinstance(answer.json()["error"], str), path


@item("NDJSON: its content type, no blank lines, `done:true` at the end, errors as the last line")
async def ndjson(stage: Stage) -> None:
    answer = await stage.fleet.chat(CHAT)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert b"\n\n" not in answer.body
    assert answer.body.endswith(b"\n")
    assert [line["done"] for line in answer.lines()] == [False] * (len(answer.lines()) - 1) + [True]
    cut = await stage.fleet.chat(MODELS["cut"])
    assert list(json.loads(cut.body.splitlines()[-1])) == ["error"]
    assert not cut.whole


@item("lines of 8 MB pass, each is flushed as it comes, nothing is compressed")
async def lines(stage: Stage) -> None:
    huge = {"model": MODELS["huge"], "messages": [{"role": "user", "content": "Hello"}]}
    answer = await stage.fleet.ask("POST", "/api/chat", huge, headers={"Accept-Encoding": "gzip"})
    assert answer.whole
    assert max(len(line) for line in answer.body.splitlines()) >= HUGE_BYTES
    assert "content-encoding" not in answer.headers
    async with stage.fleet.talk("/api/chat", chat(MODELS["slow"])) as talk:
        await talk.wait_for(b"}\n")
        assert any(node.in_flight for node in stage.nodes), "the first line came when the node was through"


@item("DELETE with a body, chunked requests, `Expect: 100-continue`; uploads of any size are refused before they are sent")
async def bodies(stage: Stage) -> None:
    gone = await stage.fleet.ask("DELETE", "/api/delete", {"name": "nosuch"})
    assert gone.json() == {"error": "model 'nosuch' not found"}
    body = json.dumps(chat(CHAT, stream=False)).encode()
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    chunks = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (9, body[:9], len(body) - 9, body[9:])
    assert parse_answer(await raw_request(stage.fleet.port, head + chunks)).json()["done"] is True
    expecting = head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with await trio.open_tcp_stream("127.0.0.1", stage.fleet.port) as stream:
        await stream.send_all(expecting)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        await stream.send_all(body)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
    upload = b"POST /api/blobs/sha256:%s HTTP/1.1\r\nHost: x\r\nContent-Length: 107374182400\r\n\r\n" % (b"ab" * 32)
    answer = parse_answer(await raw_request(stage.fleet.port, upload))
    assert answer.status == 403
    assert "do it on one node" in answer.json()["error"]


@item("loading and unloading answer with one JSON object; unloading reaches every node that has the model in memory")
async def loading(stage: Stage) -> None:
    for node in stage.nodes:
        assert (await stage.ask_node(node, "/api/generate", {"model": CHAT})).json()["done_reason"] == "load"
    await wait_until(lambda: all(CHAT in str(agent.loaded) for agent in stage.fleet.agents()), what="both seen to have it loaded")
    for path, empty in (("/api/generate", {"prompt": ""}), ("/api/chat", {"messages": []})):
        answer = await stage.fleet.ask("POST", path, {"model": CHAT, "stream": True, **empty})
        assert (answer.headers["content-type"], answer.json()["done_reason"]) == (NATIVE_JSON, "load")
    answer = await stage.fleet.ask("POST", "/api/generate", {"model": CHAT, "keep_alive": 0})
    assert (answer.headers["content-type"], answer.json()["done_reason"]) == (NATIVE_JSON, "unload")
    assert not any([CHAT in await stage.loaded_on(node) for node in stage.nodes])


@item("`model` or `name`, in any letter case, with or without the tag")
async def names(stage: Stage) -> None:
    untagged = EMBED.removesuffix(":latest")
    for body in ({"model": CHAT}, {"name": CHAT}, {"model": "", "name": CHAT.upper()}, {"name": untagged}, {"NAME": untagged.title()}):
        assert (await stage.fleet.ask("POST", "/api/show", body)).status == 200, body
    for name in (untagged, EMBED.upper(), f"library/{untagged}", f"registry.ollama.ai/library/{EMBED}"):
        answer = await stage.fleet.ask("POST", "/api/embed", {"model": name, "input": "x"})
        assert answer.json()["model"] == name


@item("a client that leaves is cancelled on its node; what it does not read does not hold the node up")
async def leaving(stage: Stage) -> None:
    async with stage.fleet.talk("/api/chat", chat(MODELS["slow"])) as talk:
        await talk.wait_for(b"}\n")
    await wait_until(lambda: not any(node.in_flight for node in stage.nodes), within_s=2, what="the node at rest")
    async with stage.fleet.talk("/api/chat", chat(CHAT)) as talk:
        await wait_until(lambda: not any(node.in_flight for node in stage.nodes), within_s=5, what="the node at rest, nothing being read")
        assert (await talk.rest()).whole


@item("event streams end with `[DONE]`, `message_stop`, `response.completed`")
async def events(stage: Stage) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    for path, body, end in (
        ("/v1/chat/completions", {"messages": messages}, b"data: [DONE]\n\n"),
        ("/v1/completions", {"prompt": "Hello"}, b"data: [DONE]\n\n"),
        ("/v1/messages", {"messages": messages, "max_tokens": 9}, b'event: message_stop\ndata: {"type":"message_stop"}\n\n'),
    ):
        answer = await stage.fleet.ask("POST", path, {"model": CHAT, "stream": True, **body})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.body.endswith(end), answer.body[-200:]
    answer = await stage.fleet.ask("POST", "/v1/responses", {"model": CHAT, "stream": True, "input": "Hello"})
    assert b"event: response.completed\n" in answer.body.split(b"\n\n")[-2] + b"\n"


@item("browsers: preflights are answered, `Origin` and `Referer` do not reach a node, `Host` is the node's own")
async def browsers(stage: Stage) -> None:
    origin = "http://localhost:3000"
    asks: dict[str, str] = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = await stage.fleet.ask("OPTIONS", "/api/chat", headers=asks)
    assert (preflight.status, preflight.headers["access-control-allow-origin"]) == (204, origin)
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"].lower()
    for path in ("/api/chat", "/v1/chat/completions"):
        answer = await stage.fleet.ask("POST", path, chat(CHAT, stream=False), headers={"Origin": origin, "Referer": origin + "/x"})
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert (await stage.fleet.ask("GET", "/api/tags", headers={"Origin": origin})).headers["access-control-allow-origin"] == origin
    assert (await stage.fleet.ask("GET", "/api/tags", headers={"Origin": "http://elsewhere.example"})).status == 403
    for node in stage.nodes:
        for entry in node.log:
            fields = {name.lower(): value for name, value in entry.headers}
            assert not fields.keys() & {b"origin", b"referer", b"authorization", b"cookie"}
            if entry.route in ("/api/chat", "/v1/chat/completions"):  # others may be the test's own
                assert fields[b"host"] == f"127.0.0.1:{node.port}".encode()


@item("no time limit on silence before the first token, none on the whole answer")
async def patience(stage: Stage) -> None:
    settings = load({})
    assert (settings.first_token_timeout_s, settings.stall_timeout_s) == (None, None)
    quick = next(model for model in stage.nodes[0].models.values() if model.name == MODELS["late"])
    assert quick.prefill_tokens_s <= 1
    async with stage.fleet.talk("/api/chat", chat(MODELS["late"], content="x")) as talk:
        await talk.wait_for(b"}\n")
