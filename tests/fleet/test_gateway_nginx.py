"""nginx's part played by hand in front of agents with their gateways: what clients get, and what history says of it."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from core.errors import RemoteError
from core.events import Effect, Event, HeartbeatCame
from core.messages import EndingReport
from core.units import AgentId
from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, last_line, line, open_fleet, serving
from tests.fleet.nginx import Selector, log_line, selector
from tests.fleet.rawhttp import Answer, Caller, Hangup, RawServer, encode, parse_answer, raw_request, wait_until
from tests.fleet.recorded import CREATED, RANDOM_ID, Player, difference, load, questions

LITERAL = re.compile(r"/(api/(chat|generate|embed|embeddings)|v1/(chat/completions|completions|embeddings|responses|messages))")
NOT_PASSED = ("authorization", "x-api-key", "cookie", "origin", "referer", "host", "connection")
TOLD = {"x-ollama-router-failure": "X-Ollama-Router-Failure", "x-ollama-router-answer": "X-Ollama-Router-Answer",
        "x-ollama-router-answer-type": "X-Ollama-Router-Answer-Type"}  # fmt: skip
CHAT = "/api/chat"


class Nginx:
    """Carries one request after the other as the configuration in `nginx/` does it."""

    def __init__(self, fleet: Fleet, select: Selector, told: Any) -> None:
        self.fleet = fleet
        self.select = select
        self.secret: str = told["secret"]
        self.tally: str = told["tally"]
        self.carried: list[str] = []
        """Requests whose answers came from a node and went to the client."""
        self.handed: list[Answer] = []
        """Answers of gateways that were not good."""

    async def ask(self, path: str, body: bytes | dict[str, Any]) -> Answer:
        data = encode(body)
        return await self.carry(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    async def carry(self, request: bytes) -> Answer:
        """What the client gets for these bytes."""
        head, _, body = request.partition(b"\r\n\r\n")
        start, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = start.split(" ")
        fields = {name.lower(): value for name, _, value in (text.partition(": ") for text in lines)}
        plain = method == "POST" and LITERAL.fullmatch(target) and "content-length" in fields and not {"origin", "upgrade"} & set(fields)
        if not plain or not 0 < len(body) <= 256 << 10 or "content-encoding" in fields:
            return await self._ask_coordinator(request)
        found = await self.select.select(target, body)
        if found.status == 403:
            handed = found.headers.get("x-takeover", "")
            return await self._ask_coordinator(request, **{"X-Ollama-Router-Takeover": f"{self.secret} {handed}" if handed else ""})
        assert found.status == 200
        answer = await self._ask_gateway(found, start, lines, body)
        assert answer.headers["x-request-id"] == found.headers["x-request-id"]
        if answer.status < 400:
            self.carried.append(found.headers["x-request-id"])
            log_line(self.tally, found.headers["x-lease"], size=len(answer.body), completed="OK" if answer.whole else "")
            return answer
        self.handed.append(answer)
        told = {name: answer.headers[key] for key, name in TOLD.items() if key in answer.headers}
        takeover = f"{self.secret} {found.headers['x-request-id']}"
        tried = f"{found.headers['x-lease']} {answer.status}"
        return await self._ask_coordinator(request, **{"X-Ollama-Router-Takeover": takeover, "X-Ollama-Router-Tried": tried, **told})

    async def open(self, body: dict[str, Any]) -> tuple[Answer, trio.SocketStream]:
        """Send a chat to a gateway, and leave its answer to be read."""
        found = await self.select.select(CHAT, body)
        assert found.status == 200
        stream = await trio.open_tcp_stream("127.0.0.1", int(found.headers["x-upstream"].rpartition(":")[2]))
        await stream.send_all(self._to_gateway(found, f"POST {CHAT} HTTP/1.1", [f"Content-Length: {len(encode(body))}"], encode(body)))
        return found, stream

    async def in_flight(self, request_id: str) -> None:
        """Until its gateway's heartbeat has told of it."""
        driver = self.fleet.coordinator.web.driver
        heard: list[str] = []
        apply = driver.apply

        def listening(event: Event) -> list[Effect]:
            if isinstance(event, HeartbeatCame):
                heard.extend(event.heartbeat.in_flight or ())
            return apply(event)

        driver.apply = listening  # type: ignore[method-assign]
        try:
            await wait_until(lambda: request_id in heard, what="a heartbeat with the request")
        finally:
            driver.apply = apply  # type: ignore[method-assign]

    async def _ask_gateway(self, found: Answer, start: str, lines: list[str], body: bytes) -> Answer:
        port = int(found.headers["x-upstream"].rpartition(":")[2])
        return parse_answer(await raw_request(port, self._to_gateway(found, start, [*lines, "Connection: close"], body)))

    def _to_gateway(self, found: Answer, start: str, lines: list[str], body: bytes) -> bytes:
        passed = [text for text in lines if text.partition(":")[0].lower() not in NOT_PASSED or text == "Connection: close"]
        passed += [
            f"Host: {found.headers['x-upstream']}",
            f"X-Request-Id: {found.headers['x-request-id']}",
            f"X-Ollama-Router-Credential: {found.headers['x-credential']}",
            "X-Ollama-Router-Edge: nginx",
        ]
        return "\r\n".join([start, *passed, "", ""]).encode("latin-1") + body

    async def _ask_coordinator(self, request: bytes, **fields: str) -> Answer:
        more = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        request = request.replace(b"\r\n", f"\r\nConnection: close\r\n{more}".encode("latin-1"), 1)
        return parse_answer(await raw_request(self.fleet.port, request), request.split(b" ")[0].decode())


