"""Anthropic's Messages route of a simulated node."""

import json
import re
from typing import Any

from agent.simulated import SimulatedOllama
from agent.simulated.faults import Fault
from tests.fleet.rawhttp import Answer, ask

MODEL = "llama3.2:3b"
THINKER = "qwen3:8b"
TOOLS = [
    {"name": "get_weather", "description": "Weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "get_clock", "description": "Time", "input_schema": {"type": "object", "properties": {"zone": {"type": "string"}}}},
]


def node() -> SimulatedOllama:
    models = (MODEL, THINKER, "gemma3:4b")
    return SimulatedOllama(models=models, load_s=0.0, decode_tokens_s=2000.0, prefill_tokens_s=100_000.0)


async def send(sim: SimulatedOllama, said: Any = "hello", **body: Any) -> Answer:
    messages = [{"role": "user", "content": said}]
    return await ask(sim.port, "POST", "/v1/messages?beta=true", {"model": MODEL, "max_tokens": 9, "messages": messages, **body})


def events(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200
    assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("text/event-stream", "no-cache")
    blocks = answer.body.decode().split("\n\n")[:-1]
    said = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        said.append(event)
    return said


async def test_whole_and_streamed_say_the_same() -> None:
    async with node().serve() as sim:
        whole = (await send(sim)).json()
        said = events(await send(sim, stream=True))
    assert re.fullmatch(r"msg_[0-9a-f]{24}", whole["id"])
    assert whole["stop_reason"] == "max_tokens"
    assert whole["usage"]["output_tokens"] == 9
    assert "".join(event["delta"]["text"] for event in said if event["type"] == "content_block_delta") == whole["content"][0]["text"]
    assert [said[0]["type"], said[1]["type"]] == ["message_start", "content_block_start"]
    assert [event["type"] for event in said[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert said[-2]["delta"] == {"stop_reason": "max_tokens"}
    assert said[-2]["usage"] == whole["usage"]


async def test_calls_are_blocks_and_their_results_are_read() -> None:
    async with node().serve() as sim:
        whole = (await send(sim, "weather and clock in Paris", tools=TOOLS, max_tokens=99)).json()
        said = events(await send(sim, "weather and clock in Paris", tools=TOOLS, max_tokens=99, stream=True))
        results = [{"type": "tool_result", "tool_use_id": block["id"], "content": "fine"} for block in whole["content"]]
        turns = [
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": whole["content"]},
            {"role": "user", "content": results},
        ]
        after = (await send(sim, messages=turns, tools=TOOLS)).json()
    assert [(block["name"], block["input"]) for block in whole["content"]] == [
        ("get_weather", {"city": "Paris"}),
        ("get_clock", {"zone": "Paris"}),
    ]
    assert whole["stop_reason"] == "tool_use"
    starts = [(event["index"], event["content_block"]["name"]) for event in said if event["type"] == "content_block_start"]
    assert starts == [(0, "get_weather"), (1, "get_clock")]
    assert [event["delta"]["partial_json"] for event in said if event["type"] == "content_block_delta"] == [
        '{"city":"Paris"}',
        '{"zone":"Paris"}',
    ]
    assert [block["type"] for block in after["content"]] == ["text"]


async def test_thinking_is_a_block_of_its_own_where_the_model_can() -> None:
    async with node().serve() as sim:
        enabled = events(await send(sim, model=THINKER, stream=True, thinking={"type": "enabled", "budget_tokens": 1024}))
        disabled = (await send(sim, model=THINKER, thinking={"type": "disabled"})).json()
        cannot = (await send(sim, thinking={"type": "enabled", "budget_tokens": 1024}, output_config={"effort": "maybe"})).json()
    starts = [event["content_block"]["type"] for event in enabled if event["type"] == "content_block_start"]
    assert starts == ["thinking", "text"]
    assert [block["type"] for block in disabled["content"]] == ["text"]
    assert [block["type"] for block in cannot["content"]] == ["text"]


async def test_systems_images_and_stop_sequences_are_read() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    async with node().serve() as sim:
        plain = (await send(sim, max_tokens=50)).json()
        system = (await send(sim, max_tokens=50, system=[{"type": "text", "text": "be brief"}])).json()
        words = plain["content"][0]["text"].split()
        stopped = (await send(sim, max_tokens=50, stop_sequences=[words[2]])).json()
        seen = (await send(sim, [{"type": "text", "text": "look"}, picture], model="gemma3:4b")).json()
        by_url = await send(sim, [{"type": "image", "source": {"type": "url", "url": "https://x"}}], model="gemma3:4b")
    assert system["content"] != plain["content"]
    assert (stopped["content"][0]["text"].split(), stopped["stop_reason"]) == (words[:2], "end_turn")
    assert seen["usage"]["input_tokens"] > 256
    assert by_url.status == 400


async def test_errors_come_in_anthropic_s_envelope() -> None:
    async with node().serve() as sim:
        unknown = await send(sim, model="nosuch", stream=True)
        unlimited = await send(sim, max_tokens=0)
        nothing = await send(sim, messages=[])
        sim.faults.add(Fault(kind="status", status=503, times=1))
        busy = await send(sim)
    assert unknown.status == 404
    said = unknown.json()
    assert (said["type"], said["error"]) == ("error", {"type": "not_found_error", "message": "model 'nosuch' not found"})
    assert re.fullmatch(r"req_[0-9a-f]{24}", said["request_id"])
    assert unlimited.json()["error"]["message"] == "max_tokens is required and must be positive"
    assert nothing.status == 400
    assert (busy.status, busy.json()["error"]["type"]) == (503, "overloaded_error")


async def test_a_failure_after_the_first_token_is_swallowed() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="error", after_tokens=3))
        said = events(await send(sim, stream=True))
    assert [event["type"] for event in said] == ["message_start", "content_block_start", *["content_block_delta"] * 3]


async def test_what_ends_without_a_token_is_blank() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="blank"))
        answer = (await send(sim)).json()
    assert (answer["model"], answer["content"]) == ("", None)
    assert "stop_reason" not in answer
