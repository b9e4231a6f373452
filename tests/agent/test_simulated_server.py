"""A simulated node as its users see it: the official client, leaving clients, loads and slots over real sockets, and its own log."""

import json
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from typing import Any

import httpx
import ollama
import pytest
import trio
from click.testing import CliRunner
from trio.testing import MockClock

from agent.simulated import SimulatedModel, SimulatedOllama, demo_nodes, recorded_models
from agent.simulated.__main__ import main
from agent.simulated.models import guessed_model
from agent.simulated.names import display_name, parse_name
from agent.simulated.reading import Refusal
from tests.fleet.rawhttp import Talk, ask, parse_answer, raw_request, talk

QUICK = {"load_s": 0.0, "decode_tokens_s": 2000.0, "prefill_tokens_s": 100_000.0}
MODEL = "llama3.2:3b"
MODELS = (MODEL, "qwen3:8b", "nomic-embed-text", "gemma3:4b")
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_current_weather",
        "description": "Weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}


def node(**settings: Any) -> SimulatedOllama:
    return SimulatedOllama(name="quick", models=MODELS, **{**QUICK, **settings})


def generate(tokens: int, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "hello", "options": {"num_predict": tokens}, **more}


async def begun(speaking: Talk) -> None:
    """Until the first line has come."""
    await speaking.wait_for(b'"done":false')


async def until(condition: Any) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # there is no event to wait for on the other side of a socket
            await trio.sleep(0.001)


# -- the official client


async def with_client(sim: SimulatedOllama, use: Any) -> None:
    """Run `use(client)` with the synchronous client in a thread."""
    await trio.to_thread.run_sync(use, ollama.Client(host=sim.url))


async def test_the_official_client_chats_generates_and_embeds() -> None:
    def use(client: ollama.Client) -> None:
        answer = client.chat(model=MODEL, messages=HELLO)
        assert answer.message.content
        assert answer.done_reason == "stop"
        parts = list(client.chat(model=MODEL, messages=HELLO, stream=True))
        assert "".join(part.message.content or "" for part in parts) == answer.message.content
        assert parts[-1].eval_count == len(parts) - 1
        text = client.generate(model=MODEL, prompt="hello", options={"num_predict": 5})
        assert len(text.response.split()) == 5
        assert text.done_reason == "length"
        assert [part.done for part in client.generate(model=MODEL, prompt="hello", options={"num_predict": 2}, stream=True)] == [
            False,
            False,
            True,
        ]
        vectors = client.embed(model="nomic-embed-text", input=["a", "b"]).embeddings
        assert [len(vector) for vector in vectors] == [768, 768]
        assert sum(value * value for value in vectors[0]) == pytest.approx(1, abs=1e-3)
        assert vectors[0] != vectors[1]
        assert client.embed(model="nomic-embed-text", input="a").embeddings[0] == vectors[0]
        assert len(client.embeddings(model="nomic-embed-text", prompt="a").embedding) == 768

    async with node().serve() as sim:
        await with_client(sim, use)


async def test_the_official_client_lists_shows_and_is_told_what_is_wrong() -> None:
    def use(client: ollama.Client) -> None:
        assert {model.model for model in client.list().models} == {display_name(name) for name in MODELS}
        assert client.ps().models == []
        client.generate(model=MODEL, keep_alive="1h")
        (row,) = client.ps().models
        assert (row.name, row.context_length) == (MODEL, 4096)
        shown = client.show(MODEL)
        assert "tools" in (shown.capabilities or [])
        assert shown.modelinfo
        client.generate(model=MODEL, keep_alive=0)
        assert client.ps().models == []
        with pytest.raises(ollama.ResponseError, match="model 'nosuch' not found"):
            client.chat(model="nosuch", messages=HELLO)
        with pytest.raises(ollama.ResponseError, match="not found"):
            client.show("nosuch")
        assert client.delete(MODEL).status == "success"
        assert MODEL not in {model.model for model in client.list().models}
        with pytest.raises(ollama.ResponseError, match=f"model '{MODEL}' not found"):
            client.delete(MODEL)

    async with node().serve() as sim:
        await with_client(sim, use)