@asynccontextmanager
async def behind(*nodes: RawServer, slots: int = 4) -> AsyncIterator[Nginx]:
    """A coordinator, an agent beside each of these Ollamas, and nginx's part."""
    async with serving(*nodes) as ports, open_fleet() as fleet:
        for number, port in enumerate(ports):
            await fleet.start_agent(port, f"box-{number}", OLLAMA_NUM_PARALLEL=str(slots))
        await fleet.wait_ready(len(ports))
        async with selector(fleet.data_dir / "selection.sock") as select:
            yield Nginx(fleet, select, await select.nodes())


async def record_of(nginx: Nginx, request_id: str) -> Any:
    """Its record, once there is one."""

    def found() -> Any:
        return next((record for record in nginx.fleet.coordinator.records.newest if record.request_id == request_id), None)

    await wait_until(found, what="the record")
    return found()


async def test_every_recorded_answer_is_what_the_embedded_edge_gives() -> None:
    tapes = load()
    faults: list[str] = []
    async with behind(RawServer(Player(tapes).handle), slots=8) as nginx:
        for takes in questions(tapes).values():
            got = await nginx.carry(takes[0].request)
            reasons = [difference(take.answer, got) for take in takes]
            if all(reasons):
                faults.append(f"{takes[0].case}: {reasons[0]}")
            elif got.status >= 400 and len(takes) == 1:
                request = takes[0].request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
                embedded = parse_answer(await raw_request(nginx.fleet.port, request), takes[0].method)
                if seen(embedded) != seen(got):
                    faults.append(f"{takes[0].case}: {seen(got)} instead of {seen(embedded)}")
        await nginx.fleet.wait_settled()
        assert faults == []
        assert len(nginx.carried) > 450
        assert len(nginx.handed) > 300
        ended = [await record_of(nginx, request_id) for request_id in nginx.carried[-20:]]
        assert {record.ending.value for record in ended} <= {"success", "error"}


def seen(answer: Answer) -> tuple[int, str | None, bytes, bool]:
    """What a client sees of it, without what whoever answers makes up."""
    return answer.status, answer.headers.get("content-type"), RANDOM_ID.sub(b"", CREATED.sub(b"", answer.body)), answer.whole


# ---------------------------------------------------------------- what is not good is judged by the coordinator


BLANK = b'{"model":"","created_at":"0001-01-01T00:00:00Z","message":{"role":"","content":""},"done":false}'
UNFINISHED = b'{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"half"},"done":false}'
REPEATED = UNFINISHED.replace(b"half", b"no " * 31)


def once(body: bytes, *, status: int = 200) -> tuple[ScriptedNode, ScriptedNode]:
    """Two Ollamas; the one that is asked first answers so, whichever it is, and from then on both answer well."""
    asked = 0

    async def script(caller: Caller) -> None:
        nonlocal asked
        asked += 1
        await (caller.answer(body, status=status) if asked == 1 else caller.answer(last_line(content="well").rstrip()))

    return ScriptedNode(script), ScriptedNode(script)


@pytest.mark.parametrize(
    ("body", "status", "outcome"), [(BLANK, 200, "blank"), (UNFINISHED, 200, "incomplete"), (b'{"error":"oh"}', 500, "status 500")]
)
async def test_a_failure_is_tried_elsewhere(body: bytes, status: int, outcome: str) -> None:
    nodes = once(body, status=status)
    async with behind(*nodes) as nginx:
        answer = await nginx.ask(CHAT, chat(stream=False))
        assert (answer.status, answer.json()["message"]["content"]) == (200, "well")
        record = await record_of(nginx, answer.headers["x-request-id"])
        assert [attempt.outcome for attempt in record.attempts] == [outcome, "success"]
        assert sorted(len(node.seen) for node in nodes) == [1, 1]
        assert len({attempt.agent_id for attempt in record.attempts}) == 2


