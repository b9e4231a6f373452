"""Each fault over a real socket: what the client sees of it, and that the next request is served."""

import json
from typing import Any

import pytest
import trio

from agent.simulated import Fault, SimulatedOllama
from agent.simulated.faults import BUSY, Faults
from tests.fleet.rawhttp import Answer, ask, dechunk, parse_answer, raw_request, request_bytes, talk

TINY = {"load_s": 0.0, "decode_tokens_s": 2000.0, "prefill_tokens_s": 100_000.0}
CHAT = {"model": "llama3.2:3b", "messages": [{"role": "user", "content": "hello"}], "options": {"num_predict": 8}}
WHOLE = {**CHAT, "stream": False}
V1 = {"model": "llama3.2:3b", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def node(**settings: Any) -> SimulatedOllama:
    return SimulatedOllama(models=["llama3.2:3b"], **{**TINY, **settings})


async def chat(sim: SimulatedOllama, body: dict[str, Any] = CHAT, path: str = "/api/chat") -> Answer:
    return await ask(sim.port, "POST", path, body)


async def raw_chat(sim: SimulatedOllama, body: dict[str, Any] = CHAT, path: str = "/api/chat") -> bytes:
    return await raw_request(sim.port, request_bytes("POST", path, json.dumps(body).encode()))


def words(lines: list[dict[str, Any]]) -> int:
    return sum(bool(line.get("message", {}).get("content")) for line in lines)


async def served(sim: SimulatedOllama) -> None:
    sim.faults.clear()
    answer = await chat(sim)
    assert answer.whole
    assert answer.lines()[-1]["done"] is True


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("kind", ["close", "reset"])
async def test_the_connection_ends_after_so_many_tokens(kind: Any, tokens: int) -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind=kind, after_tokens=tokens))
        data = await raw_chat(sim)
        if tokens == 0:
            assert data == b""
        elif kind == "close":  # a reset may overtake the bytes before it
            assert words(parse_answer(data).lines()) == tokens
            assert not parse_answer(data).whole
        assert await raw_chat(sim, WHOLE) == b""
        assert {log.fault for log in sim.log} == {kind}
        await served(sim)


async def test_a_cut_ends_inside_a_chunk() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="cut", after_tokens=3))
        data = await raw_chat(sim)
        lines = dechunk(data.partition(b"\r\n\r\n")[2]).split(b"\n")
        assert [json.loads(line)["done"] for line in lines[:3]] == [False] * 3
        with pytest.raises(json.JSONDecodeError):
            json.loads(lines[3])
        answer = parse_answer(await raw_chat(sim, WHOLE))
        assert answer.status == 200
        assert not answer.whole
        await served(sim)


async def test_a_clean_end_without_done() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="end", after_tokens=3))
        answer = await chat(sim)
        assert answer.whole
        assert [line["done"] for line in answer.lines()] == [False] * 3
        whole = await chat(sim, WHOLE)
        assert whole.json()["done"] is False
        v1 = await chat(sim, {**V1, "stream": True}, "/v1/chat/completions")
        assert v1.whole
        assert b"[DONE]" not in v1.body
        v1 = await chat(sim, V1, "/v1/chat/completions")
        assert v1.json()["choices"][0]["finish_reason"] is None
        await served(sim)


async def test_a_clean_end_before_the_first_token_is_an_empty_or_a_blank_answer() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="end"))
        answer = await chat(sim)
        assert (answer.status, answer.body, answer.whole) == (200, b"", True)
        assert answer.headers["content-type"] == "application/x-ndjson"
        blank = (await chat(sim, WHOLE)).json()
        assert blank == {"model": "", "created_at": "0001-01-01T00:00:00Z", "message": {"role": "", "content": ""}, "done": False}
        sim.faults.clear()
        sim.faults.add(Fault(kind="empty"))
        assert (await chat(sim)).body == b""
        sim.faults.clear()
        sim.faults.add(Fault(kind="blank"))
        assert (await chat(sim, WHOLE)).json()["model"] == ""
        await served(sim)


async def test_an_error_after_the_first_token_is_a_line_before_it_a_status() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="error", after_tokens=2, text="it broke"))
        answer = await chat(sim)
        assert answer.status == 200
        assert answer.whole
        assert answer.lines()[-1] == {"error": "it broke"}
        assert len(answer.lines()) == 3
        assert (await chat(sim, WHOLE)).status == 500
        v1 = await chat(sim, {**V1, "stream": True}, "/v1/chat/completions")
        assert v1.body.rstrip().split(b"\n\n")[-1].count(b'"model":""') == 1  # the text is lost
        text = await chat(sim, {"model": "llama3.2:3b", "prompt": "x", "max_tokens": 5, "stream": True}, "/v1/completions")
        assert b'"model":""' in text.body
        sim.faults.clear()
        sim.faults.add(Fault(kind="error", text="it broke"))
        answer = await chat(sim)
        assert (answer.status, answer.json()) == (500, {"error": "it broke"})
        await served(sim)


async def test_a_stall_keeps_the_slot_for_its_time_and_then_goes_on() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="stall", after_tokens=2, seconds=0.3, times=1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chat, sim)
            async with talk(sim.port, "POST", "/api/chat", CHAT) as other:
                answer = await other.rest()
                assert answer.lines()[-1]["done"] is True
        first, second = sim.log
        assert first.timing is not None
        assert second.timing is not None
        assert first.timing.finished - first.timing.first >= 0.3
        assert second.timing.started >= first.timing.finished  # it waited for the slot


