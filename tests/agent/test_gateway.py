"""The gateway over real sockets, in front of an Ollama that does what each test scripts."""

import json
import socket

import pytest
import trio

from agent.gateway import Gateway
from agent.log import LogTail
from core.errors import ConfigError
from core.messages import PullOrder
from tests.agent import gateways
from tests.agent.fakes import DONE, LAST_CHUNK, LIMIT_S, STREAM_HEAD, Handler, Heard, answer, chunk, line, receive, until
from tests.agent.gateways import CHAT, CREDENTIAL, gateway_for, never, saying


@pytest.fixture(autouse=True, params=[False, True], ids=["cold", "warm"])
def _warm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "WARM", request.param)


# ---------------------------------------------------------------- orders to download


async def test_orders_to_download_are_taken_by_who_does_them() -> None:
    async with gateway_for(never) as setup:
        order = b'{"task_id":"t","model":"m"}'
        assert (await setup.ask("POST", "/pull", order)).status == 503
        taken: list[PullOrder] = []

        class Doer:
            take = staticmethod(taken.append)

            @staticmethod
            def stop(task_id: str) -> bool:
                return task_id == "t"

        setup.gateway.pulls = Doer()  # type: ignore[assignment]
        assert (await setup.ask("POST", "/pull", order, credential=None)).status == 401
        assert (await setup.ask("POST", "/pull", b"[]")).status == 400
        raw = await setup.ask("POST", "/pull", order)
        assert (raw.status, json.loads(raw.body), [one.task_id for one in taken]) == (202, {"status": "accepted", "task_id": "t"}, ["t"])
        assert (await setup.ask("DELETE", "/pull/t")).status == 202
        assert (await setup.ask("DELETE", "/pull/u")).status == 404
        wrong = await setup.ask("GET", "/pull")
        assert (wrong.status, wrong.headers["allow"]) == (405, "POST, DELETE")
        assert setup.ollama.heard == []


# ---------------------------------------------------------------- who may pass


@pytest.mark.parametrize("shown", [None, "", "secret-2", "secret-1x", "secret-"])
@pytest.mark.parametrize(
    ("method", "target"), [("POST", "/api/chat"), ("GET", "/api/tags"), ("GET", "/logs"), ("DELETE", "/api/delete"), ("GET", "/")]
)
async def test_without_the_credential_nothing_passes(shown: str | None, method: str, target: str) -> None:
    async with gateway_for(never) as setup:
        raw = await setup.ask(method, target, CHAT if method != "GET" else None, credential=shown)
        assert raw.status == 401
        assert "send requests to the router" in json.loads(raw.body)["error"]
        assert setup.ollama.heard == []


async def test_before_there_is_a_credential_nobody_passes() -> None:
    async with gateway_for(never, credential=None) as setup:
        for shown in (None, "", "None"):
            assert (await setup.chat(credential=shown)).status == 401


@pytest.mark.parametrize("target", ["/api//chat", "/api/./chat", "/x/../api/chat", "/api%2Fchat"])
async def test_no_spelling_of_a_path_passes_without_the_credential(target: str) -> None:
    async with gateway_for(never) as setup:
        assert (await setup.ask("POST", target, CHAT, credential=None)).status in (307, 401)


async def test_healthz_is_open() -> None:
    async with gateway_for(never) as setup:
        raw = await setup.ask("GET", "/healthz", credential=None)
        assert (raw.status, raw.body) == (200, b'{"status":"ok"}')
        assert (await setup.ask("HEAD", "/healthz", credential=None)).status == 200
        refused = await setup.ask("POST", "/healthz", b"{}", credential=None)
        assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")


async def test_logs() -> None:
    class Nowhere:
        def write(self, text: str) -> None: ...

        def flush(self) -> None: ...

    tail = LogTail(Nowhere())  # type: ignore[arg-type]
    for number in range(300):
        tail.write(f"line {number}\n")
    async with gateway_for(never, tail=tail) as setup:
        assert json.loads((await setup.ask("GET", "/logs")).body)["lines"] == [f"line {number}" for number in range(100, 300)]
        assert json.loads((await setup.ask("GET", "/logs?tail=2")).body)["lines"] == ["line 298", "line 299"]
        for bad in ("0", "2001", "x", "-1", "1e3", "99999999999"):
            raw = await setup.ask("GET", f"/logs?tail={bad}")
            assert raw.status == 400
            assert "from 1 to 2000" in json.loads(raw.body)["error"]


# ---------------------------------------------------------------- inference, as it should be


