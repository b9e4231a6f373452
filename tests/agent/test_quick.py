"""What a gateway serves without a task, and what becomes the task's business on the way. That the answers are the same is tested with all
others: `test_gateway` and `test_inference` ask each question both ways."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from agent.gateway import Gateway
from agent.inference import Inference
from core.events import Route
from core.messages import EndingReport
from edge.wire import ClientConnection, RequestHead
from tests.agent import gateways
from tests.agent.fakes import DONE, LAST_CHUNK, LIMIT_S, STREAM_HEAD, Handler, Heard, answer, chunk, line, until
from tests.agent.gateways import CHAT, Setup, gateway_for, saying

GOOD = b'{"model":"m","message":{"role":"assistant","content":"hi"},"done":true}'


class Counted:
    """How often a connection's task was needed: from the beginning of a request on, or for the rest of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole = self.runs = 0
        serve, run = Gateway.serve, Inference.run

        async def counted_serve(gateway: Gateway, conn: ClientConnection, head: RequestHead, route: Route) -> None:
            self.whole += 1
            await serve(gateway, conn, head, route)

        async def counted_run(one: Inference, body: object) -> None:
            self.runs += 1
            await run(one, body)  # type: ignore[arg-type]

        monkeypatch.setattr(Gateway, "serve", counted_serve)
        monkeypatch.setattr(Inference, "run", counted_run)

    @property
    def rests(self) -> int:
        return self.runs - self.whole


@asynccontextmanager
async def warm(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Setup, Counted]]:
    """A gateway that has a kept connection to Ollama."""
    monkeypatch.setattr(gateways, "WARM", True)
    async with gateway_for(handler) as setup:
        yield setup, Counted(monkeypatch)


async def test_a_small_whole_answer_needs_no_task(monkeypatch: pytest.MonkeyPatch) -> None:
    async with warm(saying(answer(200, GOOD)), monkeypatch) as (setup, counted):
        for _ in range(3):
            raw = await setup.chat(request_id="r-1")
            assert (raw.status, raw.body, raw.headers["x-request-id"]) == (200, GOOD, "r-1")
        assert (counted.whole, counted.runs) == (0, 0)
        assert [heard.body for heard in setup.ollama.heard] == [CHAT] * 3
        assert setup.gateway.average_response_time_ms is not None


async def test_an_answer_may_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answer(200, GOOD)

    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        for piece in (whole[:5], whole[5:70], whole[70:-3], whole[-3:]):
            await stream.send_all(piece)
            await trio.lowlevel.checkpoint()

    async with warm(handler, monkeypatch) as (setup, counted):
        assert (await setup.chat()).body == GOOD
        assert counted.whole == 0


@pytest.mark.parametrize(
    "pieces",
    [
        (STREAM_HEAD, chunk(line("one")), chunk(DONE) + LAST_CHUNK),
        (answer(500, {"error": "x"}),),
        (answer(200, GOOD.replace(b'"done":true', b'"done":false')),),
        (answer(200, b'{"x":"' + b"y" * 100_000 + b'"}'),),
    ],
    ids=["stream", "error", "unfinished", "large"],
)
async def test_the_rest_of_what_is_not_so_common_is_the_tasks(pieces: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    async with warm(saying(*pieces), monkeypatch) as (setup, counted):
        raw = await setup.chat()
        assert raw.whole
        assert (counted.whole, counted.rests) == (0, 1)
        assert len(setup.ollama.heard) == 1
        assert setup.gateway.in_flight() == ()


async def test_what_cannot_be_held_in_memory_is_the_tasks_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    async with warm(saying(answer(200, GOOD)), monkeypatch) as (setup, counted):
        setup.gateway._budget.memory_bytes = 1
        assert (await setup.chat()).body == GOOD
        assert counted.whole == 1
        assert setup.gateway._budget.held_bytes == 0


async def test_a_mistake_is_told_once_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with warm(saying(answer(200, GOOD)), monkeypatch) as (setup, _):
        reports: list[EndingReport] = []
        setup.gateway.ended = reports.append

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as broken:
            broken.setattr(Inference, "answer_now", fail)
            raw = await setup.chat(more="X-Ollama-Router-Edge: nginx\r\n")
        assert (raw.status, list(json.loads(raw.body))) == (500, ["error"])
        assert [report.ending for report in reports] == ["error"]
        assert setup.gateway.in_flight() == ()
        assert setup.gateway._budget.held_bytes == 0
        assert (await setup.chat()).status == 200


async def test_a_mistake_before_anything_began_closes_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with warm(saying(answer(200, GOOD)), monkeypatch) as (setup, _):

        def fail(*_: object) -> bool:
            raise ZeroDivisionError

        with monkeypatch.context() as broken:
            broken.setattr(Gateway, "allowed", fail)
            async with await setup.send("POST", "/api/chat", CHAT) as stream:
                with trio.fail_after(LIMIT_S):
                    assert await stream.receive_some() == b""
        assert (await setup.chat()).status == 200


async def test_a_gateway_that_stops_leaves_no_request_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def handler(stream: trio.SocketStream, _: Heard) -> None:
        while await stream.receive_some():
            pass

    async with warm(handler, monkeypatch) as (setup, counted):
        stream = await setup.send("POST", "/api/chat", CHAT, request_id="r-7")
        await until(lambda: setup.gateway.in_flight() == ("r-7",))
        assert counted.runs == 0
    await stream.aclose()
    assert setup.gateway.in_flight() == ()
    assert setup.gateway._budget.held_bytes == 0
