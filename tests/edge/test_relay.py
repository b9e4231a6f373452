"""The relay held against every recorded answer of a real Ollama, and against answers cut at every place."""

import json
import re

import pytest

from core.events import Failure, Protocol, Route, Usage
from edge.relay import ERROR_MAX_BYTES, NO_END, Failed, Good, in_band_error, open_answer, pour
from edge.wire import UpstreamCut, UpstreamGarbled
from tests.edge.answers import (
    HOLD_BYTES,
    JSON,
    NDJSON,
    ROUTES,
    SSE,
    SSE_ENDS,
    Client,
    Node,
    asker,
    node_of,
    relayed,
    response,
)
from tests.fleet.rawhttp import Answer
from tests.fleet.recorded import Exchange, is_stream, load

BLANK = (b"0001-01-01T00:00:00Z", b'"created":-62135596800', b'"created_at":-62135596800', b'"model":"","content":null')
CUT = UpstreamCut("the node went away")


def inference() -> list[Exchange]:
    found = []
    for tape in load():
        if tape.method == "POST" and tape.target in ROUTES and tape.end not in ("reset", "left"):
            found.append(tape)
    assert len(found) > 1000
    return found


TAPES = inference()
BY_CASE = {tape.case: tape for tape in TAPES}


def ends_properly(answer: Answer) -> bool:
    lines = [line for line in answer.body.split(b"\n") if line.strip()]
    if not answer.whole or not lines:
        return False
    if answer.headers["content-type"].startswith("text/event-stream"):
        return any(SSE_ENDS.match(line) for line in lines[-4:])
    last = json.loads(lines[-1])
    return last.get("done") is True or "error" in last


async def wrong(tape: Exchange, size: int) -> str:
    """What a client would miss or be misled by; "" when nothing."""
    recorded = tape.answer
    client, opened, poured = await relayed(node_of(tape, size), ROUTES[tape.target])
    if recorded.status >= 400:
        kept = opened.kept if isinstance(opened, Failed) else None
        same = kept is not None and (kept.head.status, kept.framed()) == (recorded.status, recorded.body)
        return "" if same and isinstance(opened, Failed) and opened.failure is Failure.ANSWERED else f"an error did not stay: {opened}"
    if not recorded.body or any(mark in recorded.body for mark in BLANK):
        hidden = isinstance(opened, Failed) and opened.failure in (Failure.EMPTY, Failure.BLANK) and opened.kept is None
        return "" if hidden else f"a blank answer was taken for a good one: {opened}"
    if isinstance(opened, Failed):
        kept_body = opened.kept.body if opened.kept else b""
        return "" if opened.failure is Failure.INCOMPLETE and kept_body == recorded.body else f"failed: {opened}"
    assert poured is not None
    got = client.answer
    if is_stream(recorded) and not ends_properly(recorded):
        told = got.body.startswith(recorded.body) and b"error" in got.body[len(recorded.body) :] and not got.whole and client.must_close
        blamed = poured.node_failure is not None
        return (
            ""
            if told and not poured.clean and blamed is not tape.case.startswith("repeat/")
            else f"the missing end was not told: {got.body[-100:]!r}"
        )
    if got.body != recorded.body or not got.whole or client.must_close:
        return f"body {got.body[-100:]!r} instead of {recorded.body[-100:]!r}"
    clean = not (is_stream(recorded) and b'"error"' in recorded.body.splitlines()[-1])
    return "" if poured.clean is clean else f"clean is {poured.clean}: {poured}"


@pytest.mark.parametrize("size", [1 << 20, 65536, 97])
async def test_every_recorded_answer_passes_as_it_came_or_is_told_to_be_broken(size: int) -> None:
    found = {tape.case: why for tape in TAPES if (why := await wrong(tape, size))}
    assert not found


async def test_only_broken_recordings_are_judged_incomplete() -> None:
    cases = set()
    for tape in TAPES:
        opened = await open_answer(node_of(tape, 1 << 20), route=ROUTES[tape.target], stream=False, hold_bytes=HOLD_BYTES)  # type: ignore[arg-type]
        if isinstance(opened, Failed) and opened.failure is Failure.INCOMPLETE:
            cases.add((tape.case.split("#")[0], opened.repeat_guard))
    routes = ("chat", "generate", "messages", "responses", "v1chat", "v1completions")
    assert {(case.split("-")[0], guard) for case, guard in cases} == {
        ("fail/close5", False),
        ("fail/err5", False),
        *((f"repeat/{r}", True) for r in routes if r != "chat"),
    }
    assert ("repeat/generate-nostream", True) in cases


