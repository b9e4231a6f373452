"""History end to end: each stream as one answer with its counts, cuts and cancels as such, refusals, and a request's own wish."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.simulated.server import SimulatedOllama
from servers.clock import rfc3339, unix_ms
from tests.fleet.fleet import Fleet, ScriptedNode, chat, line, open_fleet, openai_chunk, serving, sse
from tests.fleet.rawhttp import Caller, Hangup, wait_until

ROOT = "/api/dashboard/request-responses"
MESSAGES = [{"role": "user", "content": "Hello"}]
SECRET = "my-private-words"


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port]) as fleet:
        yield fleet


async def newest(fleet: Fleet) -> Any:
    """The newest record with its bodies, once it is written."""
    for _ in range(250):
        records = (await fleet.ask("GET", f"{ROOT}?per_page=1")).json()["records"]
        if records:
            return (await fleet.ask("GET", f"{ROOT}/{records[0]['id']}")).json()
        await trio.sleep(0.02)
    raise AssertionError("nothing was recorded")


STREAMS: dict[str, tuple[dict[str, Any], Any]] = {
    "/api/chat": ({"messages": MESSAGES}, lambda whole: (whole["message"]["content"], whole["prompt_eval_count"], whole["eval_count"])),
    "/api/generate": ({"prompt": "Hello"}, lambda whole: (whole["response"], whole["prompt_eval_count"], whole["eval_count"])),
    "/v1/chat/completions": (
        {"messages": MESSAGES, "stream_options": {"include_usage": True}},
        lambda whole: (
            whole["choices"][0]["message"]["content"], whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"],
        ),
    ),
    "/v1/completions": (
        {"prompt": "Hello", "stream_options": {"include_usage": True}},
        lambda whole: (whole["choices"][0]["text"], whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]),
    ),
    "/v1/responses": (
        {"input": "Hello"},
        lambda whole: (whole["output"][-1]["content"][0]["text"], whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]),
    ),
    "/v1/messages": (
        {"messages": MESSAGES, "max_tokens": 40},
        lambda whole: (whole["content"][-1]["text"], whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", STREAMS)
async def test_a_stream_is_recorded_as_one_answer_with_its_counts(fleet: Fleet, path: str) -> None:
    body, read = STREAMS[path]
    answer = await fleet.ask("POST", path, {"model": "m", "stream": True, **body})
    assert answer.status == 200, answer.body
    found = await newest(fleet)
    assert found["id"] == answer.headers["x-request-id"]
    assert (found["status"], found["path"], found["agent_name"], found["bodies"], found["http_status"]) == (
        "success", path, "node-1", "whole", 200,
    )  # fmt: skip
    text, prompt_tokens, output_tokens = read(found["response_body"])
    assert text
    assert (found["prompt_tokens"], found["output_tokens"]) == (prompt_tokens, output_tokens)
    assert output_tokens > 0
    assert found["chunks"] > 2
    assert found["ttft_ms"] <= found["duration_ms"]
    assert found["request_body"]["model"] == "m"
    assert [attempt["outcome"] for attempt in found["attempts"]] == ["success"]


@pytest.mark.parametrize("stream", [True, False])
async def test_the_observed_start_stands_beside_the_predicted_one(fleet: Fleet, stream: bool) -> None:
    answer = await fleet.chat(stream=stream)
    found = await newest(fleet)
    why = (await fleet.ask("GET", f"/api/requests/{answer.headers['x-request-id']}/why")).json()
    assert found["predicted_start_ms"] is not None
    assert 0 <= found["observed_start_ms"] <= found["duration_ms"]
    assert (why["predicted_start_ms"], why["observed_start_ms"]) == (found["predicted_start_ms"], found["observed_start_ms"])
    assert found["agent_address"] == "127.0.0.1"
    assert "agent_address" not in (await fleet.ask("GET", ROOT)).json()["records"][0]


async def test_an_answer_that_is_whole(fleet: Fleet) -> None:
    answer = await fleet.chat(stream=False)
    found = await newest(fleet)
    assert found["response_body"] == answer.json()
    assert found["output_tokens"] == answer.json()["eval_count"]


async def test_a_refusal_without_a_node_is_recorded(fleet: Fleet) -> None:
    assert (await fleet.chat("unknown")).status == 404
    found = await newest(fleet)
    assert (found["status"], found["http_status"], found["model"], found["agent_id"], found["attempts"]) == (
        "error",
        404,
        "unknown",
        None,
        [],
    )
    assert "not found" in found["response_body"]["error"]


async def test_a_request_may_keep_its_bodies_to_itself(fleet: Fleet) -> None:
    await fleet.ask("POST", "/api/chat", chat(content=SECRET), headers={"X-Router-History": "off"})
    found = await newest(fleet)
    assert (found["bodies"], found["request_body"], found["response_body"]) == ("off", None, None)


async def test_redacted_bodies_keep_words_and_lose_images_and_what_is_masked() -> None:
    node = SimulatedOllama(models=["m"])
    image = "iVBORw0KGgo" + "A" * 400
    settings = {"HISTORY_BODIES": "redacted", "HISTORY_MASK": "user,response"}
    async with node.serve(), open_fleet([node.port], **settings) as fleet:
        await fleet.ask("POST", "/api/generate", {"model": "m", "prompt": "Hello", "images": [image], "user": SECRET, "stream": True})
        found = await newest(fleet)
        assert found["bodies"] == "redacted"
        assert found["request_body"]["images"][0].startswith("[base64, ")
        assert (found["request_body"]["prompt"], found["request_body"]["user"]) == ("Hello", "[masked]")


async def test_with_bodies_off_no_word_of_a_prompt_is_on_the_disk() -> None:
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port], HISTORY_BODIES="off") as fleet:
        await fleet.ask("POST", "/api/chat", chat(content=SECRET))
        await fleet.ask("POST", "/api/chat", chat("unknown", content=SECRET))
        await newest(fleet)
        await fleet.coordinator.memory.store.flush()
        kept = b"".join([path.read_bytes() for path in sorted(fleet.data_dir.rglob("*")) if path.is_file()])
        assert b"node-1" in kept
        assert SECRET.encode() not in kept


def named_sse(**value: Any) -> bytes:
    return f"event: {value['type']}\n".encode() + sse(value)


PARTS: dict[str, tuple[dict[str, Any], list[bytes], Any]] = {
    "/api/chat": ({"messages": MESSAGES}, [line("half an "), line("answer")], lambda whole: whole["message"]["content"]),
    "/api/generate": (
        {"prompt": "Hello"},
        [b'{"model":"m","response":"half an ","done":false}\n', b'{"model":"m","response":"answer","done":false}\n'],
        lambda whole: whole["response"],
    ),
    "/v1/chat/completions": (
        {"messages": MESSAGES}, [sse(openai_chunk("half an ")), sse(openai_chunk("answer"))],
        lambda whole: whole["choices"][0]["message"]["content"],
    ),
    "/v1/responses": (
        {"input": "Hello"},
        [
            named_sse(type="response.created", response={"id": "r", "model": "m", "output": []}),
            named_sse(type="response.output_text.delta", output_index=0, content_index=0, delta="half an "),
            named_sse(type="response.output_text.delta", output_index=0, content_index=0, delta="answer"),
        ],
        lambda whole: whole["output_text"],
    ),
    "/v1/messages": (
        {"messages": MESSAGES, "max_tokens": 40},
        [
            named_sse(type="message_start", message={"id": "x", "type": "message", "role": "assistant", "model": "m", "content": []}),
            named_sse(type="content_block_start", index=0, content_block={"type": "text", "text": ""}),
            named_sse(type="content_block_delta", index=0, delta={"type": "text_delta", "text": "half an "}),
            named_sse(type="content_block_delta", index=0, delta={"type": "text_delta", "text": "answer"}),
        ],
        lambda whole: whole["content"][0]["text"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("path", PARTS)
@pytest.mark.parametrize("how", ["cut", "cancelled"])
async def test_what_was_sent_of_every_protocols_stream_is_kept(path: str, how: str) -> None:
    body, parts, text_of = PARTS[path]

    async def half(caller: Caller) -> None:
        await caller.begin_chunks()
        for part in parts:
            await caller.chunk(part)
        if how == "cut":
            raise Hangup
        await trio.sleep_forever()

    node = ScriptedNode(half)
    async with serving(node), open_fleet([node.port]) as fleet:
        asked = {"model": "m", "stream": True, **body}
        if how == "cut":
            assert not (await fleet.ask("POST", path, asked)).whole
        else:
            async with fleet.talk(path, asked) as talk:
                await talk.wait_for(b"answer")
        found = await newest(fleet)
        assert (found["status"], found["http_status"]) == (("error", 200) if how == "cut" else ("cancelled", 499))
        assert text_of(found["response_body"]) == "half an answer"
        assert found["message"]


async def test_a_body_over_the_limit_is_kept_as_far_as_it_goes_and_says_so() -> None:
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port], HISTORY_BODY_MAX_BYTES="60") as fleet:
        await fleet.ask("POST", "/api/chat", chat(content="x" * 500))
        found = await newest(fleet)
        assert found["bodies"] == "cut"
        assert json.dumps(chat(content="x" * 500)).startswith(found["request_body"][:50])


async def test_what_a_key_asked_is_told_with_its_id_and_its_address(fleet: Fleet) -> None:
    made = (await fleet.ask("POST", "/api/keys", {"name": "laptop"})).json()
    await fleet.ask("POST", "/api/chat", chat(), headers={"Authorization": f"Bearer {made['key']}"})
    found = await newest(fleet)
    assert (found["key_id"], found["client"]) == (made["id"], "127.0.0.1")


EARLIER = {
    "id": "earlier", "request_type": "chat", "model": "m", "agent_id": "660f9511-f39c-42e5-8827-557766551111",
    "agent_machine_name": "tower", "agent_ip": "10.0.0.5", "client_ip": "10.0.0.9",
    "request_body": {"prompt": SECRET, "image": "data:image/png;base64,AAAA"},
    "response_body": {"response": "x"}, "duration_ms": 5, "status": {"type": "success"},
}  # fmt: skip
KEPT: dict[str, tuple[dict[str, str], str, Any]] = {
    "full": ({}, "whole", EARLIER["request_body"]),
    "redacted": ({"HISTORY_MASK": "prompt"}, "redacted", {"prompt": "[masked]"}),
    "off": ({}, "off", None),
    "full and too long": ({"HISTORY_BODY_MAX_BYTES": "10"}, "cut", json.dumps(EARLIER["request_body"], separators=(",", ":"))[:10]),
}


@pytest.mark.parametrize("bodies", KEPT)
async def test_an_earlier_routers_history_is_taken_over_as_the_operator_wants_bodies_kept(bodies: str, tmp_path: Path) -> None:
    settings, state, body = KEPT[bodies]
    entry = {**EARLIER, "timestamp": rfc3339(unix_ms()), "completed_at": rfc3339(unix_ms())}
    await trio.Path(tmp_path / "request_history.json").write_text(json.dumps([entry]))
    async with open_fleet((), ROUTER_DATA_DIR=str(tmp_path), HISTORY_BODIES=bodies.partition(" ")[0], **settings) as fleet:
        found = await newest(fleet)
        assert (found["id"], found["edge"], found["agent_name"], found["bodies"]) == ("earlier", "imported", "tower", state)
        if state == "redacted":
            assert found["request_body"].pop("image").startswith("[image/png, ")
        assert found["request_body"] == body


@pytest.mark.parametrize("of_another", [False, True])
async def test_the_file_in_the_home_directory_is_taken_unless_another_coordinator_lives_there(
    of_another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = trio.Path(tmp_path / ".ollama-router")
    await place.mkdir()
    await (place / "request_history.json").write_text(json.dumps([{**EARLIER, "timestamp": rfc3339(unix_ms())}]))
    if of_another:
        await (place / "coordinator-id").write_text("another")
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port]) as fleet:
        store = fleet.coordinator.memory.store
        await wait_until(lambda: store.imported, within_s=20, what="the import")
        found = (await fleet.ask("GET", ROOT)).json()["records"]
        assert [one["id"] for one in found] == ([] if of_another else ["earlier"])


async def test_the_newest_records_are_mirrored_to_a_file(tmp_path: Path) -> None:
    node = SimulatedOllama(models=["m"])
    async with node.serve(), open_fleet([node.port], ROUTER_DATA_DIR=str(tmp_path), HISTORY_JSON="true") as fleet:
        answer = await fleet.chat()
        await newest(fleet)
        file = tmp_path / "request_history.json"
        await wait_until(lambda: file.exists() and file.read_bytes() != b"[]\n", within_s=20, what="the mirror")
        (entry,) = json.loads(await trio.Path(file).read_bytes())
        assert (entry["id"], entry["agent_machine_name"], entry["status"]) == (
            answer.headers["x-request-id"],
            "node-1",
            {"type": "success"},
        )
