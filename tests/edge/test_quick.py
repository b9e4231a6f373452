"""Requests that need no task, and where they turn into others: a scripted router, a scripted node, real sockets that are kept."""

import gc
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio
import trio.testing

from core.events import AttemptEnded, Cut, Ending, Failure, FirstByte, Forward, RequestCame, RequestEffect, Route, Settled, Wait
from core.units import RequestId
from edge.capture import Capture
from edge.denied import Denied
from edge.live import Live
from edge.proxy import Proxy
from edge.quick import ANSWER_MAX_BYTES, REQUEST_MAX_BYTES
from edge.wire import ClientConnection, RequestHead
from tests.edge.test_proxy import CHAT, LAST, LINE, WHOLE, Edge, Reply, an_edge, forward, refuse
from tests.fleet.rawhttp import PATIENCE_S, Answer, Caller, Hangup, Reset, encode, parse_answer, wait_until

Step = Callable[[Caller], Any]


class Line:
    """A client's connection that is kept."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.held = b""

    async def send(self, body: Any = CHAT, *, path: str = "/api/chat", headers: str = "", times: int = 1) -> None:
        data = encode(body)
        await self.stream.send_all(
            (f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data) * times
        )

    async def answer(self) -> Answer:
        """The next one, or what is there of it when the connection ends."""
        with trio.fail_after(PATIENCE_S):
            while not (size := self._size()) and (more := await self._more()):
                self.held += more
        size = size or len(self.held)
        data, self.held = self.held[:size], self.held[size:]
        assert data, "no answer"
        return parse_answer(data)

    async def ended(self) -> bool:
        """Wait for the connection's end."""
        with trio.fail_after(PATIENCE_S):
            return not await self._more()

    async def chat(self, **more: Any) -> Answer:
        await self.send({**CHAT, **more})
        return await self.answer()

    async def _more(self) -> bytes:
        try:
            return bytes(await self.stream.receive_some())
        except trio.BrokenResourceError:
            return b""

    def _size(self) -> int:
        head, blank, rest = self.held.partition(b"\r\n\r\n")
        if not blank:
            return 0
        fields = {name.lower(): value for name, _, value in (line.partition(b": ") for line in head.split(b"\r\n"))}
        if b"content-length" in fields:
            size = int(fields[b"content-length"])
            return len(head) + 4 + size if len(rest) >= size else 0
        end = rest.find(b"0\r\n\r\n")
        return len(head) + 4 + end + 5 if end >= 0 else 0


class Kept:
    """An edge with one node and one client's connection, both warm. `steps`: how the node answers, request by request."""

    def __init__(self, edge: Edge, line: Line, port: int, steps: list[Step], seen: list[Caller]) -> None:
        self.edge = edge
        self.line = line
        self.port = port
        self.steps = steps
        self.seen = seen
        self.carried: list[Live] = []
        """What became a task's business after it was begun."""

    def settled(self) -> Settled:
        settled = self.edge.router.of(Settled)[-1]
        assert isinstance(settled, Settled)
        return settled

    async def until_settled(self, times: int) -> Settled:
        await wait_until(lambda: len(self.edge.router.of(Settled)) == times)
        return self.settled()


class Noted:
    """A proxy for lanes, which notes what it carries on."""

    def __init__(self, proxy: Proxy, carried: list[Live]) -> None:
        self.has_room, self.begin_now, self.settle_now = proxy.has_room, proxy.begin_now, proxy.settle_now
        self._proxy = proxy
        self._carried = carried

    async def carry_on(self, one: Live) -> None:
        self._carried.append(one)
        await self._proxy.carry_on(one)


async def whole(caller: Caller) -> None:
    await caller.answer(WHOLE)


@asynccontextmanager
async def kept(*steps: Step, then: list[Reply] | None = None, **options: Any) -> AsyncIterator[Kept]:
    """Ready for requests that `steps` answer; `then`: what the router says after it sent one to the node."""
    async with an_edge(**options) as edge:
        seen: list[Caller] = []
        todo: list[Step] = [whole, *steps]

        async def node(caller: Caller) -> None:
            seen.append(caller)
            await todo.pop(0)(caller)

        port = await edge.node(node)
        stream = await trio.open_tcp_stream("127.0.0.1", edge.port)
        async with stream:
            found = Kept(edge, Line(stream), port, todo, seen)
            edge.router.script = [forward(port)]
            assert (await found.line.chat(stream=False)).body == WHOLE
            await found.until_settled(1)
            edge.router.script = [forward(port), *(then or [])]
            edge.router.events.clear()
            edge.router.closed.clear()
            seen.clear()
            edge.quick.proxy = Noted(edge.proxy, found.carried)
            yield found