# ---------------------------------------------------------------- cuts

GOOD_STREAMS = {
    Route.CHAT: "fail/close5-chat-stream#b",
    Route.GENERATE: "generate/stream#a",
    Route.V1_CHAT: "usage/v1chat-stream#a",
    Route.V1_COMPLETIONS: "usage/v1completions-stream#a",
    Route.V1_RESPONSES: "tools/responses-coder-texttool-stream#a",
    Route.V1_MESSAGES: "tools/messages-coder-texttool-stream#a",
}


def told_error(route: Route, rest: bytes) -> str:
    """The error that ends a stream, read as a client of that route reads it."""
    line = [line for line in rest.split(b"\n") if line][-1]
    if route.protocol is Protocol.NATIVE:
        return str(json.loads(line)["error"])
    value = json.loads(line.removeprefix(b"data: "))
    if route.protocol is Protocol.RESPONSES:
        assert b"event: response.failed\n" in rest
        assert value["type"] == "response.failed"
        return str(value["response"]["error"]["message"])
    if route.protocol is Protocol.ANTHROPIC:
        assert b"event: error\n" in rest
        assert value["type"] == "error"
    return str(value["error"]["message"])


@pytest.mark.parametrize("route", GOOD_STREAMS)
@pytest.mark.parametrize("clean", [False, True])
async def test_a_stream_that_stops_anywhere_ends_with_an_error_and_without_the_last_chunk(route: Route, clean: bool) -> None:
    body = BY_CASE[GOOD_STREAMS[route]].answer.body
    kind = NDJSON if body.startswith(b"{") else SSE
    stops = [*range(1, len(body), 1 if len(body) < 4000 else 7), *(at.end() for at in re.finditer(rb"\n", body)), len(body) - 1]
    # A last line is whole without its line end, an event is not; and nothing is that was cut.
    whole_from = len(body.rstrip()) if clean and (kind == NDJSON or b"[DONE]" in body) else len(body)
    for at in sorted(stop for stop in set(stops) if stop < whole_from):
        sent = body[:at]
        client, _, poured = await relayed(Node(response(200, kind), [sent[:-1], sent[-1:]], None if clean else CUT), route)
        got = client.answer
        assert got.body.startswith(sent)
        assert not got.whole
        assert client.must_close
        rest = got.body[at:]
        if not sent.endswith(b"\n" if kind == NDJSON else b"\n\n"):
            assert rest.startswith(b"\n")
        assert poured is not None
        assert (poured.clean, poured.node_failure) == (False, Failure.DIED)
        assert told_error(route, rest) == poured.error_text == (NO_END if clean else str(CUT))


@pytest.mark.parametrize("route", GOOD_STREAMS)
async def test_a_stream_that_lost_only_the_last_chunk_is_whole(route: Route) -> None:
    body = BY_CASE[GOOD_STREAMS[route]].answer.body
    kind = NDJSON if body.startswith(b"{") else SSE
    client, _, poured = await relayed(Node(response(200, kind), [body], CUT), route)
    assert poured is not None
    assert poured.clean
    assert client.answer.whole
    assert client.answer.body == body
    assert not client.must_close


async def test_the_error_line_of_a_gateway_is_not_repeated() -> None:
    body = b'{"model":"m","response":"a","done":false}\n{"error":"the node went away"}\n'
    client, _, poured = await relayed(Node(response(200, NDJSON), [body], CUT), Route.GENERATE)
    assert client.answer.body == body
    assert not client.answer.whole
    assert client.must_close
    assert poured is not None
    assert (poured.clean, poured.error_text, poured.node_failure) == (False, "the node went away", Failure.DIED)


async def test_an_error_line_that_a_node_ended_properly_stays_so() -> None:
    body = BY_CASE["fail/crash5-chat-native-stream#a"].answer.body
    client, _, poured = await relayed(Node(response(200, NDJSON), [body]), Route.CHAT)
    assert client.answer.whole
    assert not client.must_close
    assert poured is not None
    assert poured.node_failure is Failure.ANSWERED
    assert poured.error_text == "an error was encountered while running the model: unexpected EOF"


