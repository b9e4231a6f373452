"""OpenAI's Responses route of a simulated node, through the official client and raw."""

import json
from typing import Any

import openai
import trio

from agent.simulated import SimulatedOllama
from agent.simulated.faults import Fault
from tests.fleet.rawhttp import ask

MODEL = "llama3.2:3b"
THINKER = "qwen3:8b"
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CLOCK: Any = {"type": "function", "name": "get_clock", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}}


def node() -> SimulatedOllama:
    models = (MODEL, THINKER, "gemma3:4b")
    return SimulatedOllama(models=models, load_s=0.0, decode_tokens_s=2000.0, prefill_tokens_s=100_000.0)


async def with_client(use: Any) -> None:
    """Run `use(client)` in a thread, against a node of its own."""
    async with node().serve() as sim:
        client = openai.OpenAI(base_url=f"{sim.url}/v1", api_key="any", max_retries=0)
        await trio.to_thread.run_sync(use, client)
        client.close()


async def events(sim: SimulatedOllama, **body: Any) -> list[dict[str, Any]]:
    answer = await ask(sim.port, "POST", "/v1/responses", {"model": MODEL, "input": "hello", "stream": True, **body})
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    lines = answer.body.decode().split("\n")
    said = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert [line[7:] for line in lines if line.startswith("event: ")] == [event["type"] for event in said]
    assert [event["sequence_number"] for event in said] == list(range(len(said)))
    return said


async def test_whole_and_streamed_say_the_same() -> None:
    def use(client: openai.OpenAI) -> None:
        whole = client.responses.create(model=MODEL, input="hello", max_output_tokens=9)
        assert len(whole.output_text.split()) == 9
        assert whole.usage is not None
        assert whole.usage.output_tokens == 9
        stream = client.responses.create(model=MODEL, input="hello", max_output_tokens=9, stream=True)
        seen = list(stream)
        assert "".join(event.delta for event in seen if event.type == "response.output_text.delta") == whole.output_text
        assert seen[-1].type == "response.completed"
        assert seen[-1].response.output_text == whole.output_text

    await with_client(use)


async def test_messages_instructions_and_images_are_read() -> None:
    def use(client: openai.OpenAI) -> None:
        picture: Any = {"type": "input_image", "image_url": "data:image/png;base64,aGk="}
        asked: Any = [{"role": "user", "content": [{"type": "input_text", "text": "what is this"}, picture]}]
        seen = client.responses.create(model="gemma3:4b", input=asked, instructions="be short", max_output_tokens=3)
        assert seen.instructions == "be short"
        assert seen.usage is not None
        assert seen.usage.input_tokens > 256

    await with_client(use)


async def test_several_calls_and_their_results() -> None:
    def use(client: openai.OpenAI) -> None:
        said = "weather and clock in Paris"
        first = client.responses.create(model=MODEL, input=said, tools=[WEATHER, CLOCK])
        calls: Any = first.output
        assert [(call.name, json.loads(call.arguments)) for call in calls] == [
            ("get_weather", {"city": "Paris"}),
            ("get_clock", {"zone": "Paris"}),
        ]
        results: Any = [
            {"type": "message", "role": "user", "content": said},
            *({"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments} for call in calls),
            *({"type": "function_call_output", "call_id": call.call_id, "output": "fine"} for call in calls),
        ]
        assert client.responses.create(model=MODEL, input=results, tools=[WEATHER, CLOCK]).output_text

    await with_client(use)


async def test_streamed_calls_have_places_of_their_own() -> None:
    async with node().serve() as sim:
        said = await events(sim, input="weather and clock in Paris", tools=[WEATHER, CLOCK])
    added = [event for event in said if event["type"] == "response.output_item.added"]
    assert [(event["output_index"], event["item"]["name"]) for event in added] == [(0, "get_weather"), (1, "get_clock")]
    done = [event["arguments"] for event in said if event["type"] == "response.function_call_arguments.done"]
    assert done == ['{"city":"Paris"}', '{"zone":"Paris"}']
    assert [item["type"] for item in said[-1]["response"]["output"]] == ["function_call", "function_call"]


async def test_reasoning_comes_first_and_can_be_left_out() -> None:
    async with node().serve() as sim:
        said = await events(sim, model=THINKER, reasoning={"effort": "high"}, max_output_tokens=9)
        silent = await events(sim, model=THINKER, reasoning={"effort": "none"}, max_output_tokens=9)
    assert [item["type"] for item in said[-1]["response"]["output"]] == ["reasoning", "message"]
    assert said[-1]["response"]["reasoning"] == {"effort": "high", "summary": None}
    assert [item["type"] for item in silent[-1]["response"]["output"]] == ["message"]


async def test_a_schema_is_kept_and_echoed() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "name": "x", "schema": schema}
    async with node().serve() as sim:
        answer = await ask(sim.port, "POST", "/v1/responses", {"model": MODEL, "input": "count", "text": {"format": form}})
    said = answer.json()
    assert said["text"] == {"format": form}
    assert isinstance(json.loads(said["output"][0]["content"][0]["text"])["n"], int)


async def test_a_failure_after_the_first_token_is_swallowed() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="error", after_tokens=3))
        said = await events(sim)
    assert said[-1]["type"] == "response.output_text.delta"
    assert len([event for event in said if event["type"] == "response.output_text.delta"]) == 3


async def test_errors_come_in_openai_s_envelope() -> None:
    async with node().serve() as sim:
        unknown = await ask(sim.port, "POST", "/v1/responses", {"model": "nosuch", "input": "x", "stream": True})
        effort = await ask(
            sim.port, "POST", "/v1/responses", {"model": MODEL, "input": "x", "stream": True, "reasoning": {"effort": "maybe"}}
        )
        broken = await ask(sim.port, "POST", "/v1/responses", b'{"model":')
    assert unknown.status == 404
    assert unknown.json()["error"] == {"message": "model 'nosuch' not found", "type": "not_found_error", "param": None, "code": None}
    assert unknown.headers["cache-control"] == "no-cache"
    assert effort.status == 400
    assert "cache-control" not in effort.headers
    assert broken.json()["error"]["message"] == "unexpected EOF"