async def test_an_endless_stall_ends_with_the_client_and_frees_the_slot() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="stall", after_tokens=2, times=1))
        async with talk(sim.port, "POST", "/api/chat", CHAT) as stalled:
            while stalled.received.count(b'"done":false') < 2:
                await stalled.read_some()
        await served(sim)
        assert sim.log[0].cancelled_at is not None
        assert sim.log[0].tokens_sent == 2
        assert sim.log[0].tokens_after_cancel == 0


async def test_silence_until_the_client_leaves() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="silent"))
        with trio.move_on_after(0.1) as scope:
            await raw_chat(sim)
        assert scope.cancelled_caught
        await served(sim)


async def test_a_drip_splits_characters_and_lines_over_segments() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="drip", piece_bytes=7, seconds=0.0))
        async with talk(sim.port, "POST", "/api/chat", CHAT) as slow:
            answer = await slow.rest()
        assert answer.lines()[-1]["done"] is True
        assert len(slow.arrivals) > 20


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        (Fault(kind="status"), 503, BUSY),
        (Fault(kind="status", status=500, text="boom"), 500, "boom"),
        (Fault(kind="status", status=429), 429, "failed on purpose"),
    ],
)
async def test_a_status_in_the_manner_of_the_route(fault: Fault, status: int, text: str) -> None:
    async with node().serve() as sim:
        sim.faults.add(fault)
        answer = await chat(sim)
        assert (answer.status, answer.json()) == (status, {"error": text})
        answer = await chat(sim, V1, "/v1/chat/completions")
        assert answer.json()["error"]["message"] == text
        await served(sim)


async def test_a_status_with_any_body_and_type() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="status", status=502, body="<html>", content_type="text/html"))
        answer = await chat(sim)
        assert (answer.status, answer.body, answer.headers["content-type"]) == (502, b"<html>", "text/html")
        sim.faults.clear()
        sim.faults.add(Fault(kind="html"))
        assert (await chat(sim)).headers["content-type"] == "text/html"
        sim.faults.clear()
        sim.faults.add(Fault(kind="garbage"))
        assert not (await raw_chat(sim)).startswith(b"HTTP/")


async def test_a_malformed_and_a_huge_line_in_mid_stream() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="malformed", after_tokens=2))
        lines = (await chat(sim)).body.splitlines()
        with pytest.raises(json.JSONDecodeError):
            json.loads(lines[2])
        assert json.loads(lines[-1])["done"] is True
        with pytest.raises(json.JSONDecodeError):
            (await chat(sim, WHOLE)).json()
        sim.faults.clear()
        sim.faults.add(Fault(kind="huge", after_tokens=2, size_bytes=1_000_000))
        assert max(map(len, (await chat(sim)).body.splitlines())) > 1_000_000
        await served(sim)


async def test_a_refusing_node_closes_its_port_and_opens_the_same_one_again() -> None:
    async with node().serve() as sim:
        port = sim.port
        sim.faults.add(Fault(kind="refuse"))
        with pytest.raises(OSError, match="connect"):
            await raw_chat(sim)
        sim.faults.clear()
        assert sim.port == port
        await served(sim)


async def test_a_kept_connection_that_is_closed_between_requests() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="hang-up"))
        body = json.dumps(WHOLE).encode()
        request = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        data = await raw_request(sim.port, request)
        assert parse_answer(data).whole
        assert b"Connection" not in data
        sim.faults.clear()
        twice = await raw_request(sim.port, request + request.replace(b"Host", b"Connection: close\r\nHost", 1))
        assert twice.count(b"HTTP/1.1 200 OK") == 2


async def test_a_failing_load_fails_only_who_started_it() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="load", times=1))
        answer = await chat(sim)
        assert answer.status == 500
        assert "llama-server process has terminated" in answer.json()["error"]
        assert answer.headers["content-length"]
        assert (await ask(sim.port, "GET", "/api/ps")).json() == {"models": []}
        await served(sim)


async def test_lists_may_stall_or_fail_too() -> None:
    async with node().serve() as sim:
        sim.faults.add(Fault(kind="stall", route="/api/ps", seconds=0.2))
        began = trio.current_time()
        assert (await ask(sim.port, "GET", "/api/ps")).status == 200
        assert trio.current_time() - began >= 0.2
        sim.faults.add(Fault(kind="status", status=500, route="*"))
        assert (await ask(sim.port, "GET", "/api/tags")).status == 500


def test_faults_are_chosen_by_route_model_number_chance_and_count() -> None:
    def hits(fault: Fault, asks: list[tuple[str, str | None]], seed: int = 0) -> list[bool]:
        faults = Faults(seed)
        faults.add(Fault(kind="refuse"))
        faults.add(fault)
        return [faults.pick(route, model) is fault for route, model in asks]

    chats: list[tuple[str, str | None]] = [("/api/chat", "a")] * 4
    assert hits(Fault(kind="end"), [("/api/chat", "a"), ("/api/tags", None), ("/v1/embeddings", "b")]) == [True, False, True]
    assert hits(Fault(kind="end", route="*"), [("/api/tags", None)]) == [True]
    assert hits(Fault(kind="end", route="/api/ps"), [("/api/tags", None), ("/api/ps", None)]) == [False, True]
    assert hits(Fault(kind="end", model="b"), [("/api/chat", "a"), ("/api/chat", "b")]) == [False, True]
    assert hits(Fault(kind="end", nth=2), chats) == [False, True, False, False]
    assert hits(Fault(kind="end", times=2), chats) == [True, True, False, False]
    some = hits(Fault(kind="end", probability=0.5), chats * 50, seed=7)
    assert 60 < sum(some) < 140
    assert some == hits(Fault(kind="end", probability=0.5), chats * 50, seed=7)