async def test_a_stream_that_begins_with_an_error_is_an_answer() -> None:
    body = b'{"error":"something"}\n'
    client, _, poured = await relayed(Node(response(200, NDJSON), [body]), Route.CHAT)
    assert client.answer.body == body
    assert client.answer.whole
    assert poured is not None
    assert not poured.clean


@pytest.mark.parametrize("kind", [NDJSON, SSE, JSON])
async def test_nothing_before_a_cut_reaches_the_client(kind: bytes) -> None:
    for head in (None, response(200, kind)):
        _, opened, _ = await relayed(Node(head, [], CUT), Route.CHAT)
        assert isinstance(opened, Failed)
        assert (opened.failure, opened.text) == (Failure.DIED, str(CUT))
    _, opened, _ = await relayed(Node(None, [], UpstreamGarbled("no HTTP")), Route.CHAT)
    assert isinstance(opened, Failed)
    assert opened.failure is Failure.GARBLED


@pytest.mark.parametrize("kind", [NDJSON, SSE, JSON])
async def test_an_empty_answer_is_a_failure(kind: bytes) -> None:
    _, opened, _ = await relayed(Node(response(200, kind), []), Route.V1_CHAT)
    assert isinstance(opened, Failed)
    assert opened.failure is Failure.EMPTY


async def test_a_whole_answer_cut_anywhere_can_be_tried_again() -> None:
    tape = BY_CASE["fail/close5-chat-native-nostream#a"]
    for at in range(len(tape.answer.body)):
        _, opened, _ = await relayed(Node(response(200, JSON), [tape.answer.body[:at]], CUT), Route.CHAT)
        assert isinstance(opened, Failed)
        assert opened.failure is Failure.DIED


# ---------------------------------------------------------------- framing


async def test_each_read_of_a_stream_is_one_chunk_and_the_end_goes_with_the_last() -> None:
    lines = [b'{"response":"a","done":false}\n', b'{"response":"b","done":false}\n', b'{"done":true}\n']
    client, opened, poured = await relayed(Node(response(200, NDJSON), lines), Route.GENERATE)
    framed = [b"%x\r\n%b\r\n" % (len(line), line) for line in lines]
    head, _, first = client.sends[0].partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    assert [first, *client.sends[1:]] == [framed[0], framed[1], framed[2] + b"0\r\n\r\n"]
    assert isinstance(opened, Good)
    assert opened.body_bytes == sum(map(len, lines))
    assert poured is not None
    assert (poured.body_bytes, poured.chunks) == (opened.body_bytes, 3)


async def test_a_last_chunk_that_comes_later_goes_by_itself() -> None:
    client, _, _ = await relayed(Node(response(200, NDJSON), [b'{"done":true}\n'], told_end=False), Route.GENERATE)
    assert client.sends[-1] == b"0\r\n\r\n"


async def test_an_old_client_gets_a_stream_that_ends_with_the_connection() -> None:
    body = b'{"response":"a","done":false}\n{"done":true}\n'
    client, _, poured = await relayed(Node(response(200, NDJSON), [body]), Route.GENERATE, version="1.0")
    assert client.received.endswith(b"\r\n\r\n" + body)
    assert b"Connection: close" in client.received
    assert client.must_close
    assert poured is not None
    assert poured.clean


async def test_a_stream_with_a_length_is_chunked_so_that_an_error_fits() -> None:
    body = b'{"response":"a","done":false}\n'
    client, _, _ = await relayed(Node(response(200, NDJSON, "length", len(body)), [body]), Route.GENERATE)
    assert client.answer.body.startswith(body)
    assert NO_END.encode() in client.answer.body
    assert b"Content-Length" not in client.received


async def test_a_held_answer_goes_in_one_piece_with_its_length() -> None:
    parts = [b'{"embeddings":[', b"[0.1]", b'],"prompt_eval_count":3}']
    client, opened, poured = await relayed(Node(response(200, JSON), parts), Route.EMBED)
    assert len(client.sends) == 1
    assert client.answer.headers["content-length"] == str(sum(map(len, parts)))
    assert client.answer.body == b"".join(parts)
    assert isinstance(opened, Good)
    assert opened.whole
    assert poured is not None
    assert poured.usage == Usage(prompt_tokens=3)


