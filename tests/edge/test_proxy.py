"""One request through the proxy: a scripted router, a scripted node, real sockets."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
import trio

from core.events import (
    AttemptEnded,
    Cut,
    Effect,
    Ending,
    Event,
    Failure,
    FirstByte,
    Forward,
    Lease,
    PassOn,
    Refuse,
    RequestCame,
    RequestEffect,
    Settled,
    Upstream,
    Wait,
)
from core.units import AgentId, LeaseId, RequestId
from edge.body import BodyBudget
from edge.desk import Desk
from edge.listener import Gate, Listener, bind, quick_routes
from edge.live import ProxyOptions
from edge.pool import Pool
from edge.proxy import Proxy
from edge.quick import LastingClient, Quick
from edge.web import WebPass
from edge.wire import Watch
from tests.fleet.rawhttp import Answer, Caller, Hangup, RawServer, ask, talk, wait_until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
LINE = b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n'
LAST = b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop"}\n'
WHOLE = LAST.rstrip()
Reply = Callable[[Event], list[RequestEffect]]


class Scripted:
    """A `Decider` that answers RequestCame and AttemptEnded from a list, and remembers what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.desks: dict[RequestId, Desk] = {}
        self.script: list[Reply] = []
        self.closed: list[RequestId] = []

    def apply(self, event: Event) -> list[Effect]:
        self.events.append(event)
        if isinstance(event, (RequestCame, AttemptEnded)):
            for effect in self.script.pop(0)(event):
                self.desks[effect.request_id].put(effect)
        return []

    def open_desk(self, request_id: RequestId) -> Desk:
        self.desks[request_id] = Desk(request_id)
        return self.desks[request_id]

    def close_desk(self, request_id: RequestId) -> None:
        del self.desks[request_id]
        self.closed.append(request_id)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def forward(port: int, *, name: str = "one", gateway: bool = False) -> Reply:
    def reply(event: Event) -> list[RequestEffect]:
        assert isinstance(event, (RequestCame, AttemptEnded))
        upstream = Upstream(host="127.0.0.1", port=port, gateway=gateway)
        lease = Lease(
            id=LeaseId(f"{event.request_id}/1"),
            request_id=event.request_id,
            agent_id=AgentId(name),
            agent_name=name,
            upstream=upstream,
            attempt=1,
        )
        return [Forward(request_id=event.request_id, lease=lease)]

    return reply


def forward_after_unloading(port: int, *models: str) -> Reply:
    def reply(event: Event) -> list[RequestEffect]:
        (effect,) = forward(port, gateway=True)(event)
        assert isinstance(effect, Forward)
        return [Forward(request_id=effect.request_id, lease=effect.lease, unload=models)]

    return reply


def refuse(status: int, text: str, retry_after_s: int | None = None) -> Reply:
    return lambda event: [Refuse(request_id=event.request_id, status=status, text=text, retry_after_s=retry_after_s)]  # type: ignore[union-attr]


def pass_on(event: Event) -> list[RequestEffect]:
    assert isinstance(event, AttemptEnded)
    return [PassOn(request_id=event.request_id)]


