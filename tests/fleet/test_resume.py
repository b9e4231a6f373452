"""A stream that goes on from another node (`ROUTER_RESUME=text`): what the client gets, whatever happens to which node and where."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import trio

from agent.simulated.faults import Fault
from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, ScriptedNode, chat, open_fleet, serving, sse
from tests.fleet.rawhttp import Answer, Caller, Hangup, Reset, ask

MODEL = "llama3.2:3b"
TEXT = 'Die gr\u00f6\u00dfte "Zahl" <ist> \U0001f600 sieben.\nUnd \u6570 dann noch mehr, '
TOKENS = [TEXT[at : at + 3] for at in range(0, len(TEXT), 3)]


def prefix_of(caller: Caller) -> str:
    """What of the text the request has already."""
    body = json.loads(caller.body)
    if "prompt" in body:
        return str(body["prompt"].removeprefix("Sag es: "))
    last = body["messages"][-1]
    return str(last["content"]) if last["role"] == "assistant" else ""


def limit_of(caller: Caller) -> int | None:
    body = json.loads(caller.body)
    limit: int | None = body.get("max_tokens", body.get("options", {}).get("num_predict"))
    return limit


def pieces_of(caller: Caller) -> list[bytes]:
    """The lines (events) of the answer that a node gives: the rest of the text, and its counts."""
    sent = prefix_of(caller)
    assert TEXT.startswith(sent), sent
    rest = TEXT[len(sent) :]
    tokens = [rest[at : at + 3] for at in range(0, len(rest), 3)]
    limit = limit_of(caller)
    tokens = tokens if limit is None else tokens[:limit]
    asked = -(-len(sent) // 3)
    if caller.target.startswith("/v1"):
        base: dict[str, Any] = {"id": f"chatcmpl-{asked}", "object": "chat.completion.chunk", "created": 100 + asked, "model": "m"}
        deltas: list[dict[str, Any]] = [{"content": token} for token in tokens or [""]]
        deltas[0] = {"role": "assistant", **deltas[0]}
        chunks = [{**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
        chunks.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 10 + asked, "completion_tokens": len(tokens), "total_tokens": 10 + asked + len(tokens)}
        chunks.append({**base, "choices": [], "usage": usage})
        written = [json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() for chunk in chunks]
        return [*map(sse, written), sse(b"[DONE]")]
    lines = []
    for token in [*tokens, None]:
        said = (
            {"response": token or ""} if "prompt" in json.loads(caller.body) else {"message": {"role": "assistant", "content": token or ""}}
        )
        line: dict[str, Any] = {"model": "m", "created_at": "2026-01-01T00:00:00Z", **said, "done": token is None}
        if token is None:
            line |= {
                "done_reason": "stop",
                "total_duration": 5,
                "prompt_eval_count": 10 + asked,
                "eval_count": len(tokens),
                "eval_duration": 4,
            }
        lines.append(json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    return lines


async def well(caller: Caller) -> None:
    await caller.begin_chunks("text/event-stream" if caller.target.startswith("/v1") else "application/x-ndjson")
    for piece in pieces_of(caller):
        await caller.chunk(piece)
    await caller.end_chunks()


def dying(at: int, how: str = "cut", *, step: int = 0) -> Callable[[Caller], Awaitable[None]]:
    """A node that ends its answer after `at` pieces, and `step` bytes of the next."""

    async def script(caller: Caller) -> None:
        await caller.begin_chunks("text/event-stream" if caller.target.startswith("/v1") else "application/x-ndjson")
        pieces = pieces_of(caller)
        for piece in pieces[:at]:
            await caller.chunk(piece)
        if step:
            await caller.chunk(pieces[at][:step])
        if how == "error":
            await caller.chunk(b'{"error":"an error was encountered while running the model: unexpected EOF"}\n')
        if how in ("error", "end"):
            await caller.end_chunks()
        elif how == "reset":
            await trio.sleep(0.02)
            raise Reset
        else:
            raise Hangup

    return script


class Pair:
    """Two nodes, of which the first that is asked breaks off."""

    def __init__(self) -> None:
        self.first: Callable[[Caller], Awaitable[None]] = well
        self.second: Callable[[Caller], Awaitable[None]] = well
        self.asked: list[Caller] = []
        self.fleet: Fleet

    async def script(self, caller: Caller) -> None:
        self.asked.append(caller)
        await (self.first if len(self.asked) == 1 else self.second)(caller)

    async def ask(self, path: str = "/api/chat", **more: Any) -> Answer:
        self.asked.clear()
        body: dict[str, Any] = {"model": "m", "stream": True}
        body |= {"prompt": "Sag es: ", "raw": True} if path == "/api/generate" else {"messages": [{"role": "user", "content": "Sag es"}]}
        if path.startswith("/v1"):
            body["stream_options"] = {"include_usage": True}
        answer = await self.fleet.ask("POST", path, {**body, **more})
        await self.fleet.wait_settled()
        return answer


@asynccontextmanager
async def a_pair(**settings: str) -> AsyncIterator[Pair]:
    pair = Pair()
    one, two = ScriptedNode(pair.script), ScriptedNode(pair.script)
    async with serving(one, two), open_fleet([one.port, two.port], **{"ROUTER_RESUME": "text", **settings}) as pair.fleet:
        yield pair


def said(answer: Answer, path: str) -> tuple[str, dict[str, Any]]:
    """The text of a stream, and its last counts."""
    if path.startswith("/v1"):
        events = [event for event in answer.body.decode().split("\n\n") if event]
        assert events.pop() == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {("chatcmpl-0", 100)}
        assert ["role" in choice["delta"] for chunk in chunks for choice in chunk["choices"]].count(True) == 1
        return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]), chunks[-1]["usage"]
    lines = answer.lines()
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    return "".join(line.get("response", line.get("message", {}).get("content")) for line in lines), lines[-1]


PATHS = ["/api/chat", "/api/generate", "/v1/chat/completions"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", ["cut", "reset", "end"])
async def test_killed_at_every_border_of_a_chunk_the_text_is_whole(path: str, how: str) -> None:
    async with a_pair() as pair:
        for at in range(1, len(TOKENS) + 1, 1 if how == "cut" else 5):
            pair.first = dying(at, how)
            answer = await pair.ask(path)
            text, counts = said(answer, path)
            assert (answer.whole, text, len(pair.asked)) == (True, TEXT, 2)
            told = (counts.get("eval_count", counts.get("completion_tokens")), counts.get("prompt_eval_count", counts.get("prompt_tokens")))
            assert told == (len(TOKENS), 10)
            assert prefix_of(pair.asked[1]) == "".join(TOKENS[:at])
            record = pair.fleet.coordinator.records.newest[-1]
            assert [attempt.outcome for attempt in record.attempts] == ["died", "success"]
            assert "came from another node" in record.message
            assert record.usage is not None
            assert (record.usage.output_tokens, record.usage.prompt_tokens) == told


@pytest.mark.parametrize("path", PATHS)
async def test_killed_within_a_line_or_a_character_too(path: str) -> None:
    async with a_pair() as pair:
        for step in range(1, 130, 7):
            pair.first = dying(7, step=step)
            text, _ = said(await pair.ask(path), path)
            assert text == TEXT


async def test_a_node_that_tells_its_own_failure_is_followed_by_another() -> None:
    async with a_pair() as pair:
        pair.first = dying(4, "error")
        answer = await pair.ask()
        assert said(answer, "/api/chat")[0] == TEXT
        assert b"error" not in answer.body


async def test_what_the_client_had_asked_for_stays_but_for_the_limit() -> None:
    async with a_pair() as pair:
        pair.first = dying(4)
        await pair.ask(options={"num_predict": 9, "seed": 1})
        body = json.loads(pair.asked[1].body)
        assert body["options"] == {"num_predict": 5, "seed": 1}
        assert body["messages"] == [{"role": "user", "content": "Sag es"}, {"role": "assistant", "content": "".join(TOKENS[:4])}]
        await pair.ask("/v1/chat/completions", max_tokens=9)
        assert json.loads(pair.asked[1].body)["max_tokens"] == 5
        answer = await pair.ask(options={"num_predict": 4})
        assert (answer.whole, len(pair.asked)) == (False, 1)


@pytest.mark.parametrize("second", [dying(0), dying(3), dying(3, step=9), dying(2, "error")])
@pytest.mark.parametrize("path", PATHS)
async def test_when_the_second_node_dies_too_the_end_is_honest(path: str, second: Callable[[Caller], Awaitable[None]]) -> None:
    async with a_pair() as pair:
        pair.first, pair.second = dying(5), second
        answer = await pair.ask(path)
        assert len(pair.asked) == 2
        last = [line for line in answer.body.split(b"\n") if line][-1]
        assert b'"error"' in last
        assert b"[DONE]" not in answer.body
        assert b'"done":true' not in answer.body
        told = b"unexpected EOF" in last
        assert answer.whole is told  # who tells his failure himself ends properly


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"format": "json"},
        {"logprobs": True},
        {"think": True},
        {"unheard_of": 1},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
    ],
)
async def test_what_cannot_be_resumed_faithfully_is_not(more: dict[str, Any]) -> None:
    async with a_pair() as pair:
        pair.first = dying(5)
        answer = await pair.ask(**more)
        assert (answer.whole, len(pair.asked)) == (False, 1)
        assert list(answer.lines()[-1]) == ["error"]


async def test_generate_without_raw_and_other_protocols_are_not() -> None:
    async with a_pair() as pair:
        pair.first = dying(5)
        answer = await pair.ask("/api/generate", raw=False)
        assert (answer.whole, len(pair.asked)) == (False, 1)


async def test_without_the_setting_or_another_node_the_end_is_as_before() -> None:
    async with a_pair(ROUTER_RESUME="off") as pair:
        pair.first = dying(5)
        plain = await pair.ask()
        assert (plain.whole, len(pair.asked)) == (False, 1)
    node = ScriptedNode(dying(5))
    async with serving(node), open_fleet([node.port], ROUTER_RESUME="text") as fleet:
        answer = await fleet.ask("POST", "/api/chat", chat(content="Sag es"))
        assert (answer.whole, answer.body) == (False, plain.body)
        await fleet.wait_settled()


async def test_openais_own_client_sees_one_answer() -> None:
    async with a_pair() as pair:
        pair.first = dying(6)
        assert await trio.to_thread.run_sync(_read, pair.fleet.url) == TEXT
        assert len(pair.asked) == 2


def _read(url: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Sag es"}], stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_simulated_model_killed_after_any_number_of_tokens_says_its_whole_text(path: str) -> None:
    one, two = (SimulatedOllama(name=name, models=[MODEL], load_s=0.01, decode_tokens_s=2000.0, prefill_tokens_s=50_000.0) for name in "ab")
    vars(two.faults).update(vars(one.faults))  # who is asked first dies
    body: dict[str, Any] = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Tell me all"}]}
    body |= {"max_tokens": 51} if path.startswith("/v1") else {"options": {"num_predict": 51}}
    async with one.serve(), two.serve(), open_fleet([one.port, two.port], ROUTER_RESUME="text") as fleet:
        whole = text_of(await ask(one.port, "POST", path, body))
        assert len(whole.split()) == 51
        for tokens in range(1, 51):
            one.faults.add(Fault(kind="close", after_tokens=tokens, times=1))
            assert text_of(await fleet.ask("POST", path, body)) == whole
            await fleet.wait_settled()
            assert len(fleet.coordinator.records.newest[-1].attempts) == 2


def text_of(answer: Answer) -> str:
    """What a stream says."""
    assert answer.whole
    parts = [json.loads(line.removeprefix("data: ")) for line in answer.body.decode().splitlines() if line not in ("", "data: [DONE]")]
    deltas = [part["choices"][0]["delta"] if part.get("choices") else part.get("message", {}) for part in parts]
    return "".join(delta.get("content", "") for delta in deltas)