async def test_a_stream_passes_byte_for_byte_and_so_does_the_request() -> None:
    lines = [line(f"token {number} \u2603") for number in range(5)]
    async with gateway_for(saying(STREAM_HEAD, *(chunk(each) for each in lines), chunk(DONE) + LAST_CHUNK)) as setup:
        raw = await setup.chat(request_id="r-1", more="X-Custom: kept\r\nAuthorization: Bearer mine\r\n")
        assert raw.status == 200
        assert raw.whole
        assert raw.body == b"".join(lines) + DONE
        assert raw.headers["content-type"] == "application/x-ndjson"
        assert raw.headers["x-request-id"] == "r-1"
        (heard,) = setup.ollama.heard
        assert (heard.method, heard.target, heard.body) == ("POST", "/api/chat", CHAT)
        assert heard.header("Host") == f"127.0.0.1:{setup.ollama.port}"
        assert heard.header("X-Custom") == "kept"
        assert heard.header("X-Request-Id") == "r-1"
        assert heard.header("Authorization") is None
        assert heard.header("X-Ollama-Router-Credential") is None


async def test_each_token_passes_at_once() -> None:
    seen = trio.Event()

    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await stream.send_all(STREAM_HEAD + chunk(line("first")))
        await seen.wait()
        await stream.send_all(chunk(DONE) + LAST_CHUNK)

    async with gateway_for(handler) as setup, await setup.send("POST", "/api/chat", CHAT) as stream:
        got = b""
        with trio.fail_after(LIMIT_S):
            while line("first") not in got:
                got += await stream.receive_some()
        seen.set()
        with trio.fail_after(LIMIT_S):
            while not got.endswith(LAST_CHUNK):
                got += await stream.receive_some()


async def test_a_whole_answer_passes_byte_for_byte() -> None:
    body = b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"hi"},"done":true,"x":1}'
    async with gateway_for(saying(answer(200, body))) as setup:
        raw = await setup.chat(b'{"model":"m","messages":[],"stream":false}')
        assert (raw.status, raw.body) == (200, body)
        assert setup.gateway.average_response_time_ms is not None


@pytest.mark.parametrize(
    ("status", "text"), [(404, "model 'x' not found"), (500, "bad tensor layout"), (503, "server busy"), (400, "invalid model name")]
)
async def test_ollamas_own_errors_pass_as_they_came(status: int, text: str) -> None:
    async with gateway_for(saying(answer(status, {"error": text}))) as setup:
        raw = await setup.chat()
        assert (raw.status, json.loads(raw.body)) == (status, {"error": text})
        assert "x-ollama-router-failure" not in raw.headers


async def test_a_model_question_needs_no_body() -> None:
    body = b'{"id":"m","object":"model","created":1,"owned_by":"library"}\n'
    async with gateway_for(saying(answer(200, body))) as setup:
        raw = await setup.ask("GET", "/v1/models/m")
        assert (raw.status, raw.body) == (200, body)
        assert setup.ollama.heard[0].body == b""


async def test_a_kept_connection_serves_the_next_request_and_a_stale_one_is_replaced() -> None:
    served = 0

    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        nonlocal served
        served += 1
        if served == 3:  # it had closed before it saw this one
            served = 0
            await stream.aclose()
            return
        await stream.send_all(STREAM_HEAD + chunk(DONE) + LAST_CHUNK)

    async with gateway_for(handler) as setup:
        for _ in range(3):
            assert (await setup.chat()).status == 200


# ---------------------------------------------------------------- inference, as it should not be


@pytest.mark.parametrize(
    ("handler", "failure"),
    [
        (None, "refused"),
        (saying(close=True), "died"),
        (saying(STREAM_HEAD, close=True), "died"),
        (saying(STREAM_HEAD + LAST_CHUNK), "empty"),
        (saying(b"SSH-2.0-OpenSSH\r\n\r\n", close=True), "garbled"),
    ],
)
async def test_a_failure_before_the_first_byte_is_a_502_that_says_which(handler: Handler | None, failure: str) -> None:
    async with gateway_for(handler) as setup:
        raw = await setup.chat(request_id="r-2")
        assert raw.status == 502
        assert raw.headers["x-ollama-router-failure"] == failure
        assert raw.headers["x-request-id"] == "r-2"
        assert list(json.loads(raw.body)) == ["error"]
        assert setup.gateway.in_flight() == ()


