"""Requests that nginx brings to a gateway: what is told of their ends, and of answers that are not good."""

import json

import pytest
import trio

from core.events import Failure, Route
from core.messages import EndingReport
from edge.relay import Failed
from edge.told import told
from tests.agent import gateways
from tests.agent.fakes import DONE, LAST_CHUNK, LIMIT_S, STREAM_HEAD, Handler, Heard, Raw, answer, chunk, line, receive, until
from tests.agent.gateways import CHAT, CREDENTIAL, Setup, gateway_for, never, saying


@pytest.fixture(autouse=True, params=[False, True], ids=["cold", "warm"])
def _warm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateways, "WARM", request.param)


VIA_NGINX = "X-Ollama-Router-Edge: nginx\r\n"
COUNTS = {
    "prompt_eval_count": 3, "eval_count": 5, "total_duration": 70, "load_duration": 10, "prompt_eval_duration": 20, "eval_duration": 30,
}  # fmt: skip
UNFINISHED = b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"hi"},"done":false}'


async def ended(setup: Setup, **more: str) -> tuple[Raw, EndingReport]:
    """A chat that nginx brings, and what is told of its end."""
    reports: list[EndingReport] = []
    setup.gateway.ended = reports.append
    raw = await setup.chat(request_id="r-1", more=VIA_NGINX, **more)
    await until(lambda: reports)
    (report,) = reports
    assert report.request_id == "r-1"
    assert 0 <= (report.ttft_ms or 0) <= report.duration_ms < 1000 * LIMIT_S
    assert setup.gateway.in_flight() == ()
    return raw, report


def told_of(report: EndingReport) -> tuple[str, int, str | None, bool]:
    return report.ending, report.status, report.node_fault, report.ttft_ms is not None


async def test_a_good_end_is_told_with_what_it_cost() -> None:
    done = line("", done=True, **COUNTS).replace(b": ", b":")
    async with gateway_for(saying(STREAM_HEAD, chunk(line("one")), chunk(done) + LAST_CHUNK)) as setup:
        raw, report = await ended(setup)
        assert raw.body == line("one") + done
        assert told_of(report) == ("success", 200, None, True)
        assert (report.message, report.body_bytes, report.chunks) == ("", len(raw.body), 2)
        assert (report.prompt_tokens, report.output_tokens) == (3, 5)
        assert (report.total_ns, report.load_ns, report.prompt_ns, report.eval_ns) == (70, 10, 20, 30)
        assert setup.ollama.heard[0].header("X-Ollama-Router-Edge") is None
    whole = {"model": "m", "done": True, **COUNTS}
    async with gateway_for(saying(answer(200, whole))) as setup:
        raw, report = await ended(setup)
        assert told_of(report) == ("success", 200, None, True)
        assert (report.output_tokens, report.body_bytes) == (5, len(raw.body))


async def test_only_what_nginx_brings_is_told() -> None:
    async with gateway_for(saying(STREAM_HEAD, chunk(DONE) + LAST_CHUNK)) as setup:
        reports: list[EndingReport] = []
        setup.gateway.ended = reports.append
        for more in ("", "X-Ollama-Router-Edge: apache\r\n"):
            assert (await setup.chat(more=more)).status == 200
        assert (await setup.ask("GET", "/api/tags", more=VIA_NGINX)).status == 200
        assert reports == []


async def test_an_end_that_nobody_wants_to_hear_of_is_no_failure() -> None:
    async with gateway_for(saying(STREAM_HEAD, chunk(DONE) + LAST_CHUNK)) as setup:
        assert (await setup.chat(more=VIA_NGINX)).status == 200


@pytest.mark.parametrize(
    ("pieces", "fault", "text"),
    [
        ((STREAM_HEAD, chunk(line("one"))), "died", "closed the connection"),
        ((STREAM_HEAD, chunk(line("one")), LAST_CHUNK), "died", "without saying that it was done"),
        ((STREAM_HEAD, chunk(line("one")), chunk(b'{"error":"out of luck"}\n') + LAST_CHUNK), "answered", "out of luck"),
        ((STREAM_HEAD, chunk(line("one")), b"zz\r\n"), "garbled", "malformed"),
        ((STREAM_HEAD, *(chunk(line("no").replace(b": ", b":")) for _ in range(31)), LAST_CHUNK), None, "repeated itself"),
    ],
)
async def test_a_bad_end_is_told_with_its_reason(pieces: tuple[bytes, ...], fault: str | None, text: str) -> None:
    async with gateway_for(saying(*pieces, close=True)) as setup:
        raw, report = await ended(setup)
        assert raw.status == 200
        assert told_of(report) == ("error", 200, fault, True)
        assert text in report.message
        assert raw.body[: report.body_bytes].endswith(b"\n")
        assert raw.body[report.body_bytes :].count(b"error") == (fault != "answered")