async def test_tools_thinking_images_and_formats() -> None:
    def use(client: ollama.Client) -> None:
        asked = [{"role": "user", "content": "What is the weather in Paris?"}]
        message = client.chat(model=MODEL, messages=asked, tools=[WEATHER]).message
        assert message.tool_calls is not None
        (call,) = message.tool_calls
        assert call.function.name == "get_current_weather"
        assert call.function.arguments["city"] == "Paris"
        streamed = [part.message for part in client.chat(model=MODEL, messages=asked, tools=[WEATHER], stream=True)]
        assert sum(len(part.tool_calls or ()) for part in streamed) == 1
        after = client.chat(model=MODEL, messages=[*asked, message, {"role": "tool", "content": "sunny"}], tools=[WEATHER]).message
        assert after.tool_calls is None
        assert after.content
        assert client.chat(model=MODEL, messages=HELLO, tools=[WEATHER]).message.tool_calls is None

        thought = client.chat(model="qwen3:8b", messages=HELLO).message
        assert thought.thinking
        assert thought.content
        assert client.chat(model="qwen3:8b", messages=HELLO, think=False).message.thinking is None
        assert client.generate(model="qwen3:8b", prompt="hello").thinking

        picture = [{"role": "user", "content": "what is it", "images": [b"\x89PNG"]}]
        assert client.chat(model="gemma3:4b", messages=picture).message.content
        with pytest.raises(ollama.ResponseError, match="does not support multimodal"):
            client.chat(model=MODEL, messages=picture)

        schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x"]}}}}
        value = json.loads(client.chat(model=MODEL, messages=HELLO, format=schema).message.content or "")
        assert isinstance(value["a"], int)
        assert value["b"] == ["x"]
        assert "answer" in json.loads(client.generate(model=MODEL, prompt="hello", format="json").response)

    async with node().serve() as sim:
        await with_client(sim, use)


async def test_answers_depend_on_model_prompt_and_seed_only() -> None:
    async def said(sim: SimulatedOllama, **more: Any) -> str:
        body = {"model": MODEL, "prompt": "hello", "stream": False, **more}
        return str((await ask(sim.port, "POST", "/api/generate", body)).json()["response"])

    async with node().serve() as one, node(slots=2).serve() as two, node(seed=5).serve() as other:
        first = await said(one)
        assert first == await said(two) == await said(one)
        assert first != await said(other)
        assert first != await said(one, options={"seed": 3})
        assert first != await said(one, prompt="hello!")
        stopped = await said(one, options={"stop": [first[6:9]]})
        assert first.startswith(stopped)
        assert len(stopped) < len(first)


# -- clients that leave


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_work_at_once(stream: bool) -> None:
    async with node(decode_tokens_s=50.0).serve() as sim:
        async with talk(sim.port, "POST", "/api/generate", generate(500, stream=stream)) as leaving:
            if stream:
                await begun(leaving)
            else:
                await until(lambda: sim.log and sim.log[0].tokens_generated)
        await until(lambda: not sim.in_flight)
        log = sim.log[0]
        assert log.cancelled_at is not None
        assert log.released_at is not None
        assert 0 <= log.released_at - log.cancelled_at < 0.1
        assert log.tokens_after_cancel == 0
        assert log.tokens_generated < 500
        assert not log.done
        assert (await ask(sim.port, "POST", "/api/generate", generate(2))).lines()[-1]["done"] is True


async def test_a_half_close_counts_as_leaving_and_is_told_so() -> None:
    async with node(decode_tokens_s=50.0).serve() as sim:
        async with talk(sim.port, "POST", "/api/generate", generate(500)) as leaving:
            await begun(leaving)
            await leaving.stream.send_eof()
            answer = await leaving.rest()
        assert answer.whole
        assert answer.lines()[-1] == {"error": "error reading llama-server response: context canceled"}
        async with talk(sim.port, "POST", "/api/generate", generate(500, stream=False)) as leaving:
            await until(lambda: len(sim.log) == 2 and sim.log[-1].tokens_generated)
            await leaving.stream.send_eof()
            assert (await leaving.rest()).status == 500
        async with talk(sim.port, "POST", "/api/generate", generate(500)), talk(sim.port, "POST", "/api/generate", generate(5)) as queued:
            await until(lambda: sim.in_flight == 2)
            await queued.stream.send_eof()
            answer = await queued.rest()
            assert (answer.status, answer.json()) == (499, {"error": "request canceled"})
    async with node(decode_tokens_s=50.0).serve() as sim:
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 500, "stream": True}
        async with talk(sim.port, "POST", "/v1/chat/completions", body) as leaving:
            await leaving.wait_for(b"data: ")
            await leaving.stream.send_eof()
            assert b"[DONE]" not in (await leaving.rest()).body


async def test_who_leaves_during_a_load_takes_the_load_along() -> None:
    async with node(load_s=5.0).serve() as sim:
        async with talk(sim.port, "POST", "/api/generate", generate(5)):
            await until(lambda: sim.loads)
        await until(lambda: not sim.in_flight)
        assert sim.log[0].load_started is not None
        assert (await ask(sim.port, "GET", "/api/ps")).json() == {"models": []}


# -- loads, slots, lists


