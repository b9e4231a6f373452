"""A real nginx with the rendered files: which way a request goes, what each side gets of it, and that ends stay what they were."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from core.events import Route
from core.units import RequestId
from edge.handover import Carried, Handover
from edge.listener import _POST
from edge.tally import Tally
from tests.edge.nginx_parts import ScriptedRouter
from tests.edge.nginx_stage import REQUEST_ID, SECRET, Stage, open_stage
from tests.fleet.programs import needed
from tests.fleet.rawhttp import Caller, Hangup, Reset, ask, parse_answer, raw_request, request_bytes, talk, wait_until

pytestmark = pytest.mark.slow
BODY = b'{"model": "m"}'
INFERENCE = [path for path in _POST if path not in ("/api/show", "/v1/audio/transcriptions")]


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as found:
        yield found


def names(caller: Caller) -> set[str]:
    return set(caller.fields)


# ---------------------------------------------------------------- which way


@pytest.mark.parametrize("path", INFERENCE)
async def test_plain_inference_is_asked_about_and_goes_to_the_node(stage: Stage, path: str) -> None:
    answer = await ask(stage.port, "POST", path, BODY)
    assert (answer.status, answer.body) == (200, b'{"done":true}')
    (asked,), (got,) = stage.selection, stage.node
    assert (asked.method, asked.target, asked.body) == ("POST", path, BODY)
    assert (got.method, got.target, got.body) == ("POST", path, BODY)
    assert stage.coordinator == []


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/api/tags", {}),
        ("GET", "/dashboard?x=%20", {}),
        ("GET", "/api/chat", {}),
        ("POST", "/api/show", {}),
        ("POST", "/api/chat?x=1", {}),
        ("POST", "/api/ch%61t", {}),
        ("POST", "//api/chat", {}),
        ("POST", "/api/chat/", {}),
        ("POST", "/api/./chat", {}),
        ("POST", "/x/../api/chat", {}),
        ("POST", "/k/sk-1/api/chat", {}),
        ("POST", "/API/chat", {}),
        ("POST", "/_router/refused", {}),
        ("POST", "/api/chat", {"Origin": "http://localhost"}),
        ("POST", "/api/chat", {"Content-Encoding": "zstd"}),
        ("POST", "/api/chat", {"Upgrade": "websocket"}),
        ("POST", "/api/chat", {"Connection": "close, x-secret"}),
    ],
)
async def test_everything_else_is_the_coordinators_as_it_came(stage: Stage, method: str, path: str, headers: dict[str, str]) -> None:
    answer = await ask(stage.port, method, path, BODY if method == "POST" else None, headers=headers)
    if path == "/_router/refused":
        assert answer.status == 404, "what is internal is nobody's path"
        return
    assert answer.status == 207
    (got,) = stage.coordinator
    assert (got.method, got.target, got.body) == (method, path, BODY if method == "POST" else b"")
    assert (stage.selection, stage.node) == ([], [])


@pytest.mark.parametrize(
    ("size", "asked"), [(1, True), (9_999, True), (261_999, True), (262_144, False), (300_000, False), (1_000_000, False)]
)
async def test_small_bodies_are_asked_about_and_larger_ones_are_the_coordinators(stage: Stage, size: int, asked: bool) -> None:
    body = b"x" * size
    answer = await ask(stage.port, "POST", "/api/chat", body)
    assert answer.status == (200 if asked else 207)
    seen = stage.selection + stage.node if asked else stage.coordinator
    assert [caller.body == body for caller in seen] == [True] * (2 if asked else 1)


async def test_a_chunked_upload_is_the_coordinators(stage: Stage) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answer = parse_answer(await raw_request(stage.port, head + b"e\r\n" + BODY + b"\r\n0\r\n\r\n"))
    assert answer.status == 207
    assert stage.coordinator[0].body == BODY
    assert stage.selection == []


async def test_an_upload_reaches_the_coordinator_while_it_is_sent(stage: Stage) -> None:
    """A file is nowhere kept whole: its beginning is there before its end was sent."""
    begun = trio.Event()

    async def read_on(caller: Caller) -> None:
        stage.coordinator.append(caller)

    stage.servers["coordinator"].handler = read_on
    received = 0

    async def count(stream: trio.SocketStream) -> None:
        nonlocal received
        async with stream:
            while data := await stream.receive_some():
                received += len(data)
                begun.set()

    stage.servers["coordinator"]._serve = count  # type: ignore[method-assign]
    stage.servers["coordinator"].die()
    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(stage.servers["coordinator"].port, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, count, [listener])
        stream = await trio.open_tcp_stream("127.0.0.1", stage.port)
        await stream.send_all(b"POST /api/blobs/sha256:x HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n" + b"x" * 1_000_000)
        with trio.fail_after(10):
            await begun.wait()
            await wait_until(lambda: received > 900_000, what="most of what was sent")
        await stream.aclose()
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- what each side gets


async def test_nothing_of_a_clients_identity_reaches_a_node(stage: Stage) -> None:
    secret = {
        "Authorization": "Bearer k", "X-Api-Key": "k", "Cookie": "c=1", "Referer": "http://r", "Proxy-Authorization": "p", "TE": "trailers",
        "X-Explain": "1", "X-Router-History": "off", "X-Ollama-Router-Credential": "mine", "X-Ollama-Router-Takeover": "mine",
        "X-Ollama-Router-Edge": "mine", "X-Ollama-Router-Failure": "mine", "X-Ollama-Router-Answer": "mine", "X-Request-Id": "mine",
    }  # fmt: skip
    passed = {"User-Agent": "u/1", "Accept": "*/*", "traceparent": "00-1-2-3", "X_Odd.Name": "v", "Content-Type": "application/json"}
    await ask(stage.port, "POST", "/api/chat", BODY, headers={**secret, **passed, "X-Forwarded-For": "1.2.3.4"})
    (got,) = stage.node
    assert "mine" not in got.fields.values()
    assert names(got) == {
        *(name.lower() for name in passed), "host", "content-length", "x-forwarded-for", "x-request-id", "x-ollama-router-credential",
        "x-ollama-router-edge",
    }  # fmt: skip
    assert {name: got.fields[name.lower()] for name in passed} == passed
    assert got.fields["host"] == f"127.0.0.1:{stage.node_port}"
    assert got.fields["x-forwarded-for"] == "1.2.3.4, 127.0.0.1"
    assert got.fields["x-request-id"] == REQUEST_ID
    assert got.fields["x-ollama-router-credential"] == "shibboleth"
    assert got.fields["x-ollama-router-edge"] == "nginx"


async def test_a_bare_node_gets_no_credential_and_is_not_told_of_nginx(stage: Stage) -> None:
    stage.selects = lambda stage, _: stage.chosen(**{"X-Credential": "", "X-Prefix": "/ollama"})
    await ask(stage.port, "POST", "/api/chat", BODY)
    (got,) = stage.node
    assert got.target == "/ollama/api/chat"
    assert not [name for name in names(got) if name.startswith("x-ollama-router")]


async def test_selection_is_told_who_asks(stage: Stage) -> None:
    headers = {
        "Authorization": "Bearer k", "X-Api-Key": "k", "X-Forwarded-For": "1.2.3.4", "X-OpenWebUI-User-Id": "u", "X-Explain": "1",
        "X-Router-History": "off",
    }  # fmt: skip
    await ask(stage.port, "POST", "/api/chat", BODY, headers={**headers, "Cookie": "c", "X-Peer": "mine"})
    (asked,) = stage.selection
    assert {name: asked.fields[name.lower()] for name in headers} == headers
    assert (asked.target, asked.fields["x-peer"]) == ("/api/chat", "127.0.0.1")
    assert asked.fields["x-connection"]
    assert "cookie" not in asked.fields


async def test_one_connection_has_one_name(stage: Stage) -> None:
    kept = request_bytes("POST", "/api/chat", BODY).replace(b"Connection: close\r\n", b"")
    await raw_request(stage.port, kept + request_bytes("POST", "/api/chat", BODY))
    await ask(stage.port, "POST", "/api/chat", BODY)
    one, same, other = [caller.fields["x-connection"] for caller in stage.selection]
    assert one == same != other


async def test_only_nginx_speaks_to_the_coordinator_of_takeovers(stage: Stage) -> None:
    claims = {f"X-Ollama-Router-{name}": "mine" for name in ("Takeover", "Tried", "Failure", "Answer", "Answer-Type")}
    await ask(stage.port, "GET", "/api/tags", headers=claims)
    await ask(stage.port, "POST", "/api/chat", BODY, headers={**claims, "Origin": "x"})
    for caller in stage.coordinator:
        assert "mine" not in caller.fields.values()


async def test_the_coordinator_gets_credentials_and_the_name_that_was_called(stage: Stage) -> None:
    headers = {"Authorization": "Bearer k", "Cookie": "c=1", "Origin": "http://router:81", "Host": "router:81", "X-Router-History": "off"}
    await ask(stage.port, "GET", "/api/agents", headers=headers)
    (got,) = stage.coordinator
    assert {name: got.fields[name.lower()] for name in headers} == headers
    assert got.fields["x-forwarded-for"] == "127.0.0.1"


async def test_an_answer_passes_with_its_own_headers_and_ours(stage: Stage) -> None:
    async def answer(caller: Caller) -> None:
        head = (
            b"HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nServer: gin\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"X-Request-Id: theirs\r\nX-Ollama-Node: theirs\r\nX-Ollama-Router-Failure: x\r\nAccess-Control-Allow-Origin: *\r\n"
            b"X-Accel-Redirect: @coordinator\r\nCache-Control: no-cache\r\nX-Odd_Name: v\r\nContent-Length: 2\r\n\r\nok"
        )
        await caller.send(head)

    stage.answers = answer
    got = await ask(stage.port, "POST", "/v1/chat/completions", BODY)
    assert (got.status, got.body) == (200, b"ok")
    assert got.headers == {
        "date": "Thu, 01 Jan 2026 00:00:00 GMT", "server": "gin", "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache", "x-odd_name": "v", "content-length": "2", "connection": "close",
        "x-request-id": REQUEST_ID, "x-ollama-node": "node-1",
    }  # fmt: skip


async def test_a_node_without_a_group_is_served_too() -> None:
    async with open_stage(known=False) as stage:
        assert (await ask(stage.port, "POST", "/api/chat", BODY)).status == 200
        assert stage.node[0].fields["host"] == f"127.0.0.1:{stage.node_port}"


async def test_connections_to_the_node_the_coordinator_and_its_socket_are_kept(stage: Stage) -> None:
    for _ in range(5):
        await ask(stage.port, "POST", "/api/chat", BODY)
        await ask(stage.port, "GET", "/api/tags")
    for callers in (stage.node, stage.selection, stage.coordinator):
        assert len(callers) == 5
        assert len({id(caller.stream) for caller in callers}) == 1


# ---------------------------------------------------------------- what is not good goes to the coordinator


async def test_what_may_not_be_asked_of_a_node_is_the_coordinators(stage: Stage) -> None:
    stage.selects = lambda *_: None
    answer = await ask(stage.port, "POST", "/api/chat", BODY)
    assert answer.status == 207
    (got,) = stage.coordinator
    assert got.body == BODY
    assert got.fields["x-ollama-router-takeover"] == f"{SECRET} {REQUEST_ID}"
    assert "x-ollama-router-tried" not in got.fields


async def test_a_request_that_selection_knows_nothing_of_comes_as_any_other(stage: Stage) -> None:
    stage.selects = lambda *_: None
    stage.handed = ""
    assert (await ask(stage.port, "POST", "/api/chat", BODY)).status == 207
    assert "x-ollama-router-takeover" not in stage.coordinator[0].fields


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 502, 503, 529])
async def test_an_answer_that_is_not_good_is_for_the_coordinator_to_judge(stage: Stage, status: int) -> None:
    async def answer(caller: Caller) -> None:
        extra = (
            b"X-Ollama-Router-Failure: answered\r\nX-Ollama-Router-Answer: eyJlcnJvciI6IngifQ==\r\nX-Ollama-Router-Answer-Type: text/x\r\n"
        )
        await caller.send(b"HTTP/1.1 %d X\r\n%bContent-Length: 3\r\n\r\nbad" % (status, extra))

    stage.answers = answer
    got = await ask(stage.port, "POST", "/api/chat", BODY)
    assert (got.status, got.body) == (207, b'{"by":"coordinator"}')
    (caller,) = stage.coordinator
    assert caller.body == BODY
    told = {name: value for name, value in caller.fields.items() if name.startswith("x-ollama-router-")}
    assert told == {
        "x-ollama-router-takeover": f"{SECRET} {REQUEST_ID}", "x-ollama-router-tried": f"lease-1 {status}",
        "x-ollama-router-failure": "answered", "x-ollama-router-answer": "eyJlcnJvciI6IngifQ==", "x-ollama-router-answer-type": "text/x",
    }  # fmt: skip
    assert stage.tally == [], "what the coordinator goes on with is not told as ended"


async def test_a_node_does_not_say_which_request_is_handed_over(stage: Stage) -> None:
    async def answer(caller: Caller) -> None:
        await caller.send(
            b"HTTP/1.1 503 X\r\nX-Takeover: another\r\nX-Lease: another\r\nX-Request-Id: another\r\nContent-Length: 0\r\n\r\n"
        )

    stage.answers = answer
    assert (await ask(stage.port, "POST", "/api/chat", BODY)).status == 207
    told = stage.coordinator[0].fields
    assert (told["x-ollama-router-takeover"], told["x-ollama-router-tried"]) == (f"{SECRET} {REQUEST_ID}", "lease-1 503")


async def test_a_node_that_cannot_be_reached_is_told_with_nginxs_own_status(stage: Stage) -> None:
    stage.servers["node"].die()
    assert (await ask(stage.port, "POST", "/api/chat", BODY)).status == 207
    assert stage.coordinator[0].fields["x-ollama-router-tried"] == "lease-1 502"
    assert "x-ollama-router-failure" not in stage.coordinator[0].fields


@pytest.mark.parametrize("how", [Hangup, Reset])
async def test_a_node_that_dies_before_it_answers_is_not_asked_again(stage: Stage, how: type[Exception]) -> None:
    async def die(_: Caller) -> None:
        raise how

    stage.answers = die
    assert (await ask(stage.port, "POST", "/api/chat", BODY)).status == 207
    assert len(stage.node) == 1
    assert stage.coordinator[0].fields["x-ollama-router-tried"] == "lease-1 502"


async def test_without_selection_the_coordinator_answers_as_ever(stage: Stage) -> None:
    stage.servers["selection"].die()
    assert (await ask(stage.port, "POST", "/api/chat", BODY)).status == 207
    assert not [name for name in stage.coordinator[0].fields if name.startswith("x-ollama-router")]


@pytest.mark.parametrize(
    ("path", "keys"), [("/api/chat", ["error"]), ("/v1/chat/completions", ["error"]), ("/v1/messages", ["type", "error", "request_id"])]
)
async def test_with_nobody_there_the_error_is_in_the_routes_manner(stage: Stage, path: str, keys: list[str]) -> None:
    for name in ("selection", "coordinator"):
        stage.servers[name].die()
    answer = await ask(stage.port, "POST", path, BODY)
    assert (answer.status, list(answer.json())) == (503, keys)
    text = answer.json()["error"] if path.startswith("/api") else answer.json()["error"]["message"]
    assert text == "the router does not answer; try again in a moment"
    assert answer.headers["retry-after"] == "1"
    assert len(answer.headers["x-request-id"]) == 36
    assert (await ask(stage.port, "GET", "/api/tags")).json() == {"error": text}


# ---------------------------------------------------------------- beginnings and ends


async def begin(caller: Caller) -> None:
    await caller.begin_chunks()
    await caller.chunk(b'{"n":1}\n')


async def test_each_piece_of_an_answer_goes_on_at_once(stage: Stage) -> None:
    more = trio.Event()

    async def answer(caller: Caller) -> None:
        await begin(caller)
        await more.wait()
        await caller.chunk(b'{"n":2}\n')
        await caller.end_chunks()

    stage.answers = answer
    async with talk(stage.port, "POST", "/api/chat", BODY) as heard:
        with trio.fail_after(5):
            await heard.wait_for(b'{"n":1}\n')
        more.set()
        whole = await heard.rest()
    assert (whole.whole, whole.lines()) == (True, [{"n": 1}, {"n": 2}])


@pytest.mark.parametrize("how", [Hangup, Reset])
async def test_a_cut_never_becomes_a_clean_end(stage: Stage, how: type[Exception]) -> None:
    async def answer(caller: Caller) -> None:
        await begin(caller)
        await trio.sleep(0.05)  # or the reset would overtake the bytes
        raise how

    stage.answers = answer
    got = await ask(stage.port, "POST", "/api/chat", BODY)
    assert (got.status, got.whole, got.lines()) == (200, False, [{"n": 1}])
    assert stage.coordinator == [], "nothing is tried again after the first byte"


async def test_an_error_in_band_without_a_last_chunk_reaches_the_client_as_both(stage: Stage) -> None:
    async def answer(caller: Caller) -> None:
        await begin(caller)
        await caller.chunk(b'{"error":"cut"}\n')
        raise Hangup

    stage.answers = answer
    got = await ask(stage.port, "POST", "/api/chat", BODY)
    assert (got.whole, got.lines()) == (False, [{"n": 1}, {"error": "cut"}])
    done = await trio.run_process(
        [needed("curl", "curl"), "-sN", f"http://127.0.0.1:{stage.port}/api/chat", "-d", "{}"], capture_stdout=True, check=False, stdin=b""
    )
    assert (done.returncode, b'{"error":"cut"}' in done.stdout) == (18, True)


async def test_a_whole_answer_that_is_cut_stays_cut(stage: Stage) -> None:
    async def answer(caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        raise Hangup

    stage.answers = answer
    got = await ask(stage.port, "POST", "/api/chat", BODY)
    assert (got.whole, got.body) == (False, b"half")


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_closes_the_nodes_connection_at_once(stage: Stage, begun: bool) -> None:
    left = trio.Event()

    async def answer(caller: Caller) -> None:
        if begun:
            await begin(caller)
        await caller.wait_for_departure()
        left.set()
        raise Hangup

    stage.answers = answer
    async with talk(stage.port, "POST", "/api/chat", BODY) as heard:
        if begun:
            await heard.wait_for(b'{"n":1}\n')
        await wait_until(lambda: stage.node, what="the request on the node")
    with trio.fail_after(2):
        await left.wait()
    await wait_until(lambda: stage.tally, what="the line of the log")
    lease, status, _, _, _, *completion = stage.tally[0].split()
    assert lease == "lease-1"
    assert status == "499" or completion == [], stage.tally
    assert stage.coordinator == [], "nobody goes on for a client that left"


async def test_a_client_that_shuts_down_its_sending_side_has_left(stage: Stage) -> None:
    left = trio.Event()

    async def answer(caller: Caller) -> None:
        await caller.wait_for_departure()
        left.set()
        raise Hangup

    stage.answers = answer
    async with talk(stage.port, "POST", "/api/chat", BODY) as heard:
        await wait_until(lambda: stage.node, what="the request on the node")
        await heard.stream.send_eof()
        with trio.fail_after(2):
            await left.wait()


async def test_a_client_that_leaves_while_selection_is_held_closes_that_connection(stage: Stage) -> None:
    left = trio.Event()

    async def hold(caller: Caller) -> None:
        stage.selection.append(caller)
        await caller.wait_for_departure()
        left.set()
        raise Hangup

    stage.servers["selection"].handler = hold
    async with talk(stage.port, "POST", "/api/chat", BODY):
        await wait_until(lambda: stage.selection, what="the question")
    with trio.fail_after(2):
        await left.wait()
    assert (stage.node, stage.coordinator) == ([], [])


async def test_selection_may_hold_its_answer_as_long_as_it_likes(stage: Stage) -> None:
    go = trio.Event()
    select = stage.servers["selection"].handler

    async def hold(caller: Caller) -> None:
        await go.wait()
        await select(caller)

    stage.servers["selection"].handler = hold
    async with talk(stage.port, "POST", "/api/chat", BODY) as heard:
        with trio.move_on_after(0.2):
            await heard.read_some()
        assert heard.received == b""
        go.set()
        assert (await heard.rest()).status == 200


async def test_the_end_of_an_answer_is_told_in_one_line(stage: Stage) -> None:
    await ask(stage.port, "POST", "/api/chat", BODY)
    await wait_until(lambda: stage.tally, what="the line of the log")
    lease, status, sent, *times, completion = stage.tally[0].split()
    assert (lease, status, sent, completion) == ("lease-1", "200", "13", "OK")
    assert all(float(text) >= 0 for text in times)
    assert len(times) == 2


async def hang_up(caller: Caller) -> None:
    await begin(caller)
    raise Hangup


async def stop_short(caller: Caller) -> None:
    await caller.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    raise Hangup


@pytest.mark.parametrize("how", [hang_up, stop_short])
async def test_that_a_node_broke_an_answer_off_is_told_before_its_line(stage: Stage, how: object) -> None:
    stage.answers = how  # type: ignore[assignment]
    assert not (await ask(stage.port, "POST", "/api/chat", BODY)).whole
    await wait_until(lambda: stage.tally, what="the line of the log")
    router, carried = ScriptedRouter(), Carried(RequestId(REQUEST_ID), route=Route.CHAT, stream=True)
    carried.connection = stage.selection[0].fields["x-connection"].encode()
    handover = Handover(router, secret=b"s", lives=router.lives, now=lambda: 0.0)
    handover.add(carried)
    (cut,) = stage.cuts
    Tally(router, handover).take(cut)
    assert carried.cut, cut


async def test_a_client_that_leaves_is_no_cut(stage: Stage) -> None:
    async def answer(caller: Caller) -> None:
        await begin(caller)
        await caller.wait_for_departure()
        raise Hangup

    stage.answers = answer
    async with talk(stage.port, "POST", "/api/chat", BODY) as heard:
        await heard.wait_for(b'{"n":1}\n')
    await wait_until(lambda: stage.tally, what="the line of the log")
    assert stage.cuts == []


# ---------------------------------------------------------------- what nginx itself refuses


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 300_000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
        (b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"TRACE / HTTP/1.1\r\nHost: x\r\n\r\n", 405),
    ],
    ids=["nonsense", "long header", "long target", "two lengths", "no length", "no host", "trace"],
)
async def test_what_nginx_refuses_itself_is_one_json_sentence(stage: Stage, data: bytes, status: int) -> None:
    answer = parse_answer(await raw_request(stage.port, data))
    assert answer.status == status
    assert list(json.loads(answer.body)) == ["error"]
    assert len(answer.headers["x-request-id"]) == 36
    assert (stage.node, stage.coordinator) == ([], [])


# ---------------------------------------------------------------- HTTPS and HTTP/2


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    trio.run(_quiet, [needed("openssl", "openssl"), "req", "-x509", *options, "-keyout", str(key), "-out", str(cert)])
    return cert, key


async def _quiet(command: list[str]) -> None:
    await trio.run_process(command, capture_stdout=True, capture_stderr=True, stdin=b"")


@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_https(certificate: tuple[Path, Path], version: str) -> None:
    async with open_stage(tls=certificate) as stage:
        command = [needed("curl", "curl"), "-sN", "--cacert", str(certificate[0]), "--resolve", f"localhost:{stage.port}:127.0.0.1"]
        command += [f"--http{version}", "-w", "%{http_version} %{http_code}", "-d", "{}", f"https://localhost:{stage.port}/api/chat"]
        done = await trio.run_process(command, capture_stdout=True, stdin=b"")
        assert done.stdout == b'{"done":true}' + f"{version} 200".encode()
        assert stage.node[0].body == b"{}"
        assert ("x-connection" in stage.selection[0].fields) is (version == "1.1"), "with HTTP/2 requests of one connection overlap"

        async def cut(caller: Caller) -> None:
            await begin(caller)
            raise Hangup

        stage.answers = cut
        done = await trio.run_process(command, capture_stdout=True, check=False, stdin=b"")
        assert done.returncode in (18, 92), "a cut is a broken transfer here too"
        assert b'{"n":1}' in done.stdout
        command[-1] = f"https://localhost:{stage.port}/api/tags"
        done = await trio.run_process(command, capture_stdout=True, stdin=b"")
        assert b"coordinator" in done.stdout
        assert stage.coordinator[-1].fields["host"] == f"localhost:{stage.port}"
        answer = parse_answer(await raw_request(stage.port, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
        assert (answer.status, list(answer.json())) == (400, ["error"])