@pytest.mark.parametrize(("framing", "length"), [("chunked", None), ("length", 40)])
async def test_an_answer_too_large_to_hold_passes_and_a_cut_breaks_the_transfer(framing: str, length: int | None) -> None:
    parts = [b"[" + b"1," * 5, b"2," * 5, b"3," * 5]
    node = Node(response(200, JSON, framing, length), parts, CUT)  # type: ignore[arg-type]
    client, opened, poured = await relayed(node, Route.EMBED, hold_bytes=16)
    assert isinstance(opened, Good)
    assert not opened.whole
    assert opened.first == parts[0] + parts[1]
    assert client.answer.body == b"".join(parts)
    assert not client.answer.whole
    assert client.must_close
    assert poured is not None
    assert (poured.clean, poured.node_failure) == (False, Failure.DIED)


async def test_an_answer_too_large_to_hold_passes_whole() -> None:
    parts = [b"[" + b"1," * 5, b"2," * 5, b"3]"]
    client, _, poured = await relayed(Node(response(200, JSON), parts), Route.EMBED, hold_bytes=16)
    assert client.answer.body == b"".join(parts)
    assert client.answer.whole
    assert poured is not None
    assert poured.clean


# ---------------------------------------------------------------- errors


async def test_what_a_gateway_found_is_taken_over() -> None:
    head = response(502, JSON)
    head.fields[b"x-ollama-router-failure"] = b"refused"
    _, opened, _ = await relayed(Node(head, [b'{"error":"Ollama cannot be reached"}']), Route.CHAT)
    assert isinstance(opened, Failed)
    assert (opened.failure, opened.text, opened.kept) == (Failure.REFUSED, "Ollama cannot be reached", None)


async def test_an_unknown_word_of_a_gateway_is_an_ordinary_error() -> None:
    head = response(502, JSON)
    head.fields[b"x-ollama-router-failure"] = b"bored"
    _, opened, _ = await relayed(Node(head, [b'{"error":"x"}']), Route.CHAT)
    assert isinstance(opened, Failed)
    assert (opened.failure, opened.status) == (Failure.ANSWERED, 502)


async def test_an_error_answer_of_any_length_is_judged_but_a_huge_one_not_kept() -> None:
    node = Node(response(500, JSON), [b"x" * (ERROR_MAX_BYTES + 1), b"y"])
    _, opened, _ = await relayed(node, Route.CHAT)
    assert isinstance(opened, Failed)
    assert (opened.failure, opened.status, opened.kept, len(opened.text)) == (Failure.ANSWERED, 500, None, 4096)
    assert node.closed


async def test_an_error_answer_that_is_cut_is_a_death() -> None:
    _, opened, _ = await relayed(Node(response(500, JSON), [b'{"err'], CUT), Route.CHAT)
    assert isinstance(opened, Failed)
    assert opened.failure is Failure.DIED


def test_in_band_errors_are_in_the_manner_of_the_route() -> None:
    text = 'broke "<here>"'
    shown = rb'"broke \"\u003chere\u003e\""'
    assert in_band_error(Route.CHAT, text, mid_line=False) == b'{"error":%b}\n' % shown
    assert in_band_error(Route.GENERATE, text, mid_line=True) == b'\n{"error":%b}\n' % shown
    openai = b'data: {"error":{"message":%b,"type":"api_error","param":null,"code":null}}\n\n' % shown
    assert in_band_error(Route.V1_CHAT, text, mid_line=False) == openai
    assert in_band_error(Route.V1_COMPLETIONS, text, mid_line=True) == b"\n" + openai
    anthropic = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":%b}}\n\n' % shown
    assert in_band_error(Route.V1_MESSAGES, text, mid_line=False) == anthropic
    event, data = in_band_error(Route.V1_RESPONSES, text, mid_line=False).rstrip().split(b"\n")
    assert event == b"event: response.failed"
    assert json.loads(data.removeprefix(b"data: "))["response"]["error"] == {"code": "server_error", "message": text}


async def test_body_bytes_can_be_watched() -> None:
    node = Node(response(200, NDJSON), [b'{"response":"a"}\n', b'{"done":true}\n'])
    opened = await open_answer(node, route=Route.GENERATE, stream=True, hold_bytes=10)  # type: ignore[arg-type]
    assert isinstance(opened, Good)
    opened.framing_for(asker())
    seen: list[bytes] = []
    await pour(opened, node, Client(), head_bytes=b"", route=Route.GENERATE, on_chunk=seen.append)  # type: ignore[arg-type]
    assert seen == [b'{"response":"a"}\n', b'{"done":true}\n']