async def test_three_at_once_on_one_slot_and_the_queue_limit_for_loads() -> None:
    answers: list[int] = []

    async def one(sim: SimulatedOllama) -> None:
        answers.append((await ask(sim.port, "POST", "/api/generate", generate(3))).status)

    async with node(load_s=0.3, max_queue=2).serve() as sim:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one, sim)
        assert sorted(answers) == [200] * 3 + [503] * 5
        assert len(sim.loads) == 1
        assert sim.max_in_flight == 3
        timings = sorted((log.timing for log in sim.log if log.timing is not None), key=lambda timing: timing.started)
        assert all(after.started >= before.finished for before, after in pairwise(timings))
        answers.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one, sim)
        assert answers == [200] * 20


async def test_loads_evict_and_show_in_the_durations() -> None:
    async with node(load_s=0.1, max_loaded=1).serve() as sim:
        first = (await ask(sim.port, "POST", "/api/generate", generate(2, stream=False))).json()
        assert first["load_duration"] >= 100_000_000
        again = (await ask(sim.port, "POST", "/api/generate", generate(2, stream=False))).json()
        assert again["load_duration"] < 50_000_000
        await ask(sim.port, "POST", "/api/generate", generate(2, model="qwen3:8b"))
        assert [change.model for change in sim.evictions] == [MODEL]
        wide = generate(2, model="qwen3:8b", options={"num_ctx": 8192})
        await ask(sim.port, "POST", "/api/generate", wide)
        assert sim.evictions[-1].why == "reload"
        assert (await ask(sim.port, "GET", "/api/ps")).json()["models"][0]["context_length"] == 8192


async def test_what_never_expires_expires_in_292_years() -> None:
    async with node().serve() as sim:
        await ask(sim.port, "POST", "/api/generate", {"model": MODEL, "keep_alive": -1})
        year = int((await ask(sim.port, "GET", "/api/ps")).json()["models"][0]["expires_at"][:4])
        assert year > 2300


async def test_it_says_that_it_is_simulated_and_logs_what_it_was_sent() -> None:
    async with node().serve() as sim:
        answer = await ask(sim.port, "GET", "/api/tags", headers={"Authorization": "Bearer x"})
        assert answer.headers["x-simulated-ollama"] == "quick"
        assert {row["details"]["family"] for row in answer.json()["models"]} == {"simulated"}
        assert (b"Authorization", b"Bearer x") in sim.log[0].headers
        assert sim.connections_accepted == 1
        with pytest.raises(Refusal):
            parse_name("a b")