async def test_an_endless_error_keeps_its_status() -> None:
    async with gateway_for(saying(b"HTTP/1.1 500 Oh\r\nContent-Length: 3000000\r\n\r\n" + b"x" * 2_000_000)) as setup:
        raw = await setup.chat()
        assert raw.status == 500
        assert "x-ollama-router-failure" not in raw.headers


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (b'{"model":"","created_at":"0001-01-01T00:00:00Z","message":{"role":"","content":""},"done":false}', "blank"),
        (b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"hi"},"done":false}', None),
    ],
)
async def test_a_whole_answer_that_failed_is_left_to_the_coordinator(body: bytes, failure: str | None) -> None:
    async with gateway_for(saying(answer(200, body))) as setup:
        raw = await setup.chat(b'{"model":"m","stream":false}')
        if failure is None:
            assert (raw.status, raw.body) == (200, body)
        else:
            assert (raw.status, raw.headers["x-ollama-router-failure"]) == (502, failure)


async def test_a_cut_is_told_in_band_and_has_no_last_chunk() -> None:
    async with gateway_for(saying(STREAM_HEAD, chunk(line("one")), chunk(line("two")), close=True)) as setup:
        raw = await setup.chat()
        assert raw.status == 200
        assert not raw.whole
        *tokens, last = raw.body.splitlines(keepends=True)
        assert tokens == [line("one"), line("two")]
        assert list(json.loads(last)) == ["error"]


async def test_a_cut_inside_a_line_gets_its_error_on_a_line_of_its_own() -> None:
    async with gateway_for(saying(STREAM_HEAD, chunk(line("one")[:20]), close=True)) as setup:
        raw = await setup.chat()
        assert not raw.whole
        broken, last = raw.body.split(b"\n", 1)
        assert broken == line("one")[:20]
        assert "error" in json.loads(last)


async def test_an_end_without_done_is_told_too() -> None:
    async with gateway_for(saying(STREAM_HEAD, chunk(line("one")), LAST_CHUNK)) as setup:
        raw = await setup.chat()
        assert not raw.whole
        assert "error" in json.loads(raw.body.splitlines()[-1])


async def test_a_cut_event_stream_ends_with_an_error_event() -> None:
    head = STREAM_HEAD.replace(b"application/x-ndjson", b"text/event-stream")
    async with gateway_for(saying(head, chunk(b'data: {"choices":[]}\n\n'), close=True)) as setup:
        raw = await setup.ask("POST", "/v1/chat/completions", b'{"model":"m","stream":true,"messages":[]}')
        assert not raw.whole
        assert b'\ndata: {"error":' in raw.body
        assert b"[DONE]" not in raw.body


async def test_half_an_answer_is_no_answer() -> None:
    whole = answer(200, {"model": "m", "message": {"content": "hello"}, "done": True})
    async with gateway_for(saying(whole[:-5], close=True)) as setup:
        raw = await setup.chat(b'{"model":"m","messages":[],"stream":false}')
        assert (raw.status, raw.headers["x-ollama-router-failure"]) == (502, "died")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /api/chat\r\n\r\n", 400),
        (b"POST /api/chat HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", 431),
    ],
)
async def test_nonsense_is_refused_in_one_sentence(request_bytes: bytes, status: int) -> None:
    async with gateway_for(never) as setup, await trio.open_tcp_stream("127.0.0.1", setup.port) as stream:
        await stream.send_all(request_bytes)
        raw = await receive(stream)
        assert raw.status == status
        assert list(json.loads(raw.body)) == ["error"]


# ---------------------------------------------------------------- leaving, counting


@pytest.mark.parametrize("how", ["close", "half-close", "reset"])
async def test_a_caller_that_leaves_closes_the_local_request(how: str) -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await stream.send_all(STREAM_HEAD + chunk(line("one")))
        while await stream.receive_some():
            pass
        raise trio.BrokenResourceError  # counted as left

    async with gateway_for(handler) as setup:
        stream = await setup.send("POST", "/api/chat", CHAT, request_id="r-3")
        await until(lambda: setup.gateway.in_flight() == ("r-3",))
        with trio.fail_after(LIMIT_S):
            await stream.receive_some()
        if how == "half-close":
            await stream.send_eof()
        elif how == "reset":
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()
        else:
            await stream.aclose()
        await until(lambda: setup.ollama.left == 1, 1.0)
        await until(lambda: setup.gateway.in_flight() == ())


async def test_a_caller_that_leaves_during_prefill_closes_the_local_request() -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        while await stream.receive_some():
            pass
        raise trio.BrokenResourceError

    async with gateway_for(handler) as setup:
        stream = await setup.send("POST", "/api/chat", CHAT)
        await until(lambda: setup.ollama.heard)
        await stream.aclose()
        await until(lambda: setup.ollama.left == 1, 1.0)
        await until(lambda: setup.gateway.in_flight() == ())