async def test_a_small_request_is_answered_without_the_task() -> None:
    async with kept(whole, whole) as found:
        for number in range(2):
            found.edge.router.script = [forward(found.port)]
            answer = await found.line.chat(stream=False)
            assert (answer.status, answer.body) == (200, WHOLE)
            assert answer.headers["x-ollama-node"] == "one"
            settled = await found.until_settled(number + 1)
            assert (settled.ending, settled.status, settled.body_bytes) == (Ending.SUCCESS, 200, len(WHOLE))
            assert answer.headers["x-request-id"] == settled.request_id == found.edge.router.closed[-1]
        assert [type(event) for event in found.edge.router.events] == [RequestCame, Settled] * 2
        assert len({id(caller.stream) for caller in found.seen}) == 1
        assert found.seen[0].fields["x-forwarded-for"] == "127.0.0.1"
        assert found.carried == []
        assert found.edge.proxy._budget.held_bytes == 0


async def test_a_client_is_judged_once_for_the_headers_that_it_repeats() -> None:
    gated: list[bytes] = []
    judged: list[bytes] = []

    def gate(conn: ClientConnection, head: RequestHead) -> Denied | None:
        gated.append(head.fields.get(b"x", b""))
        return None

    def lasting_client(conn: ClientConnection, head: RequestHead) -> str | None:
        judged.append(head.fields.get(b"x", b""))
        return None if b"x-api-key" in head.fields else "who"

    async with kept(*[whole] * 7, gate=gate, lasting_client=lasting_client) as found:
        gated.clear()
        judged.clear()
        clients = []
        for number, headers in enumerate(["X: 1", "X: 1", "X: 2", "X: 3\r\nX-Api-Key: k", "X: 3\r\nX-Api-Key: k", "X: 1"]):
            found.edge.router.script = [forward(found.port)]
            await found.line.send({**CHAT, "stream": False, "n": "x" * number}, headers=headers + "\r\n")
            assert (await found.line.answer()).status == 200
            await found.until_settled(number + 1)
            came = found.edge.router.of(RequestCame)[-1]
            assert isinstance(came, RequestCame)
            clients.append(came.client)
        assert clients == ["who", "who", "who", "127.0.0.1", "127.0.0.1", "who"]
        assert judged == [b"1", b"2", b"3", b"1"]
        assert gated == [b"3", b"3"]
        assert found.carried == []