class Edge:
    """A listener and a proxy on a port of their own."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.router = Scripted()
        self.port = 0
        self.proxy: Proxy
        self.quick: Quick
        self.listener: Listener
        self.reported: list[Exception] = []
        """By the listener, where a test allows it."""

    async def node(self, handler: Callable[[Caller], Awaitable[None]]) -> int:
        """Start a node; returns its port."""
        port: int = await self.nursery.start(RawServer(handler).run)
        return port

    async def chat(self, **more: Any) -> Answer:
        return await ask(self.port, "POST", "/api/chat", {**CHAT, **more})

    def settled(self) -> Settled:
        (settled,) = self.router.of(Settled)
        assert isinstance(settled, Settled)
        return settled


@asynccontextmanager
async def an_edge(
    *, gate: Gate = lambda conn, head: None, lasting_client: LastingClient = lambda *_: None, may_fail: bool = False, **options: Any
) -> AsyncIterator[Edge]:
    """Requests that close their connection are not for `edge.quick`; it is there for the others, as it is at the coordinator."""
    async with trio.open_nursery() as nursery:
        edge = Edge(nursery)
        watch = Watch(sweep_every_s=0.05)
        await nursery.start(watch.run)
        pool = Pool(watch)
        numbers: Iterator[int] = count(1)
        edge.proxy = Proxy(
            edge.router,
            pool,
            budget=BodyBudget(),
            options=ProxyOptions(answer_hold_bytes=1 << 20, **options),
            new_id=lambda: RequestId(f"00000000-0000-4000-8000-{next(numbers):012d}"),
            credential_of=lambda agent_id: b"secret-of-" + agent_id.encode(),
        )
        web = WebPass(Upstream(host="127.0.0.1", port=1), pool, secret=b"s", new_id=lambda: "web")

        def report(error: Exception) -> None:
            if not may_fail:
                raise error
            edge.reported.append(error)

        edge.quick = quick = Quick(
            edge.proxy, gate=gate, lasting_client=lasting_client, routes=quick_routes(None), new_id=lambda: "quick", report=report
        )
        edge.listener = listener = Listener(
            gate=gate, proxy=edge.proxy, web=web, watch=watch, new_id=lambda: "listener", report=report, quick=quick.lane
        )
        sockets = bind("127.0.0.1", 0)
        edge.port = sockets[0].getsockname()[1]
        await nursery.start(listener.serve, sockets)
        try:
            yield edge
        finally:
            pool.close_idle()
            nursery.cancel_scope.cancel()


async def stream_two(caller: Caller) -> None:
    await caller.begin_chunks()
    await caller.chunk(LINE)
    await caller.chunk(LAST)
    await caller.end_chunks()


async def hang_up(caller: Caller) -> None:
    raise Hangup


async def test_an_answer_passes_and_is_settled() -> None:
    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(stream_two))]
        answer = await edge.chat()
        assert (answer.status, answer.body, answer.whole) == (200, LINE + LAST, True)
        assert answer.headers["x-ollama-node"] == "one"
        assert answer.headers["x-request-id"] == edge.router.closed[0]
        assert [type(event) for event in edge.router.events] == [RequestCame, FirstByte, Settled]
        assert edge.settled().ending is Ending.SUCCESS
        assert edge.settled().body_bytes == len(LINE + LAST)


async def test_the_next_node_is_tried_when_one_refuses_or_dies() -> None:
    async with an_edge() as edge:
        edge.router.script = [forward(1), forward(await edge.node(hang_up)), forward(await edge.node(stream_two), name="three")]
        answer = await edge.chat()
        assert answer.headers["x-ollama-node"] == "three"
        assert answer.body == LINE + LAST
        assert [event.failure for event in edge.router.of(AttemptEnded)] == [Failure.REFUSED, Failure.DIED]
        assert len(edge.router.of(FirstByte)) == 1


async def test_a_whole_answer_that_was_cut_is_tried_elsewhere() -> None:
    async def half(caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 500\r\n\r\n" + WHOLE)
        raise Hangup

    async def good(caller: Caller) -> None:
        await caller.answer(WHOLE)

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(half)), forward(await edge.node(good))]
        answer = await edge.chat(stream=False)
        assert (answer.status, answer.body) == (200, WHOLE)
        assert [event.failure for event in edge.router.of(AttemptEnded)] == [Failure.DIED]


async def test_a_cut_after_the_first_byte_is_told_and_never_ends_properly() -> None:
    async def cut(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        raise Hangup

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(cut))]
        answer = await edge.chat()
        assert answer.body.startswith(LINE)
        assert "error" in answer.lines()[-1]
        assert not answer.whole
        assert edge.settled().ending is Ending.ERROR
        assert edge.settled().node_fault is Failure.DIED
        assert not edge.router.of(AttemptEnded)


async def test_the_last_nodes_own_error_is_passed_on_as_it_came() -> None:
    async def busy(caller: Caller) -> None:
        await caller.answer(b'{"error":"server busy"}', status=503)

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(busy)), pass_on]
        answer = await edge.chat()
        assert (answer.status, answer.body) == (503, b'{"error":"server busy"}')
        (ended,) = edge.router.of(AttemptEnded)
        assert (ended.failure, ended.status) == (Failure.ANSWERED, 503)
        assert "server busy" in ended.text


async def test_pass_on_without_an_answer_is_an_error_of_our_own() -> None:
    async with an_edge() as edge:
        edge.router.script = [forward(1), pass_on]
        answer = await edge.chat()
        assert answer.status == 502
        assert answer.json()["error"]


@pytest.mark.parametrize(
    ("path", "where"), [("/api/chat", ("error",)), ("/v1/chat/completions", ("error", "message")), ("/v1/messages", ("error", "message"))]
)
async def test_a_refusal_has_the_envelope_of_its_route(path: str, where: tuple[str, ...]) -> None:
    async with an_edge() as edge:
        edge.router.script = [refuse(503, "server busy", retry_after_s=7)]
        answer = await ask(edge.port, "POST", path, CHAT)
        found = answer.json()
        for key in where:
            found = found[key]
        assert (answer.status, found, answer.headers["retry-after"]) == (503, "server busy", "7")
        assert edge.settled().status == 503


async def test_a_waiting_request_goes_on_when_its_turn_comes() -> None:
    async with an_edge() as edge:
        port = await edge.node(stream_two)
        edge.router.script = [lambda event: [Wait(request_id=event.request_id, position=1, why="busy")]]  # type: ignore[union-attr]
        answers: list[Answer] = []

        async def client() -> None:
            answers.append(await edge.chat())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await wait_until(lambda: edge.router.desks)
            (came,) = edge.router.of(RequestCame)
            edge.router.desks[came.request_id].put(forward(port)(came)[0])
        assert answers[0].body == LINE + LAST


async def test_a_client_that_leaves_while_waiting_is_settled_at_once() -> None:
    async with an_edge() as edge:
        edge.router.script = [lambda event: [Wait(request_id=event.request_id, position=1, why="busy")]]  # type: ignore[union-attr]
        async with talk(edge.port, "POST", "/api/chat", CHAT):
            await wait_until(lambda: edge.router.desks)
        await wait_until(lambda: edge.router.of(Settled))
        assert edge.settled().ending is Ending.CANCELLED


async def test_a_client_that_leaves_in_prefill_closes_the_nodes_connection() -> None:
    left = trio.Event()

    async def silent(caller: Caller) -> None:
        await caller.wait_for_departure()
        left.set()

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(silent))]
        async with talk(edge.port, "POST", "/api/chat", CHAT):
            await wait_until(lambda: edge.router.desks)
        with trio.fail_after(1.0):
            await left.wait()
        await wait_until(lambda: edge.router.of(Settled))
        assert edge.settled().ending is Ending.CANCELLED
        assert not edge.router.of(AttemptEnded)


async def test_the_router_is_told_what_the_request_allows() -> None:
    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(stream_two))]
        await ask(edge.port, "POST", "/api/chat", {**CHAT, "options": {"num_predict": 9}})
        (came,) = edge.router.of(RequestCame)
        assert came.output_limit == 9


async def test_a_cut_by_the_router_before_the_first_byte_moves_the_request() -> None:
    async def silent(caller: Caller) -> None:
        (came,) = edge.router.of(RequestCame)
        edge.router.desks[came.request_id].put(Cut(request_id=came.request_id, reason="its node is offline"))
        await caller.wait_for_departure()

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(silent)), forward(await edge.node(stream_two), name="two")]
        answer = await edge.chat()
        assert answer.headers["x-ollama-node"] == "two"
        (ended,) = edge.router.of(AttemptEnded)
        assert (ended.failure, ended.text) == (Failure.VANISHED, "its node is offline")


async def test_a_cut_that_comes_before_the_attempt_has_begun_moves_the_request() -> None:
    async with an_edge() as edge:
        seen: list[Caller] = []

        async def hangs(caller: Caller) -> None:
            seen.append(caller)
            await caller.wait_for_departure()

        first = forward(await edge.node(hangs))
        edge.router.script = [
            lambda event: [*first(event), Cut(request_id=event.request_id, reason="its node is offline")],  # type: ignore[union-attr]
            forward(await edge.node(stream_two), name="two"),
        ]
        with trio.fail_after(5.0):
            answer = await edge.chat()
        assert answer.headers["x-ollama-node"] == "two"
        assert not seen


async def test_a_cut_may_have_the_node_unload_once_its_connection_is_closed() -> None:
    seen: list[str] = []

    async def node(caller: Caller) -> None:
        if caller.target == "/api/generate":
            seen.append(json.loads(caller.body)["model"])
            await caller.answer(b"{}")
            return
        (came,) = edge.router.of(RequestCame)
        edge.router.desks[came.request_id].put(Cut(request_id=came.request_id, reason="it hangs", unload=("old:latest",)))
        await caller.wait_for_departure()
        seen.append("closed")

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(node)), forward(await edge.node(stream_two), name="two")]
        answer = await edge.chat()
        assert answer.headers["x-ollama-node"] == "two"
        assert sorted(seen) == ["closed", "old:latest"]
        (ended,) = edge.router.of(AttemptEnded)
        assert (ended.failure, ended.text) == (Failure.VANISHED, "it hangs")


async def test_a_cut_by_the_router_in_mid_answer_is_told() -> None:
    async def half(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        await wait_until(lambda: edge.router.of(FirstByte))
        (came,) = edge.router.of(RequestCame)
        edge.router.desks[came.request_id].put(Cut(request_id=came.request_id, reason="its node is offline"))
        await caller.wait_for_departure()

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(half))]
        answer = await edge.chat()
        assert answer.lines()[-1] == {"error": "its node is offline"}
        assert not answer.whole
        assert edge.settled().node_fault is Failure.VANISHED


async def test_a_stale_connection_costs_no_attempt() -> None:
    served = count()

    async def once_per_connection(caller: Caller) -> None:
        await caller.answer(WHOLE)
        if next(served) == 0:
            await wait_until(lambda: len(edge.router.of(Settled)) == 1)
            raise Hangup

    async with an_edge() as edge:
        port = await edge.node(once_per_connection)
        edge.router.script = [forward(port), forward(port)]
        assert (await edge.chat(stream=False)).status == 200
        assert (await edge.chat(stream=False)).status == 200
        assert not edge.router.of(AttemptEnded)


async def test_a_gateway_is_shown_its_credential_and_a_bare_node_is_not() -> None:
    seen: list[dict[str, str]] = []

    async def look(caller: Caller) -> None:
        seen.append(caller.fields)
        await caller.answer(WHOLE)

    async with an_edge() as edge:
        port = await edge.node(look)
        edge.router.script = [forward(port, gateway=True), forward(port)]
        await edge.chat(stream=False)
        await edge.chat(stream=False)
        assert seen[0]["x-ollama-router-credential"] == "secret-of-one"
        assert "x-ollama-router-credential" not in seen[1]
        assert seen[0]["x-request-id"] == edge.router.closed[0]


async def test_the_operators_limit_for_the_first_token_moves_the_request() -> None:
    async def silent(caller: Caller) -> None:
        await caller.wait_for_departure()

    async with an_edge(first_token_timeout_s=0.05) as edge:
        edge.router.script = [forward(await edge.node(silent)), refuse(504, "no node answered in time")]
        assert (await edge.chat()).status == 504
        assert [event.failure for event in edge.router.of(AttemptEnded)] == [Failure.TIMEOUT]


async def test_the_pulse_names_live_requests_and_nodes_that_were_heard() -> None:
    go_on = trio.Event()

    async def slow(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        await go_on.wait()
        await caller.chunk(LAST)
        await caller.end_chunks()

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(slow))]
        async with talk(edge.port, "POST", "/api/chat", CHAT) as line:
            await line.wait_for(LINE)
            pulse = edge.proxy.pulse()
            assert pulse.heard == (AgentId("one"),)
            assert len(pulse.requests) == 1
            assert edge.proxy.pulse().heard == ()
            go_on.set()
            await line.rest()
        await wait_until(lambda: edge.router.of(Settled))
        assert edge.proxy.pulse().requests == ()


async def test_a_stall_beyond_the_operators_limit_is_told_in_band() -> None:
    async def stalls(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        await caller.wait_for_departure()

    async with an_edge(stall_timeout_s=1e-9) as edge:
        edge.router.script = [forward(await edge.node(stalls))]
        async with talk(edge.port, "POST", "/api/chat", CHAT) as line:
            await line.wait_for(LINE)
            edge.proxy.pulse()
            edge.proxy.pulse()
            answer = await line.rest()
        assert "error" in answer.lines()[-1]
        assert edge.settled().node_fault is Failure.TIMEOUT


async def test_a_large_body_reaches_every_node_that_is_tried() -> None:
    lengths: list[int] = []

    async def count_and_die(caller: Caller) -> None:
        lengths.append(len(caller.body))
        raise Hangup

    async def count_and_answer(caller: Caller) -> None:
        lengths.append(len(caller.body))
        await caller.answer(WHOLE)

    async with an_edge() as edge:
        edge.router.script = [forward(await edge.node(count_and_die)), forward(await edge.node(count_and_answer))]
        picture = "A" * 3_000_000
        answer = await ask(edge.port, "POST", "/api/generate", {"model": "m", "prompt": "what", "images": [picture], "stream": False})
        assert answer.status == 200
        assert lengths[0] == lengths[1] > 3_000_000
        (came,) = edge.router.of(RequestCame)
        assert came.model == "m"


async def test_the_node_unloads_first_what_the_router_named() -> None:
    bodies: list[bytes] = []

    async def node(caller: Caller) -> None:
        bodies.append(caller.body)
        assert caller.fields["x-ollama-router-credential"] == "secret-of-one"
        await caller.answer(WHOLE)

    async with an_edge() as edge:
        edge.router.script = [forward_after_unloading(await edge.node(node), "old:latest", "older:7b")]
        answer = await edge.chat(stream=False)
        assert answer.status == 200
        assert bodies[:2] == [b'{"model":"old:latest","keep_alive":0}', b'{"model":"older:7b","keep_alive":0}']
        assert b'"messages"' in bodies[2]


async def test_a_node_that_will_not_unload_gets_the_request_all_the_same() -> None:
    served = count()

    async def node(caller: Caller) -> None:
        if next(served) == 0:
            raise Hangup
        await caller.answer(WHOLE)

    async with an_edge() as edge:
        edge.router.script = [forward_after_unloading(await edge.node(node), "old:latest")]
        assert (await edge.chat(stream=False)).status == 200
        assert not edge.router.of(AttemptEnded)
        edge.router.script = [forward_after_unloading(1, "old:latest"), refuse(503, "gone")]
        assert (await edge.chat(stream=False)).status == 503
