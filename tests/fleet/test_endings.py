"""An answer that the node did not end properly never ends properly for a client: what the wire shows, and what each client makes of it."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import ollama
import openai
import pytest
import trio

from tests.fleet.edges import Edge
from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, last_line, line, open_fleet, openai_chunk, serving, sse
from tests.fleet.programs import needed
from tests.fleet.rawhttp import Caller, Hangup, Reset

pytestmark = pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)

ENDINGS = ["cut", "reset", "clean end", "cut inside a line"]
OLLAMA_RAISES = (ollama.ResponseError, httpx.RemoteProtocolError, json.JSONDecodeError)
OPENAI_RAISES = (openai.APIError, json.JSONDecodeError)
"""What the clients raise; the last where half a line came, which they read before they hear why."""
NDJSON, SSE = "application/x-ndjson", "text/event-stream"


async def break_off(caller: Caller, ending: str) -> None:
    """End a chunked answer as `ending` says."""
    if ending == "clean end":
        await caller.end_chunks()
    elif ending == "reset":
        await trio.sleep(0.05)  # or the reset would overtake the bytes
        raise Reset
    else:
        raise Hangup


def breaking(ending: str) -> Callable[[Caller], Awaitable[None]]:
    """A node that breaks off every stream after two pieces, and every whole answer in its middle."""

    async def script(caller: Caller) -> None:
        if not json.loads(caller.body).get("stream", caller.target.startswith("/api")):
            await caller.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n" + line("half")[:40])
            raise Hangup
        openai_manner = caller.target.startswith("/v1")
        pieces = [sse(openai_chunk("one")), sse(openai_chunk("two"))] if openai_manner else [line("one"), line("two")]
        if ending == "cut inside a line":
            pieces[-1] = pieces[-1][:25]
        await caller.begin_chunks(SSE if openai_manner else NDJSON)
        for piece in pieces:
            await caller.chunk(piece)
            await trio.sleep(0.01)
        await break_off(caller, ending)

    return script


@pytest.fixture(params=ENDINGS)
async def broken(request: pytest.FixtureRequest) -> AsyncIterator[Fleet]:
    """A fleet whose only node breaks off."""
    node = ScriptedNode(breaking(request.param))
    async with serving(node), open_fleet([node.port]) as fleet:
        yield fleet


# ---------------------------------------------------------------- on the wire


@pytest.mark.through_nginx(Edge.GATEWAYS, always=True)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_ndjson_gets_an_error_line_and_no_last_chunk(broken: Fleet, path: str) -> None:
    answer = await broken.ask("POST", path, chat(prompt="Hello"))
    assert answer.status == 200
    assert not answer.whole
    assert answer.body.startswith(line("one"))
    last = json.loads(answer.body.splitlines()[-1])
    assert list(last) == ["error"]
    assert last["error"]
    await broken.wait_settled()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_sse_gets_an_error_event_and_no_last_chunk(broken: Fleet, path: str) -> None:
    answer = await broken.ask("POST", path, chat(prompt="Hello"))
    assert answer.status == 200
    assert not answer.whole
    assert answer.body.startswith(sse(openai_chunk("one")))
    event = answer.body.rstrip(b"\n").rpartition(b"\n")[2]
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"]
    assert b"[DONE]" not in answer.body
    await broken.wait_settled()


async def test_a_cut_answer_that_was_not_streamed_is_tried_elsewhere() -> None:
    sick, well = ScriptedNode(breaking("cut")), ScriptedNode(answer_well)
    async with serving(sick, well), open_fleet([sick.port, well.port], LOAD_BALANCER_MODE="round-robin") as fleet:
        for _ in range(6):
            answer = await fleet.chat(stream=False)
            assert (answer.status, answer.json()["message"]["content"]) == (200, "one")
        await fleet.wait_settled()
    assert sick.seen, "the sick node was never tried"


async def test_a_cut_answer_that_nobody_else_can_give_is_502(broken: Fleet) -> None:
    answer = await broken.chat(stream=False)
    assert answer.status == 502
    assert answer.json()["error"]


# ---------------------------------------------------------------- what clients make of it


async def test_curl_exits_18(broken: Fleet) -> None:
    body = json.dumps(chat())
    done = await trio.run_process(
        [needed("curl", "curl"), "-sN", f"{broken.url}/api/chat", "-d", body], capture_stdout=True, check=False, stdin=b""
    )
    assert done.returncode == 18
    assert b'{"error":' in done.stdout


async def test_ollama_python_raises(broken: Fleet) -> None:
    def ask() -> list[Any]:
        return list(ollama.Client(broken.url).chat("m", [{"role": "user", "content": "Hello"}], stream=True))

    with pytest.raises(OLLAMA_RAISES):
        await trio.to_thread.run_sync(ask)


async def test_ollama_python_async_raises(broken: Fleet) -> None:
    stream = await ollama.AsyncClient(broken.url).chat("m", [{"role": "user", "content": "Hello"}], stream=True)
    with pytest.raises(OLLAMA_RAISES):
        async for _ in stream:
            pass


async def test_openai_python_raises(broken: Fleet) -> None:
    def ask() -> list[Any]:
        client = openai.OpenAI(base_url=f"{broken.url}/v1", api_key="none", max_retries=0)
        return list(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello"}], stream=True))

    with pytest.raises(OPENAI_RAISES):
        await trio.to_thread.run_sync(ask)


async def test_openai_python_async_raises(broken: Fleet) -> None:
    client = openai.AsyncOpenAI(base_url=f"{broken.url}/v1", api_key="none", max_retries=0)
    async with client:
        stream = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello"}], stream=True)
        with pytest.raises(OPENAI_RAISES):
            async for _ in stream:
                pass


# ---------------------------------------------------------------- and what is whole stays whole


async def test_text_that_looks_like_an_end_is_none() -> None:
    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line('{"done":true}\n{"error":"x"}\ndata: [DONE]\n'))
        await caller.end_chunks()

    node = ScriptedNode(script)
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await fleet.chat()
    assert not answer.whole
    assert "error" in json.loads(answer.body.splitlines()[-1])


async def test_an_error_line_of_the_node_itself_is_the_end() -> None:
    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        await caller.chunk(b'{"error":"an error was encountered while running the model"}\n')
        await caller.end_chunks()

    node = ScriptedNode(script)
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await fleet.chat()
    assert answer.whole
    assert answer.body == line("one") + b'{"error":"an error was encountered while running the model"}\n'


async def test_one_chunk_or_many_make_no_difference() -> None:
    whole = line("one") + line("tw\u00f6") + last_line()

    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        for at in range(0, len(whole), 7):
            await caller.chunk(whole[at : at + 7])
        await caller.end_chunks()

    node = ScriptedNode(script)
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await fleet.chat()
    assert (answer.whole, answer.body) == (True, whole)