async def test_what_repeats_itself_passes_as_it_is() -> None:
    nodes = once(REPEATED)
    async with behind(*nodes) as nginx:
        answer = await nginx.ask(CHAT, chat(stream=False))
        assert (answer.status, answer.body) == (200, REPEATED)
        assert sum(len(node.seen) for node in nodes) == 1
        assert [answer.status for answer in nginx.handed] == [502]


@pytest.mark.parametrize("body", [UNFINISHED, BLANK])
async def test_when_nothing_else_is_left_it_is_as_at_the_embedded_edge(body: bytes) -> None:
    async def script(caller: Caller) -> None:
        await caller.answer(body)

    async with behind(ScriptedNode(script)) as nginx:
        through, embedded = await nginx.ask(CHAT, chat(stream=False)), await nginx.fleet.chat(stream=False)
        assert (through.status, through.body) == (embedded.status, embedded.body)
        assert through.status == (200 if body is UNFINISHED else 502)


async def test_an_error_too_long_for_headers_is_asked_for_again() -> None:
    said = json.dumps({"error": "x" * 5000}).encode()

    async def script(caller: Caller) -> None:
        await caller.answer(said, status=400)

    node = ScriptedNode(script)
    async with behind(node) as nginx:
        answer = await nginx.ask(CHAT, chat())
        assert (answer.status, answer.body) == (400, said)
        assert len(node.seen) == 2


# ---------------------------------------------------------------- how it ended


async def test_a_cut_is_told_to_the_client_and_to_history() -> None:
    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        raise Hangup

    async with behind(ScriptedNode(script)) as nginx:
        answer = await nginx.ask(CHAT, chat())
        assert (answer.status, answer.whole) == (200, False)
        assert b'"error"' in answer.body.splitlines()[-1]
        record = await record_of(nginx, answer.headers["x-request-id"])
        assert (record.ending.value, record.chunks, record.body_bytes) == ("error", 1, len(line("one")))
        assert "closed the connection" in record.message


async def test_a_good_end_is_recorded_with_what_it_cost() -> None:
    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        await caller.chunk(last_line().replace(b": ", b":"))
        await caller.end_chunks()

    async with behind(ScriptedNode(script)) as nginx:
        answer = await nginx.ask(CHAT, chat())
        assert (answer.status, answer.whole) == (200, True)
        await wait_until(lambda: nginx.fleet.statistics().in_flight == 0, what="the lease to be given back")
        record = await record_of(nginx, answer.headers["x-request-id"])
        assert (record.ending.value, record.usage.output_tokens, record.chunks, record.body_bytes) == ("success", 3, 2, len(answer.body))
        assert 0 < record.ttft_ms <= record.duration_ms


async def test_a_client_that_leaves_is_cancelled_without_a_line_of_nginxs() -> None:
    gone = trio.Event()

    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        await caller.wait_for_departure()
        gone.set()

    node = ScriptedNode(script)
    async with behind(node) as nginx:
        found, stream = await nginx.open(chat())
        async with stream:
            with trio.fail_after(5):
                await stream.receive_some()
            await nginx.in_flight(found.headers["x-request-id"])
        with trio.fail_after(5):
            await gone.wait()
        assert (await record_of(nginx, found.headers["x-request-id"])).ending.value == "cancelled"
        await nginx.fleet.wait_settled()


class Deaf:
    """Takes no report."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, agent_id: AgentId, reports: list[EndingReport]) -> None:
        self.calls += 1
        raise RemoteError("not now", status=503)


async def test_ends_that_the_coordinator_could_not_hear_are_heard_later() -> None:
    deaf = Deaf()
    async with behind(ScriptedNode(answer_well)) as nginx:
        endings, nginx.fleet.coordinator.web.endings = nginx.fleet.coordinator.web.endings, deaf
        found, stream = await nginx.open(chat())
        async with stream:
            data = b""
            while b"0\r\n\r\n" not in data:
                data += await stream.receive_some()
        await wait_until(lambda: deaf.calls >= 2, what="the report, again")
        nginx.fleet.coordinator.web.endings = endings
        assert (await record_of(nginx, found.headers["x-request-id"])).ending.value == "success"