@pytest.mark.parametrize(
    ("handler", "failure"),
    [
        (None, "refused"),
        (saying(close=True), "died"),
        (saying(STREAM_HEAD + LAST_CHUNK), "empty"),
        (saying(b"SSH-2.0-OpenSSH\r\n\r\n", close=True), "garbled"),
        (saying(answer(200, UNFINISHED.replace(b"2026-01-01", b"0001-01-01"))), "blank"),
    ],
)
async def test_nginx_is_told_which_failure_it_was(handler: Handler | None, failure: str) -> None:
    async with gateway_for(handler) as setup:
        raw, report = await ended(setup)
        assert told_of(report) == ("error", 502, failure, False)
        fields = {name.encode(): value.encode() for name, value in raw.headers.items()}
        assert told(Route.CHAT, fields, raw.status) == Failed(failure=Failure(failure), text=json.loads(raw.body)["error"])
        assert report.message == json.loads(raw.body)["error"]


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_nginx_is_told_what_ollama_answered(status: int) -> None:
    async with gateway_for(saying(answer(status, {"error": "no \u2603"}))) as setup:
        raw, report = await ended(setup)
        assert told_of(report) == ("error", status, "answered", False)
        assert (raw.status, raw.headers["content-type"], raw.whole) == (status, "application/json", True)
        failed = told(Route.CHAT, {name.encode(): value.encode() for name, value in raw.headers.items()}, raw.status)
        assert failed is not None
        assert failed.kept is not None
        assert (failed.status, failed.text, failed.kept.body) == (status, "no \u2603", raw.body)


async def test_an_answer_that_says_itself_that_it_is_unfinished_is_none_for_nginx() -> None:
    async with gateway_for(saying(answer(200, UNFINISHED))) as setup:
        raw, report = await ended(setup)
        assert (raw.status, raw.headers["x-ollama-router-failure"], raw.body) == (502, "incomplete", UNFINISHED)
        assert told_of(report) == ("error", 502, "incomplete", False)
        failed = told(Route.CHAT, {name.encode(): value.encode() for name, value in raw.headers.items()}, raw.status)
        assert failed is not None
        assert failed.kept is not None
        assert (failed.kept.head.status, failed.kept.body) == (200, UNFINISHED)


@pytest.mark.parametrize("before", [b"", STREAM_HEAD + chunk(line("one"))])
async def test_a_caller_that_leaves_is_told_as_that(before: bytes) -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        await stream.send_all(before)
        while await stream.receive_some():
            pass
        raise trio.BrokenResourceError

    async with gateway_for(handler) as setup:
        reports: list[EndingReport] = []
        setup.gateway.ended = reports.append
        async with await setup.send("POST", "/api/chat", CHAT, request_id="r-4", more=VIA_NGINX):
            await until(lambda: setup.ollama.heard)
            await until(lambda: setup.gateway.in_flight() == ("r-4",))
        await until(lambda: reports)
        assert told_of(reports[0]) == ("cancelled", 499, None, bool(before))
        await until(lambda: setup.ollama.left == 1)


async def test_a_caller_that_leaves_within_its_body_and_one_that_cannot_be_read() -> None:
    async with gateway_for(never) as setup:
        reports: list[EndingReport] = []
        setup.gateway.ended = reports.append
        head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nX-Ollama-Router-Credential: {CREDENTIAL}\r\nX-Request-Id: r-5\r\n{VIA_NGINX}"
        async with await trio.open_tcp_stream("127.0.0.1", setup.port) as stream:
            await stream.send_all(head.encode() + b"Content-Length: 10\r\n\r\nabc")
            await until(lambda: setup.gateway.in_flight() == ("r-5",))
        await until(lambda: reports)
        assert told_of(reports[0]) == ("cancelled", 499, None, False)
        async with await trio.open_tcp_stream("127.0.0.1", setup.port) as stream:
            await stream.send_all(head.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
            assert (await receive(stream)).status == 400
        await until(lambda: len(reports) == 2)
        assert told_of(reports[1]) == ("error", 400, None, False)