async def test_a_paced_stream_keeps_its_pace(autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.01  # for the sockets
    async with node(decode_tokens_s=50.0).serve() as sim:
        async with talk(sim.port, "POST", "/api/generate", generate(20)) as speaking:
            await speaking.rest()
        times = [at for at, _ in speaking.arrivals]
        assert 0.3 < times[-1] - times[0] < 0.8
        assert len(times) > 15


# -- HTTP


async def test_connections_are_kept_pipelined_expecting_and_old() -> None:
    body = json.dumps(generate(1)).encode()
    post = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n%s"
    async with node().serve() as sim:
        close = b"Connection: close\r\n"
        both = await raw_request(sim.port, post % (len(body), b"", body) + post % (len(body), close, body))
        assert both.count(b"200 OK") == 2
        expecting = await raw_request(sim.port, post % (len(body), b"Expect: 100-continue\r\n" + close, body))
        assert expecting.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK")
        old = await raw_request(sim.port, b"POST /api/generate HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert b"Transfer-Encoding" not in old
        assert json.loads(old.splitlines()[-1])["done"] is True
        chunks = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n"
        chunked = await raw_request(sim.port, chunks % (close, len(body), body))
        assert parse_answer(chunked).status == 200
        assert (await raw_request(sim.port, b"hello\r\n\r\n")).startswith(b"HTTP/1.1 400 Bad Request")
        long_list = await ask(sim.port, "POST", "/api/embed", {"model": "nomic-embed-text", "input": ["a"] * 3})
        assert long_list.headers["transfer-encoding"] == "chunked"
        with httpx.Client() as client:
            read = await trio.to_thread.run_sync(client.get, f"{sim.url}/api%2Fversion")
        assert read.json() == {"version": "0.33.0"}
        assert (await ask(sim.port, "POST", "/api/experimental/web_fetch", {})).status == 403


async def test_strange_hosts_origins_and_numbers_do_no_harm() -> None:
    async with node().serve() as sim:
        for host in ("[::1", "[fd00::1]:1", "8.8.8.8", "evil.example", "10.1.2.3"):
            status = (await ask(sim.port, "GET", "/api/version", headers={"Host": host})).status
            assert status == (200 if host in ("[fd00::1]:1", "10.1.2.3") else 403)
        for origin in ("http://[::1", "null"):
            assert (await ask(sim.port, "GET", "/api/version", headers={"Origin": origin})).status == 403
        for options in ({"num_predict": 0}, {"num_ctx": -7, "num_predict": 1}, {"seed": 10**200, "num_predict": 1}, {"stop": [5]}):
            answer = await ask(sim.port, "POST", "/api/generate", generate(1, options=options))
            assert answer.lines()[-1]["done"] is True
        await ask(sim.port, "POST", "/api/generate", {"model": MODEL})
        await ask(sim.port, "DELETE", "/api/delete", {"model": MODEL})
        assert (await ask(sim.port, "GET", "/api/ps")).json()["models"][0]["name"] == MODEL  # deleted, and still loaded
        assert (await ask(sim.port, "GET", "//v1/models/a%0d%0aX:b")).headers["location"] == "/v1/models/a%0D%0AX%3Ab"


async def test_a_stopped_node_closes_everything_and_starts_again_empty() -> None:
    sim = node(decode_tokens_s=50.0)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(sim.run, "127.0.0.1", 0)
        async with talk(port, "POST", "/api/generate", generate(500)) as speaking:
            await begun(speaking)
            await sim.stop()
            assert not (await speaking.rest()).whole
        with pytest.raises(OSError, match="connect"):
            await trio.open_tcp_stream("127.0.0.1", port)
        assert await nursery.start(sim.run, "127.0.0.1", port) == port
        assert (await ask(port, "GET", "/api/ps")).json() == {"models": []}
        assert (await ask(port, "POST", "/api/generate", generate(2))).lines()[-1]["done"] is True
        sim.kill()


async def test_two_nodes_cannot_have_one_port() -> None:
    async with node().serve() as sim:
        with pytest.raises(OSError, match="in use"):
            node().bind("127.0.0.1", sim.port)


# -- models and the command line


def test_names_are_read_as_ollama_reads_them() -> None:
    assert display_name(" Llama3 ") == "Llama3:latest"
    assert display_name("registry.ollama.ai/library/x:y") == "x:y"
    assert display_name("https://hf.co/user/repo:Q4") == "hf.co/user/repo:Q4"
    assert display_name("me/x") == "me/x:latest"
    assert display_name("x:8b:local") == "x:8b"
    for name, status in (("x:cloud", 403), ("x:8b-cloud", 403), ("x:cloud:local", 400), ("x@sha256:0", 400), ("x:", 400), ("a.b/x", 400)):
        with pytest.raises(Refusal) as refusal:
            display_name(name)
        assert refusal.value.status == status


def test_guessed_models_have_sizes_speeds_and_kinds() -> None:
    small, large = guessed_model("some:1b"), guessed_model("some:70b")
    assert small.size_bytes < large.size_bytes
    assert small.decode_tokens_s > large.decode_tokens_s
    assert guessed_model("tiny:350m").parameter_size == "0.35B"
    assert guessed_model("some-embedder").capabilities == ("embedding",)
    assert guessed_model("x-vision").can("vision")
    assert guessed_model("plain").tokens("four") == 3
    assert isinstance(small, SimulatedModel)
    assert len({model.name for model in recorded_models()}) == len(recorded_models())


def test_the_demo_is_three_nodes_of_different_speed_with_models_in_common() -> None:
    nodes = demo_nodes()
    assert len({spec.knobs.speed for spec in nodes}) == len(nodes) == 3
    assert set.intersection(*({model.name for model in spec.models} for spec in nodes)) == {MODEL}
    loads = [spec.knobs.node_timing().load_s(spec.knobs.model_timing(spec.models[0])) for spec in nodes]
    assert loads == sorted(loads)
    assert SimulatedOllama.from_spec(nodes[0]).name == "fast"


def test_the_program_prints_its_url_and_that_it_is_simulated() -> None:
    command = [sys.executable, "-m", "agent.simulated", "--demo", "fast"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert "simulated Ollama 'fast'" in line
        url = line.split()[-1]
        assert httpx.get(f"{url}/api/version").json() == {"version": "0.33.0"}
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 0
    assert errors == ""


def test_the_program_refuses_what_it_cannot_do_in_one_sentence() -> None:
    wrong = CliRunner().invoke(main, ["--model", "a b"])
    assert wrong.exit_code == 2
    assert "invalid model name; give a name such as llama3.2:3b" in wrong.output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = CliRunner().invoke(main, ["--port", str(taken.getsockname()[1]), "--models", "recorded", "--model", "x"])
    assert wrong.exit_code == 1
    assert "cannot listen on" in wrong.output