async def test_in_flight_is_exact() -> None:
    go = trio.Event()

    async def handler(stream: trio.SocketStream, heard: Heard) -> None:
        await go.wait()
        await stream.send_all(STREAM_HEAD + chunk(DONE) + LAST_CHUNK)

    async with gateway_for(handler) as setup, trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(lambda number=number: setup.chat(request_id=f"r-{number}"))  # type: ignore[misc]
        await until(lambda: len(setup.ollama.heard) == 5)
        assert sorted(setup.gateway.in_flight()) == [f"r-{number}" for number in range(5)]
        go.set()
        await until(lambda: setup.gateway.in_flight() == ())


async def test_a_request_without_an_id_gets_one() -> None:
    async with gateway_for(saying(STREAM_HEAD, chunk(DONE) + LAST_CHUNK)) as setup:
        raw = await setup.chat()
        assert len(raw.headers["x-request-id"]) == 36
        assert setup.ollama.heard[0].header("X-Request-Id") == raw.headers["x-request-id"]


# ---------------------------------------------------------------- everything else passes as it is


async def test_other_routes_pass_both_ways() -> None:
    async with gateway_for(saying(answer(200, {"models": []}, X_Mine="1"))) as setup:
        raw = await setup.ask("GET", "/api/tags?x=%2F", request_id="r-9")
        assert (raw.status, raw.body, raw.headers["x-mine"]) == (200, b'{"models": []}', "1")
        (heard,) = setup.ollama.heard
        assert (heard.target, heard.header("X-Request-Id"), heard.header("Host")) == (
            "/api/tags?x=%2F",
            "r-9",
            f"127.0.0.1:{setup.ollama.port}",
        )
        assert setup.gateway.in_flight() == ()


async def test_a_pull_streams_through_and_its_cut_stays_a_cut() -> None:
    status = b'{"status":"pulling manifest"}\n'
    async with gateway_for(saying(STREAM_HEAD, chunk(status), close=True)) as setup:
        raw = await setup.ask("POST", "/api/pull", b'{"model":"m"}')
        assert (raw.body, raw.whole) == (status, False)
    async with gateway_for(saying(STREAM_HEAD, chunk(status), LAST_CHUNK)) as setup:
        raw = await setup.ask("POST", "/api/pull", b'{"model":"m"}')
        assert (raw.body, raw.whole) == (status, True)


async def test_a_head_request_has_no_body() -> None:
    async with gateway_for(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n")) as setup:
        raw = await setup.ask("HEAD", "/")
        assert (raw.status, raw.headers["content-length"]) == (200, "17")


async def test_a_chunked_body_arrives_whole() -> None:
    async with gateway_for(saying(answer(201, b""))) as setup:
        stream = await trio.open_tcp_stream("127.0.0.1", setup.port)
        head = f"POST /api/blobs/sha256:1 HTTP/1.1\r\nHost: x\r\nX-Ollama-Router-Credential: {CREDENTIAL}\r\n"
        await stream.send_all(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(b"abc") + chunk(b"def") + LAST_CHUNK)
        async with stream:
            assert (await receive(stream)).status == 201
        assert setup.ollama.heard[0].body == b"abcdef"


async def test_a_large_body_streams_through() -> None:
    body = bytes(range(256)) * 8192
    async with gateway_for(saying(answer(201, b""))) as setup:
        assert (await setup.ask("POST", "/api/blobs/sha256:2", body)).status == 201
        assert setup.ollama.heard[0].body == body


async def test_when_ollama_is_away_other_routes_say_so() -> None:
    async with gateway_for(None) as setup:
        raw = await setup.ask("GET", "/api/tags")
        assert (raw.status, raw.headers["x-ollama-router-failure"]) == (502, "refused")
        assert "Ollama did not answer" in json.loads(raw.body)["error"]
    async with gateway_for(saying(close=True)) as setup:
        assert (await setup.ask("GET", "/api/tags")).headers["x-ollama-router-failure"] == "died"


async def test_leaving_in_the_middle_of_a_pull_closes_it() -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await stream.send_all(STREAM_HEAD + chunk(b"{}\n"))
        while await stream.receive_some():
            pass
        raise trio.BrokenResourceError

    async with gateway_for(handler) as setup:
        stream = await setup.send("POST", "/api/pull", b"{}")
        with trio.fail_after(LIMIT_S):
            await stream.receive_some()
        await stream.aclose()
        await until(lambda: setup.ollama.left == 1, 1.0)


async def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"AGENT_API_PORT: port {port} cannot be opened .another program uses it"):
            Gateway("http://127.0.0.1:1").listen("127.0.0.1", port)