async def test_an_answer_in_pieces_is_still_none_of_the_tasks_business() -> None:
    async def slow(caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await caller.send(b"Transfer-Encoding: chunked\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked(0.01)
        await caller.chunk(WHOLE[:9])
        await trio.testing.wait_all_tasks_blocked(0.01)
        await caller.chunk(WHOLE[9:])
        await caller.end_chunks()

    async with kept(slow) as found:
        assert (await found.line.chat(stream=False)).body == WHOLE
        assert found.carried == []


async def test_a_stream_goes_on_in_the_task() -> None:
    async def stream(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        await caller.chunk(LAST)
        await caller.end_chunks()

    async with kept(stream, whole) as found:
        answer = await found.line.chat()
        assert (answer.body, answer.whole) == (LINE + LAST, True)
        await found.until_settled(1)
        assert [type(event) for event in found.edge.router.events] == [RequestCame, FirstByte, Settled]
        assert len(found.carried) == 1
        found.edge.router.script = [forward(found.port)]
        assert (await found.line.chat(stream=False)).body == WHOLE
        assert len(found.carried) == 1, "the next small one is quick again"


@contextmanager
def uncollected() -> Iterator[set[str]]:
    """The types of what ended inside and only the garbage collector would free."""
    found: set[str] = set()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        found |= {type(thing).__name__ for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def test_nothing_that_ended_waits_for_the_garbage_collector() -> None:
    """The collector seldom looks: what waits for it is memory that grows for tens of thousands of requests."""
    left = trio.Event()

    async def stream(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        await caller.chunk(LAST)
        await caller.end_chunks()

    async def endless(caller: Caller) -> None:
        await caller.begin_chunks()
        while not left.is_set():
            await caller.chunk(LINE)
            await trio.sleep(0.001)
        raise Hangup

    async def cut(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        raise Hangup

    async with kept(stream, cut, endless) as found:
        with uncollected() as waiting:
            assert (await found.line.chat()).whole
            for number in (2, 3):
                found.edge.router.script = [forward(found.port)]
                async with await trio.open_tcp_stream("127.0.0.1", found.edge.port) as stream_of_its_own:
                    await Line(stream_of_its_own).send(CHAT)
                    assert await stream_of_its_own.receive_some()
                    if number == 2:
                        await found.until_settled(2)
                await found.until_settled(number)
            await found.line.stream.aclose()
            left.set()
            await wait_until(lambda: not found.edge.listener._conns)
            found.carried.clear()
        assert not waiting & {"ClientConnection", "QuickLane", "UpstreamConnection", "UpstreamCut", "Good", "StreamJudge", "Live"}


async def test_large_answers_and_requests_are_the_tasks() -> None:
    big = b'{"a":"' + b"x" * (2 * ANSWER_MAX_BYTES) + b'"}'

    async def large(caller: Caller) -> None:
        await caller.answer(big)

    async with kept(large, whole) as found:
        assert (await found.line.chat(stream=False)).body == big
        found.edge.router.script = [forward(found.port)]
        answer = await found.line.chat(stream=False, more="x" * REQUEST_MAX_BYTES)
        assert answer.body == WHOLE
        assert len(found.seen[1].body) > REQUEST_MAX_BYTES
        assert len(found.carried) == 1


async def test_a_node_that_closed_its_kept_connection_is_dialled_anew() -> None:
    async def hang_up(caller: Caller) -> None:
        raise Hangup

    async with kept(hang_up, whole) as found:
        assert (await found.line.chat(stream=False)).body == WHOLE
        assert len(found.seen) == 2
        assert not found.edge.router.of(AttemptEnded)
        assert found.settled().ending is Ending.SUCCESS


async def test_a_request_whose_connection_ends_before_it_is_sent_goes_on_another() -> None:
    async with kept(whole, whole) as found:
        await found.line.chat(stream=False)
        found.edge.router.script = [forward(found.port)]
        # Nothing else runs between these two, so one poll tells of both: the request is begun when its connection is found closed.
        with socket.socket(fileno=os.dup(found.line.stream.socket.fileno())) as client:
            data = encode({**CHAT, "stream": False})
            client.send(b"POST /api/chat HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            found.seen[0].stream.socket.shutdown(socket.SHUT_RDWR)
        answer = await found.line.answer()
        assert (answer.status, answer.body) == (200, WHOLE)
        assert len({id(caller.stream) for caller in found.seen}) == 2
        assert (await found.until_settled(2)).ending is Ending.SUCCESS
        assert found.edge.router.of(AttemptEnded) == []


class Recorded:
    """A history that keeps everything."""

    def __init__(self) -> None:
        self.numbers = 0
        self.captures: list[Capture] = []

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def open(self, request_id: RequestId, conn: ClientConnection, head: RequestHead, route: Route, stream: bool, number: int) -> Capture:
        self.captures.append(Capture(head.path, conn.peer_host, number, 1 << 20, False, stream))
        return self.captures[-1]

    def leave(
        self, request_id: RequestId, conn: ClientConnection, head: RequestHead, route: Route, stream: bool, number: int,
        body: bytes, answer: bytes,
    ) -> None:  # fmt: skip
        capture = self.open(request_id, conn, head, route, stream, number)
        capture.hold_request(body)
        capture.take(answer)


async def test_history_takes_a_whole_answer_when_its_client_has_it() -> None:
    recorder = Recorded()
    waiting = trio.Event()

    async def slow(caller: Caller) -> None:
        await waiting.wait()
        await whole(caller)

    async with kept(whole, slow) as found:
        found.edge.proxy._recorder = recorder
        assert (await found.line.chat(stream=False)).body == WHOLE
        await found.until_settled(1)
        capture = recorder.captures[-1]
        assert (capture.number, capture.response, capture.request_body) == (1, [WHOLE], encode({**CHAT, "stream": False}))
        found.edge.router.script = [forward(found.port)]
        await found.line.send({**CHAT, "stream": False})
        await wait_until(lambda: len(found.seen) == 2)
        assert recorder.numbers == 2, "its place is that of its coming"
        assert len(recorder.captures) == 1
        waiting.set()
        assert (await found.line.answer()).body == WHOLE
        await found.until_settled(2)
        assert (recorder.captures[-1].number, recorder.captures[-1].response) == (2, [WHOLE])
        assert found.carried == []


async def test_history_takes_a_stream_from_its_beginning() -> None:
    async def stream(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(LINE)
        await caller.chunk(LAST)
        await caller.end_chunks()

    recorder = Recorded()
    async with kept(stream) as found:
        found.edge.proxy._recorder = recorder
        await found.line.send(CHAT)
        assert (await found.line.answer()).status == 200
        await found.until_settled(1)
        assert b"".join(recorder.captures[-1].response) == LINE + LAST
        assert (recorder.captures[-1].number, len(recorder.captures)) == (1, 1)


async def test_a_failed_attempt_is_told_and_the_next_node_tried() -> None:
    async def breaks(caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        raise Reset

    async def complains(caller: Caller) -> None:
        await caller.answer(b'{"error":"no"}', status=500)

    async def unfinished(caller: Caller) -> None:
        await caller.answer(LINE.strip())

    cases: list[tuple[Step, Failure]] = [(breaks, Failure.DIED), (complains, Failure.ANSWERED), (unfinished, Failure.INCOMPLETE)]
    for step, failure in cases:
        async with kept(step, whole) as found:
            found.edge.router.script.append(forward(found.port, name="two"))
            answer = await found.line.chat(stream=False)
            assert (answer.body, answer.headers["x-ollama-node"]) == (WHOLE, "two")
            (ended,) = found.edge.router.of(AttemptEnded)
            assert ended.failure is failure
            assert len(found.carried) == 1


async def test_what_the_router_does_not_forward_at_once_is_the_tasks() -> None:
    def wait(event: Any) -> list[RequestEffect]:
        (effect,) = forward(found.port)(event)
        assert isinstance(effect, Forward)
        waits.append(effect)
        return [Wait(request_id=effect.request_id, position=1, why="all are busy")]

    waits: list[Forward] = []
    async with kept(whole) as found:
        found.edge.router.script = [refuse(404, "not found")]
        answer = await found.line.chat(stream=False)
        assert (answer.status, answer.json()) == (404, {"error": "not found"})
        found.edge.router.script = [wait]
        await found.line.send({**CHAT, "stream": False})
        await wait_until(lambda: waits)
        await trio.testing.wait_all_tasks_blocked(0.01)
        found.edge.router.desks[waits[0].request_id].put(waits[0])
        assert (await found.line.answer()).body == WHOLE
        assert len(found.carried) == 2


async def test_a_client_that_leaves_closes_the_nodes_connection() -> None:
    gone = trio.Event()

    async def silent(caller: Caller) -> None:
        await caller.wait_for_departure()
        gone.set()

    async with kept(silent) as found:
        await found.line.send({**CHAT, "stream": False})
        await wait_until(lambda: found.seen)
        await found.line.stream.aclose()
        with trio.fail_after(PATIENCE_S):
            await gone.wait()
        settled = await found.until_settled(1)
        assert (settled.ending, settled.status) == (Ending.CANCELLED, 499)
        await wait_until(lambda: not found.edge.listener.connections)


async def test_a_cut_by_the_router_moves_the_request() -> None:
    async def silent(caller: Caller) -> None:
        (came,) = found.edge.router.of(RequestCame)
        found.edge.router.desks[came.request_id].put(Cut(request_id=came.request_id, reason="its node is offline"))
        await caller.wait_for_departure()

    async with kept(silent, whole) as found:
        found.edge.router.script.append(forward(found.port, name="two"))
        assert (await found.line.chat(stream=False)).headers["x-ollama-node"] == "two"
        (ended,) = found.edge.router.of(AttemptEnded)
        assert (ended.failure, ended.text) == (Failure.VANISHED, "its node is offline")


async def test_requests_sent_at_once_are_answered_in_order() -> None:
    async def echo(caller: Caller) -> None:
        await caller.answer(b"%d" % len(found.seen))

    async with kept(echo, echo, echo) as found:
        found.edge.router.script *= 3
        await found.line.send({**CHAT, "stream": False}, times=2)
        assert [(await found.line.answer()).body for _ in range(2)] == [b"1", b"2"]
        assert (await found.line.chat(stream=False)).body == b"3"


async def test_a_request_that_comes_while_one_is_worked_on_waits_for_its_turn() -> None:
    begun, go = trio.Event(), trio.Event()

    async def later(caller: Caller) -> None:
        begun.set()
        await go.wait()
        await caller.answer(b"1")

    async def second(caller: Caller) -> None:
        await caller.answer(b"2")

    async with kept(later, second) as found:
        found.edge.router.script *= 2
        await found.line.send({**CHAT, "stream": False})
        await begun.wait()
        await found.line.send({**CHAT, "stream": False})
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(found.edge.router.of(RequestCame)) == 1
        go.set()
        assert [(await found.line.answer()).body for _ in range(2)] == [b"1", b"2"]


async def test_a_denied_request_is_told_so_once_and_the_connection_kept() -> None:
    asked = 0

    def gate(conn: Any, head: Any) -> Denied | None:
        nonlocal asked
        asked += 1
        return Denied(status=401, text="no") if b"x-no" in head.fields else None

    async with kept(whole, gate=gate) as found:
        asked = 0
        await found.line.send({**CHAT, "stream": False}, headers="X-No: 1\r\n")
        answer = await found.line.answer()
        assert (answer.status, answer.json(), asked) == (401, {"error": "no"}, 1)
        assert (await found.line.chat(stream=False)).body == WHOLE
        assert asked == 2


async def test_what_the_task_says_next_is_a_first_answer_again() -> None:
    async with kept(whole) as found:
        assert (await found.line.chat(stream=False)).body == WHOLE
        await found.line.stream.send_all(b"GET / HTTP/3.0\r\nHost: x\r\n\r\n")
        assert (await found.line.answer()).status == 505
        assert await found.line.ended()


async def test_a_stop_lets_a_request_end_and_closes_after_it() -> None:
    begun, go = trio.Event(), trio.Event()

    async def later(caller: Caller) -> None:
        begun.set()
        await go.wait()
        await caller.answer(WHOLE)

    async with kept(later) as found:
        await found.line.send({**CHAT, "stream": False})
        await begun.wait()
        found.edge.nursery.start_soon(lambda: found.edge.listener.stop(limit_s=10.0))
        await trio.testing.wait_all_tasks_blocked(0.01)
        go.set()
        answer = await found.line.answer()
        assert (answer.body, answer.headers["connection"]) == (WHOLE, "close")
        assert await found.line.ended()
        assert found.settled().ending is Ending.SUCCESS


async def test_a_stop_that_takes_too_long_settles_what_it_cuts() -> None:
    begun = trio.Event()

    async def silent(caller: Caller) -> None:
        begun.set()
        await caller.wait_for_departure()

    async with kept(silent) as found:
        await found.line.send({**CHAT, "stream": False})
        await begun.wait()
        await found.edge.listener.stop(limit_s=0.01)
        assert await found.line.ended()
        assert (await found.until_settled(1)).ending is Ending.UNKNOWN
        assert found.edge.router.desks == {}
        assert found.edge.proxy._budget.held_bytes == 0


async def test_a_mistake_of_ours_is_reported_and_told() -> None:
    def mistake(event: Any) -> list[RequestEffect]:
        raise RuntimeError("wrong")

    async with kept(whole, may_fail=True) as found:
        found.edge.router.script = [mistake]
        answer = await found.line.chat(stream=False)
        assert (answer.status, answer.headers["connection"]) == (500, "close")
        assert [str(error) for error in found.edge.reported] == ["wrong"]
        assert found.settled().ending is Ending.UNKNOWN
        assert await found.line.ended()


async def test_a_mistake_after_the_answer_closes_the_connection() -> None:
    async with kept(whole, may_fail=True) as found:
        apply = found.edge.router.apply

        def fails_at_the_end(event: Any) -> list[Any]:
            if isinstance(event, Settled):
                apply(event)
                raise RuntimeError("wrong")
            return apply(event)

        found.edge.router.apply = fails_at_the_end  # type: ignore[method-assign]
        assert (await found.line.chat(stream=False)).body == WHOLE
        assert await found.line.ended()
        assert [str(error) for error in found.edge.reported] == ["wrong"]
        assert found.edge.proxy._budget.held_bytes == 0
