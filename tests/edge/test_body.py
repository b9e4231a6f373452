"""Bodies: read within limits, replayed, given back; and understood as Ollama understands them."""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

import edge.body
from core.events import Protocol, Route
from core.units import MIB
from edge.body import (
    FAST_MAX_BYTES,
    IMAGE_TOKENS,
    PIECE_BYTES,
    SPOOL_ABOVE_BYTES,
    Body,
    BodyBudget,
    inspect,
    inspect_async,
    inspect_ordinary,
    read_body,
)
from edge.facts import BodyFacts
from edge.jsonscan import Scanner
from edge.wire import HttpError, RequestHead, parse_request_head
from tests.edge.answers import ROUTES
from tests.edge.readers import facts
from tests.fleet.recorded import Exchange, is_stream, load


class Conn:
    """A `ClientConnection` that brings `parts` of a body, and a node's that takes what it is sent."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = [part for part in parts if part]
        self.sent: list[bytes] = []

    async def read_body_some(self) -> bytes:
        return self.parts.pop(0) if self.parts else b""

    async def send(self, data: bytes) -> None:
        assert data, "nothing was sent"
        self.sent.append(data)


def head(length: int | None) -> RequestHead:
    framing = b"Transfer-Encoding: chunked" if length is None else b"Content-Length: %d" % length
    return parse_request_head(b"POST /api/chat HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % framing)


async def read(budget: BodyBudget, *parts: bytes, chunked: bool = False) -> Body:
    return await read_body(Conn(*parts), head(None if chunked else sum(map(len, parts))), budget)  # type: ignore[arg-type]


async def replayed(body: Body) -> bytes:
    conn = Conn()
    await body.send_to(conn)
    return b"".join(conn.sent)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("parts", [(), (b"abc",), (b"a", b"bc")])
async def test_a_small_body_stays_in_memory(parts: tuple[bytes, ...], chunked: bool) -> None:
    budget = BodyBudget()
    body = await read(budget, *parts, chunked=chunked)
    assert body.data == b"".join(parts)
    assert body.length == budget.held_bytes == len(body.data)
    for _ in range(2):
        assert await replayed(body) == b"".join(parts)
    body.close()
    assert budget.held_bytes == 0
    with pytest.raises(AssertionError):
        body.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_goes_to_a_file_without_a_name(chunked: bool, tmp_path: Path) -> None:
    budget = BodyBudget(directory=str(tmp_path))
    parts = [bytes([65 + i % 26]) * 300_000 for i in range(12)]
    body = await read(budget, *parts, chunked=chunked)
    assert body.data is None
    assert budget.held_bytes == 0
    assert os.listdir(tmp_path) == []
    assert body.file is not None
    about = os.fstat(body.file.fileno())
    assert stat.S_IMODE(about.st_mode) == 0o600
    assert about.st_nlink == 0
    for _ in range(2):
        conn = Conn()
        await body.send_to(conn)
        assert max(map(len, conn.sent)) <= PIECE_BYTES
        assert b"".join(conn.sent) == b"".join(parts)
    file = body.file
    body.close()
    assert file.closed


async def test_a_body_that_does_not_fit_into_memory_goes_to_disk_however_small() -> None:
    budget = BodyBudget(memory_bytes=10)
    first = await read(budget, b"12345678")
    second = await read(budget, b"abcd", b"efgh")
    assert (first.data, second.data) == (b"12345678", None)
    assert await replayed(second) == b"abcdefgh"
    assert budget.held_bytes == 8
    second.close()
    first.close()
    assert budget.held_bytes == 0


async def test_without_spooling_a_full_memory_refuses() -> None:
    budget = BodyBudget(memory_bytes=3 * MIB, spool=False)
    first = await read(budget, b"x" * (2 * MIB))
    assert first.data is not None
    with pytest.raises(HttpError) as caught:
        await read(budget, b"x" * MIB, b"y" * MIB)
    assert caught.value.status == 503
    assert "ROUTER_BODY_MEMORY_BYTES" in caught.value.text
    assert budget.held_bytes == 2 * MIB
    first.close()
    assert budget.held_bytes == 0


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_above_the_limit_is_refused_and_forgotten(chunked: bool, tmp_path: Path) -> None:
    budget = BodyBudget(max_body_bytes=3 * SPOOL_ABOVE_BYTES, directory=str(tmp_path))
    with pytest.raises(HttpError) as caught:
        await read(budget, *[b"x" * SPOOL_ABOVE_BYTES] * 3, b"x", chunked=chunked)
    assert caught.value.status == 413
    assert budget.held_bytes == 0
    (await read(budget, *[b"x" * SPOOL_ABOVE_BYTES] * 3, chunked=chunked)).close()


async def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    budget = BodyBudget(directory=str(tmp_path / "missing"))
    with pytest.raises(HttpError) as caught:
        await read(budget, b"x" * (SPOOL_ABOVE_BYTES + 1))
    assert caught.value.status == 503
    assert "disk" in caught.value.text
    assert str(tmp_path) not in caught.value.text
    assert budget.held_bytes == 0


@pytest.mark.parametrize("good_writes", [0, 1])
async def test_a_disk_that_fills_up_is_told_and_the_file_closed(monkeypatch: pytest.MonkeyPatch, good_writes: int) -> None:
    class Full:
        closed = False

        def write(self, data: memoryview) -> int:
            nonlocal good_writes
            good_writes -= 1
            if good_writes < 0:
                raise OSError(28, "No space left on device")
            return len(data)

        def close(self) -> None:
            self.closed = True

    full = Full()
    monkeypatch.setattr(edge.body.tempfile, "TemporaryFile", lambda **_: full)
    budget = BodyBudget()
    with pytest.raises(HttpError) as caught:
        await read(budget, *[b"x" * SPOOL_ABOVE_BYTES] * 3)
    assert (caught.value.status, full.closed, budget.held_bytes) == (503, True, 0)
    assert "No space left on device" in caught.value.text


async def test_a_client_that_leaves_gives_its_memory_back() -> None:
    class Leaving(Conn):
        async def read_body_some(self) -> bytes:
            if not self.parts:
                raise trio.BrokenResourceError
            return await super().read_body_some()

    budget = BodyBudget()
    for length, parts in ((10, [b"12345"]), (5 * MIB, [b"x" * MIB] * 3)):
        with pytest.raises(trio.BrokenResourceError):
            await read_body(Leaving(*parts), head(length), budget)  # type: ignore[arg-type]
        assert budget.held_bytes == 0


async def test_a_huge_file_is_closed_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    closed_by = []

    class Thread:
        def __init__(self, *, target: Any, name: str) -> None:
            self.target = target

        def start(self) -> None:
            closed_by.append("thread")
            self.target()

    monkeypatch.setattr(edge.body.threading, "Thread", Thread)
    body = await read(BodyBudget(), *[b"x" * MIB] * 9)
    file = body.file
    body.close()
    assert closed_by == ["thread"]
    assert file is not None
    assert file.closed


# ---------------------------------------------------------------- what Ollama read


def recorded() -> Iterator[Exchange]:
    for tape in load():
        if (
            tape.method == "POST"
            and tape.target in ROUTES
            and tape.end not in ("reset", "left")
            and b"Content-Encoding" not in tape.request
        ):
            yield tape


READING_ERRORS = re.compile(
    r"invalid character|unexpected EOF|missing request body|cannot unmarshal (array|string) into Go value"
    r"|GenerateRequest.model"
    r"|^EOF|exceeded max depth"
)


async def test_every_recorded_body_is_understood_as_ollama_understood_it() -> None:
    seen = dict.fromkeys(("model", "problem", "stream", "whole", "load", "unload"), 0)
    for tape in recorded():
        route, answer = ROUTES[tape.target], tape.answer
        found = inspect(route, tape.body)
        body = Body(tape.body, length=len(tape.body), budget=BodyBudget())
        assert await inspect_async(route, body) == found
        if answer.status == 400 and READING_ERRORS.search(answer.body.decode()) and b"template" not in answer.body:
            assert found.model is None or b"Go struct" in answer.body, tape.case
            seen["problem"] += found.problem is not None
        if answer.status != 200 or not answer.body or b"0001-01-01T" in answer.body or b'"model":""' in answer.body:
            continue
        assert found.stream or not is_stream(answer), tape.case
        seen["stream" if is_stream(answer) else "whole"] += 1
        if route.protocol is not Protocol.NATIVE:
            continue
        first = json.loads(answer.body.split(b"\n")[0])
        if "model" in first and "error" not in first:
            assert found.model == first["model"], tape.case
            seen["model"] += 1
        reason = first.get("done_reason")
        if reason in ("load", "unload"):
            assert (found.load_only, found.unload) == (True, reason == "unload"), tape.case
            seen[reason] += 1
        elif route in (Route.CHAT, Route.GENERATE):
            assert not found.load_only, tape.case
            assert found.stream is is_stream(answer) or "_debug_info" in first, tape.case
    assert min(seen.values()) > 2, seen
    assert seen["model"] > 300


# ---------------------------------------------------------------- the two ways, and a third

KEYS = ["model", "stream", "options", "shift", "prompt", "messages", "tools", "format", "response_format", "keep_alive", "max_tokens",
        "text", "max_completion_tokens", "x", "num_predict", "modelx"]  # fmt: skip
OPTION_KEYS = ["num_ctx", "num_gpu", "num_predict", "use_mmap", "NUM_CTX", "temperature"]


@st.composite
def spelled(draw: st.DrawFn, key: str) -> bytes:
    """A key as a client may spell it: in any case, with strange letters, with escapes."""
    out = []
    for letter in key:
        how = draw(st.sampled_from(["as it is"] * 12 + ["upper", "strange", "escaped"]))
        if how == "strange":
            letter = {"k": "\u212a", "s": "\u017f"}.get(letter, letter)
        elif how == "upper":
            letter = letter.upper()
        out.append(b"\\u%04x" % ord(letter) if how == "escaped" else letter.encode())
    return b'"' + b"".join(out) + b'"'


scalars = st.sampled_from(
    [b"null", b"true", b"false", b"0", b"0.0", b"1.5", b"-1", b"8192", b"1e3", b"1e999", b'"m"', b'""', b'"0"', b'"0s"', b'"5m"',
     b'"0h0.0m"', b'"\\ud800"', b'"\xff"', b'"model"', b'"a \\"model\\":"', b"[]", b"[ ]", b"{}", b'[{"role":"user","model":"x"}]',
     b'{"model":{"model":null}}']
)  # fmt: skip


@st.composite
def objects(draw: st.DrawFn, keys: list[str], values: st.SearchStrategy[bytes], most: int) -> bytes:
    gap = draw(st.sampled_from([b"", b" ", b"\n"]))
    pairs = []
    for _ in range(draw(st.integers(0, most))):
        key = draw(st.sampled_from(keys))
        value = draw(st.one_of(values, objects(OPTION_KEYS, scalars, 3))) if key == "options" else draw(values)
        pairs.append(draw(spelled(key)) + b":" + gap + value)
    return b"{" + gap + (b"," + gap).join(pairs) + gap + b"}"


bodies = st.builds(
    lambda body, after, at, wrong: body[: at % (len(body) + 1)] + wrong + body[at % (len(body) + 1) :] + after,
    objects(KEYS, scalars, 6),
    st.sampled_from([b"", b"", b" \n", b"zzz", b'{"model":"other"}']),
    st.integers(0, 200),
    st.sampled_from([b""] * 9 + [b",", b"\x00", b'"', b"\xff", b"\\"]),
)

plain_bodies = st.lists(st.tuples(st.sampled_from([b"model", b"messages", b"prompt", b"stream"]), scalars), max_size=4).map(
    lambda members: b"{%b}" % b",".join(b'"%b":%b' % member for member in members)
)


@given(bodies | plain_bodies, st.sampled_from([Route.CHAT, Route.GENERATE, Route.V1_CHAT]), st.integers(1, 50))
@example(b'{"model":"a","model":null}', Route.CHAT, 5)
@example(b'{"Model":"a","model":"b"}', Route.CHAT, 5)
@example(b'{"model":"a","m\\u006fdel":"b"}', Route.CHAT, 5)
@example(b'{"model":"a","model":"model"}', Route.CHAT, 5)
@example(b'{"options":{"num_ctx":1},"options":{"num_gpu":2}}', Route.CHAT, 5)
@example(b'{"options":{"num_ctx":1},"options":null,"options":{"num_ctx":null}}', Route.CHAT, 5)
@example(b'{"stream":false,"stream":null,"model":"m"}', Route.CHAT, 5)
@example(b'{"model":"a","messages":["stream"],"stream":true}', Route.CHAT, 5)
@example(b'{"model":"a","messages":["b"],"model":"stream"}', Route.CHAT, 5)
@example(b'{"model":"a","messages":["b"],"STREAM":true}', Route.CHAT, 5)
@example(b'{"model":"a","messages":["b"],"stream":null}', Route.V1_CHAT, 5)
@example(b'{"model":"a","prompt":null}', Route.GENERATE, 5)
@example(b'{"model":"a","prompt":""}', Route.GENERATE, 5)
@example(b'{"model":7,"prompt":" "}', Route.GENERATE, 5)
@example(b'{"model":"","prompt":"x"}', Route.GENERATE, 5)
@example(b'{"model":"a","prompt":"x","raw":1}', Route.GENERATE, 5)
@example(b'{"model":"a","prompt":"x","name":1}', Route.GENERATE, 5)
@example(b'{"model":"\\ud800","prompt":"x"}', Route.GENERATE, 5)
@example(b'{"model":"\\ud83d\\ude00 \xc3\xa9","prompt":"x"}', Route.GENERATE, 5)
@example(b'{"m\\u006fdel":"a","prompt":"x"}', Route.GENERATE, 5)
@example(b'{"model":"\xc3\xa9\xc3\xa9\xc3\xa9","model":"","prompt":"x"}', Route.GENERATE, 5)
@example(b'{"model":"a","prompt":"x","prompt":1}', Route.GENERATE, 5)
@example(b'{"model":"a","messages":7}', Route.CHAT, 5)
@example(b"null", Route.CHAT, 1)
@example(b"\xef\xbb\xbf{}", Route.CHAT, 1)
def test_the_fast_way_the_exact_way_and_python_agree(body: bytes, route: Route, size: int) -> None:
    found = inspect(route, body)
    scanner = Scanner(edge.body._wanted)
    for at in range(0, len(body), size):
        scanner.feed(body[at : at + size])
    assert edge.body._conclude(route, scanner, b"") == found
    expected = facts(body, route)
    assert (found.problem is None) is (expected is not None and expected["model"] is not None)
    if expected is None:
        assert found == BodyFacts(problem=found.problem, stream=route.streams_by_default)
    else:
        assert {name: getattr(found, name) for name in expected} == expected


def test_ordinary_bodies_go_the_fast_way() -> None:
    for tape in recorded():
        plain = b"\\u" not in tape.body and tape.answer.status == 200 and "json" not in tape.case
        if plain and len(tape.body) < FAST_MAX_BYTES and tape.case.split("/")[0] not in ("generate", "chat"):
            assert inspect_ordinary(Route.CHAT, tape.body) is not None, tape.case


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("route", "body", "facts_told"),
    [
        (Route.GENERATE, {"prompt": "hello you", "system": "be kind"}, {"input_tokens": 5, "stream": True}),
        (Route.CHAT, {"messages": [{"content": "x" * 390}]}, {"input_tokens": 101}),
        (Route.EMBED, {"input": ["abc", "def"]}, {"input_tokens": 3, "stream": False}),
        (Route.EMBED, {"input": "", "keep_alive": 0}, {"load_only": True, "unload": False}),
        (Route.EMBEDDINGS, {"prompt": ""}, {"load_only": True}),
        (Route.V1_EMBEDDINGS, {"input": ""}, {"load_only": False}),
        (Route.V1_CHAT, {"messages": []}, {"load_only": False}),
        (Route.V1_CHAT, {"stream": True, "max_tokens": 9, "max_completion_tokens": 7}, {"stream": True, "output_limit": 7}),
        (Route.V1_CHAT, {"options": {"num_ctx": 5, "num_predict": 3}}, {"runner_options": "", "output_limit": None}),
        (Route.V1_RESPONSES, {"max_output_tokens": 4}, {"output_limit": 4, "constrained": False}),
        (Route.V1_RESPONSES, {"text": {"format": {"type": "json_schema"}}}, {"constrained": True}),
        (Route.V1_COMPLETIONS, {"prompt": "x", "max_tokens": -1}, {"output_limit": None}),
        (Route.CHAT, {"options": {"num_predict": -1}}, {"output_limit": None}),
        (Route.CHAT, {"options": {"num_predict": 0}}, {"output_limit": 0}),
        (Route.CHAT, {"options": {"num_predict": "5", "num_ctx": True, "use_mmap": 1}}, {"output_limit": None, "runner_options": ""}),
        (Route.CHAT, {"options": {"num_thread": 4, "num_ctx": 8192.9, "use_mmap": False}, "shift": False},
         {"runner_options": "num_ctx=8192,num_thread=4,use_mmap=false,shift=false"}),
        (Route.CHAT, {"tools": []}, {"constrained": False}),
        (Route.CHAT, {"tools": [{}]}, {"constrained": True}),
        (Route.CHAT, {"format": ""}, {"constrained": False}),
        (Route.CHAT, {"format": "json"}, {"constrained": True}),
        (Route.CHAT, {"format": {"type": "object"}}, {"constrained": True}),
        (Route.V1_CHAT, {"response_format": {"type": "json_object"}}, {"constrained": True}),
        (Route.SHOW, {"name": "n", "model": ""}, {"model": "n"}),
        (Route.SHOW, {"name": "n", "model": "m"}, {"model": "m"}),
        (Route.SHOW, {"name": 5, "model": ""}, {"model": None}),
    ],
)  # fmt: skip
def test_facts(route: Route, body: dict[str, Any], facts_told: dict[str, Any]) -> None:
    found = inspect(route, json.dumps({"model": "m", **body}).encode())
    assert {name: getattr(found, name) for name in facts_told} == facts_told


@pytest.mark.parametrize("value", ["0", "0s", "-0s", "+0", "0h0m0.0s", "0.5ns", ".9ns", "0.0000000001s", "0µs", 0, 0.0, -0.0, 1e-10])
def test_keep_alives_that_unload(value: object) -> None:
    assert inspect(Route.GENERATE, json.dumps({"model": "m", "keep_alive": value}).encode()).unload


@pytest.mark.parametrize("value", ["", "1s", "0", "-1s", "0x", "5", "s", ".s", -1, 1, 0.5, True, None, {}, "1ns", "0s5m"])
def test_keep_alives_that_do_not(value: object) -> None:
    prompt = "hi" if value == "0" else ""
    assert not inspect(Route.GENERATE, json.dumps({"model": "m", "prompt": prompt, "keep_alive": value}).encode()).unload


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no body"),
        (b"  \n", "no body"),
        (b"xyz", "not JSON"),
        (b'{"model":"m"', "unexpected end"),
        (b"[1]", "no JSON object"),
        (b'"m"', "no JSON object"),
        (b"nul", "not JSON"),
        (b"{}", "no model"),
        (b"null", "no model"),
        (b'{"model":5}', "not a string"),
        (b'{"model":"%b"}' % (b"m" * 70_000), "too long"),
        (b"\x28\xb5\x2f\xfd\x00", "not JSON"),
    ],
)
async def test_what_cannot_be_read_is_told(body: bytes, words: str) -> None:
    found = inspect(Route.CHAT, memoryview(body))
    assert found.model is None
    assert words in (found.problem or "")
    assert await inspect_async(Route.CHAT, Body(body, length=len(body), budget=BodyBudget())) == found


def test_a_form_says_that_it_is_one() -> None:
    found = inspect(Route.V1_TRANSCRIPTIONS, b"--x\r\nContent-Disposition: form-data", content_type=b"multipart/form-data; boundary=x")
    assert found.model is None
    assert "form" in (found.problem or "")


def test_images_count_as_images_and_not_by_their_bytes() -> None:
    image = "A" * 3_000_000
    body = {"model": "m", "messages": [{"role": "user", "content": "what is this?", "images": [image, image]}]}
    found = inspect(Route.CHAT, json.dumps(body).encode())
    assert 2 * IMAGE_TOKENS < found.input_tokens < 2 * IMAGE_TOKENS + 50
    small = inspect(Route.CHAT, json.dumps(body).replace(image, image[:5000]).encode())
    assert small.input_tokens == found.input_tokens


@pytest.mark.parametrize("levels", [900, 9_990])
def test_deep_bodies_are_read(levels: int) -> None:
    body = b'{"x":' + b"[" * levels + b"]" * levels + b',"model":"m"}'
    assert inspect(Route.CHAT, body).model == "m"


def test_bodies_too_deep_for_ollama_are_not() -> None:
    found = inspect(Route.CHAT, b'{"x":' + b"[" * 10_000 + b"]" * 10_000 + b',"model":"m"}')
    assert found.model is None
    assert "deeper" in (found.problem or "")


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m",' + b",".join(b'"k%d":1' % i for i in range(400)) + b"}",
        b'{"model":"m","x":[' + b'"",' * 10_000 + b'""]}',
        b'{"model":"m","x":"' + b"a b" * FAST_MAX_BYTES + b'"}',
        b'{"model":"m","options":{"num_ctx":4,"x":' + b"[" * 1500 + b"]" * 1500 + b"}}",
        b'{"model":"m","options":{"num_ctx":4,"\\ud800":1}}',
    ],
)
def test_unusual_bodies_go_the_exact_way(body: bytes) -> None:
    found = inspect(Route.CHAT, body)
    assert found.model == "m"
    assert found.runner_options == ("num_ctx=4" if b"num_ctx" in body else "")


async def test_a_large_body_lets_other_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.body, "STEP_S", 0.0)
    data = b'{"MODEL":"z","x":[' + b"[]," * 40_000 + b'[]],"model":"m"}'
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    for body in (Body(data, length=len(data), budget=BodyBudget()), await read(BodyBudget(memory_bytes=1), data)):
        before = turns
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert (await inspect_async(Route.CHAT, body)).model == "m"
            nursery.cancel_scope.cancel()
        assert turns - before > 20
        body.close()


async def test_a_spooled_body_is_read_only_as_far_as_its_first_value() -> None:
    data = b'{"model":"m"}' + b"\x00" * (3 * MIB)
    body = await read(BodyBudget(), data)
    assert body.data is None
    reads: list[int] = []
    read_at = body.read_at

    class Watched:
        length, data = body.length, None

        async def read_at(self, offset: int) -> bytes:
            reads.append(offset)
            return await read_at(offset)

    assert (await inspect_async(Route.CHAT, Watched())).model == "m"  # type: ignore[arg-type]
    assert reads == [0]
    body.close()
