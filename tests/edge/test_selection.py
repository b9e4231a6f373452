"""The selection endpoint over a real unix socket, with a scripted router behind it: what nginx is told, and what it is not."""

import json
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from core.aliases import Aliases
from core.events import Ending, Forward, Refuse, RequestCame, RequestEffect, Route, Upstream, Wait
from core.units import LeaseId, RequestId
from edge import selection
from edge.denied import Denied
from edge.handover import Carried, Handover
from edge.selection import BODY_MAX_BYTES, HEAD_MAX_BYTES, Asked, NodeRow, Nodes, Selection, _rest_of_head, group_of, reachable
from edge.tally import Tally
from tests.edge.nginx_parts import ScriptedRouter, forward_to
from tests.fleet.nginx import Selector, selector
from tests.fleet.rawhttp import wait_until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/api/chat"


class Rules:
    """Lets in who is not called a stranger."""

    def __init__(self) -> None:
        self.gated: list[str] = []

    def gate(self, peer: Asked, asked: Asked) -> Denied | None:
        self.gated.append(peer.peer_host)
        return Denied(status=401, text="a key is required") if peer.peer_host == "stranger" else None

    def client_of(self, peer: Asked, asked: Asked) -> str:
        return asked.fields.get(b"x-api-key", peer.peer_host.encode()).decode()

    def lasting_client(self, peer: Asked, asked: Asked) -> str | None:
        return None if b"x-api-key" in asked.fields or peer.peer_host == "stranger" else self.client_of(peer, asked)

    def judge_model(self, client: str, model: str | None, *, told_once: bool) -> Denied | None:
        return Denied(status=403, text="not this model") if client == "limited" else None


class Records:
    def __init__(self) -> None:
        self.opened: list[tuple[str, str, str]] = []

    def number(self) -> int:
        return 1

    def open(self, request_id: RequestId, peer: Asked, asked: Asked, route: object, stream: bool, number: int, edge: str) -> object:
        self.opened.append((request_id, asked.path, edge))
        return None


class Endpoint:
    """A selection that runs."""

    def __init__(self, path: Path, **more: Any) -> None:
        self.path = path
        self.router = ScriptedRouter()
        self.handover = Handover(self.router, secret=b"s", lives=self.router.lives, now=lambda: self.router.now)
        self.tally = Tally(self.router, self.handover)
        self.rules, self.records = Rules(), Records()
        self.failed: list[Exception] = []
        names = iter(f"r{number}" for number in range(10_000))
        self.selection = Selection(
            self.router,
            self.handover,
            rules=self.rules,
            new_id=lambda: RequestId(next(names)),
            credential_of=lambda agent_id: b"credential of " + agent_id.encode(),
            nodes=lambda: Nodes(secret="s", tally="127.0.0.1:1", coordinator="127.0.0.1:2", direct=False, nodes=[]),
            report=self.failed.append,
            aliases=Aliases([("nick", ("m",))]),
            records=self.records,
            tally=self.tally,
            **more,
        )

    def came(self) -> list[RequestCame]:
        return [event for event in self.router.events if isinstance(event, RequestCame)]


@asynccontextmanager
async def an_endpoint(*script: Any, tally: socket.socket | None = None, **more: Any) -> AsyncIterator[tuple[Endpoint, Selector]]:
    with tempfile.TemporaryDirectory() as place:
        endpoint = Endpoint(Path(place) / "s", **more)
        endpoint.router.script += script
        if tally is not None:
            endpoint.tally.listen(tally)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(endpoint.path))
            listening.listen()
            listening.setblocking(False)
            async with trio.open_nursery() as nursery:
                await nursery.start(endpoint.selection.run, listening)
                async with selector(endpoint.path) as select:
                    yield endpoint, select
                nursery.cancel_scope.cancel()
        assert endpoint.failed == []


def refuse(request_id: RequestId) -> list[RequestEffect]:
    return [Refuse(request_id=request_id, status=404, text="no")]


def wait(request_id: RequestId) -> list[RequestEffect]:
    return [Wait(request_id=request_id, position=1, why="full")]


# ---------------------------------------------------------------- what nginx is told


async def test_a_node_with_a_gateway() -> None:
    async with an_endpoint(forward_to(base_path="/ollama/")) as (endpoint, select):
        found = await select.select(PATH, CHAT, X_Connection="5")
        assert found.status == 200
        told = {name: value for name, value in found.headers.items() if name.startswith("x-")}
        assert told == {
            "x-upstream": "127.0.0.1:11435", "x-node": "box", "x-lease": "r0/1", "x-request-id": "r0", "x-prefix": "/ollama",
            "x-credential": "credential of a1", "x-accel-redirect": "@node",
        }  # fmt: skip
        (came,) = endpoint.came()
        assert (came.model, came.client, came.stream, came.input_tokens > 0) == ("m", "127.0.0.1", True, True)
        assert endpoint.records.opened == [("r0", PATH, "nginx")]
        carried = endpoint.handover.table[RequestId("r0")]
        assert (carried.lease_id, carried.direct, carried.connection) == ("r0/1", False, b"5")


async def test_names_stay_in_their_line() -> None:
    async with an_endpoint(forward_to(name="bö\r\nx")) as (_, select):
        assert (await select.select(PATH, CHAT)).headers["x-node"] == "b???x"


async def test_a_node_that_was_renamed_is_told_by_its_new_name() -> None:
    async with an_endpoint(forward_to(), forward_to(name="renamed")) as (_, select):
        assert [(await select.select(PATH, CHAT)).headers["x-node"] for _ in range(2)] == ["box", "renamed"]


@pytest.mark.parametrize(
    ("reply", "direct"),
    [
        (refuse, True),
        (forward_to(gateway=False), False),
        (forward_to(host="gpu1"), True),
        (forward_to(unload=("other",)), True),
        (forward_to(model="other"), True),
        (forward_to(raise_context=8192), True),
    ],
)
async def test_the_rest_is_the_embedded_edges(reply: Any, direct: bool) -> None:
    async with an_endpoint(reply, direct=direct) as (endpoint, select):
        found = await select.select(PATH, CHAT)
        assert (found.status, found.headers["x-takeover"]) == (403, "r0")
        carried = endpoint.handover.table[RequestId("r0")]
        assert carried.handed
        assert isinstance(carried.take_nowait(), Refuse | Forward)


async def test_nodes_without_a_gateway_where_that_is_wished() -> None:
    async with an_endpoint(forward_to(gateway=False), forward_to(gateway=False), direct=True) as (endpoint, select):
        found = await select.select(PATH, CHAT, X_Connection="5")
        assert (found.status, "x-credential" in found.headers) == (200, False)
        await select.select(PATH, CHAT, X_Connection="5")
        assert [(settled.request_id, settled.ending) for settled in endpoint.router.settled()] == [("r0", Ending.UNKNOWN)]


@pytest.mark.parametrize(
    ("path", "body", "fields"),
    [
        ("/api/show", CHAT, {}),
        ("/API/chat", CHAT, {}),
        ("/select", CHAT, {}),
        (PATH, b"[1", {}),
        (PATH, {"model": "m", "messages": [], "keep_alive": 0}, {}),
        (PATH, {**CHAT, "model": "nick"}, {}),
        (PATH, CHAT, {"X_Explain": "1"}),
        (PATH, CHAT, {"X_Peer": "stranger"}),
        (PATH, CHAT, {"X_Api_Key": "limited"}),
    ],
)
async def test_what_the_router_need_not_be_asked(path: str, body: Any, fields: dict[str, str]) -> None:
    async with an_endpoint() as (endpoint, select):
        found = await select.select(path, body, **fields)
        assert (found.status, "x-takeover" in found.headers, endpoint.came()) == (403, False, [])


async def test_who_is_turned_away_by_its_model_is_not_counted_at_the_gate() -> None:
    async with an_endpoint() as (endpoint, select):
        await select.select(PATH, CHAT, X_Api_Key="limited")
        await select.select(PATH, b"[")
        assert endpoint.rules.gated == []


async def test_nginx_is_told_of_nodes_and_of_nothing_else() -> None:
    async with an_endpoint() as (_, select):
        assert await select.nodes() == {"secret": "s", "tally": "127.0.0.1:1", "coordinator": "127.0.0.1:2", "direct": False, "nodes": []}
        await select.stream.send_all(b"GET /other HTTP/1.1\r\nHost: s\r\n\r\n")
        assert (await select.answer()).status == 404


# ---------------------------------------------------------------- waiting


async def test_an_answer_is_held_back_until_there_is_one() -> None:
    async with an_endpoint(wait) as (endpoint, select):
        await select.send(PATH, CHAT)
        await wait_until(endpoint.came, what="the request")
        for effect in forward_to()(RequestId("r0")):
            endpoint.router.desks[RequestId("r0")].put(effect)
        assert (await select.answer()).headers["x-lease"] == "r0/1"
        endpoint.router.script.append(refuse)
        assert (await select.select(PATH, CHAT)).headers["x-takeover"] == "r1"


@pytest.mark.parametrize("more", [b"", b"POST /sel"])
async def test_who_leaves_or_does_not_wait_for_its_answer_is_settled(more: bytes) -> None:
    async with an_endpoint(wait) as (endpoint, select):
        await select.send(PATH, CHAT)
        await wait_until(endpoint.came, what="the request")
        if more:
            await select.stream.send_all(more)
        else:
            await select.stream.aclose()
        await wait_until(endpoint.router.settled, what="its end")
        (settled,) = endpoint.router.settled()
        assert (settled.ending, settled.status, endpoint.handover.table) == (Ending.CANCELLED, 499, {})
        await wait_until(lambda: endpoint.selection.connections == 0, what="the connection's end")


async def test_an_answer_that_finds_nobody_ends_its_request() -> None:
    async with an_endpoint(wait) as (endpoint, select):
        await select.send(PATH, CHAT)
        await wait_until(endpoint.came, what="the request")
        select.stream.socket.shutdown(socket.SHUT_RD)  # so that nothing can be sent there
        for effect in forward_to()(RequestId("r0")):
            endpoint.router.desks[RequestId("r0")].put(effect)
        await wait_until(endpoint.router.settled, what="its end")
        assert endpoint.handover.table == {}


# ---------------------------------------------------------------- the wire


async def test_requests_may_come_in_pieces_and_several_at_once() -> None:
    async with an_endpoint(*[forward_to()] * 5) as (_, select):
        body = json.dumps(CHAT).encode()
        one = f"POST {PATH} HTTP/1.1\r\nHost: s\r\nX-Peer: p\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        for at in range(0, len(one), 40):
            await select.stream.send_all(one[at : at + 40])
        assert (await select.answer()).headers["x-lease"] == "r0/1"
        await select.stream.send_all(one * 4)
        data = b""
        while data.count(b"\r\n\r\n") < 4:
            data += await select.stream.receive_some()
        assert [f"r{number}/1".encode() in data for number in range(1, 5)] == [True] * 4


async def test_heads_are_read_once_but_for_what_differs() -> None:
    async with an_endpoint(*[forward_to()] * 8) as (endpoint, select):
        heads = [
            (b"X-Peer: p\r\nX-Connection: 1\r\n", b"Content-Length", "p", b"1"),
            (b"X-Peer: p\r\nX-Connection: 2\r\n", b"Content-Length", "p", b"2"),
            (b"X-Peer: p\r\n", b"Content-Length", "p", None),
            (b"X-Peer: q\r\nX-Connection: 2\r\n", b"Content-Length", "q", b"2"),
            (b"X-Peer: p\r\nx-connection: 3\r\n", b"content-length", "p", b"3"),
            (b"X-Peer: p\r\nx-connection: 3\r\n", b"Content-Length", "p", b"3"),
            (b"X-Peer: p\r\nx-connection: 3\r\n", b"Content-Length", "p", b"3"),
            (b"X-Peer: p\r\nX-Api-Key: k\r\nX-Connection: 2\r\n", b"Content-Length", "k", b"2"),
        ]
        for number, (lines, length, client, connection) in enumerate(heads):
            body = json.dumps({**CHAT, "x": "y" * number}).encode()
            data = b"POST %b HTTP/1.1\r\nHost: s\r\n%b%b: %d\r\n\r\n%b" % (PATH.encode(), lines, length, len(body), body)
            await select.stream.send_all(data)
            assert (await select.answer()).status == 200, data
            assert endpoint.came()[-1].client == client
            assert endpoint.handover.table[f"r{number}"].connection == connection
        assert len(endpoint.selection._heads) == 3, "those whose connection is where nginx writes it"


@pytest.mark.parametrize(
    "lines", [b"Content-Length: 5\r\nContent-Length: %d\r\n", b"Content-Length: +%d\r\n", b"Content-Length: %d5555555555555555555\r\n"]
)
@pytest.mark.parametrize("named", [b"", b"X-Connection: 7-1\r\n"])
async def test_a_head_that_is_known_but_for_a_bad_length_is_not_taken_for_it(named: bytes, lines: bytes) -> None:
    async with an_endpoint(*[forward_to()] * 5) as (endpoint, select):
        assert (await select.select(PATH, CHAT)).status == 200
        body = json.dumps(CHAT).encode()
        try:
            for told in (*[b"Content-Length: %d\r\n"] * 3, lines):
                head = b"POST /api/chat HTTP/1.1\r\nHost: s\r\nX-Peer: p\r\n" + named + told % len(body)
                await select.stream.send_all(head + b"\r\n" + body)
                assert (await select.answer()).status == (0 if told is lines else 200)
        except trio.BrokenResourceError:
            pass
        await wait_until(lambda: endpoint.selection.connections == 0, what="the connection's end")


@given(
    st.binary(max_size=9),
    st.sampled_from([b"12-3", b"", b"1\r2", b"1\n"]),
    st.sampled_from([b"\r\nContent-Length: ", b"\r\ncontent-length: ", b"\r\nContent-Length:", b"\rContent-Length: "]),
    st.sampled_from([b"5", b"0", b"00012", b"262144", b"262145", b"", b"+5", b"5 ", b"9" * 30]),
    st.sampled_from([b"\r\n\r\n", b"\r\n\r", b"", b"\r\nContent-Length: 6\r\n\r\n"]),
    st.binary(max_size=9),
)
def test_the_rest_of_a_head_is_taken_only_as_nginx_writes_it(
    known: bytes, name: bytes, length: bytes, digits: bytes, end: bytes, body: bytes
) -> None:
    data = known + name + length + digits + end + body
    named, begins, size = _rest_of_head(data, len(known))
    if length == b"\r\nContent-Length: " and b"\r" not in name and digits.isdigit() and len(digits) <= 8 and end == b"\r\n\r\n":
        plain = int(digits) <= BODY_MAX_BYTES
        assert (named, begins, size) == ((len(known + name), len(data) - len(body), int(digits)) if plain else (0, 0, 0))
    elif begins:  # whatever lies behind it, it is a whole head
        assert b"\r" not in data[len(known) : named]
        assert data[named:begins] == b"\r\nContent-Length: %b\r\n\r\n" % data[named + 18 : begins - 4]
        assert int(data[named + 18 : begins - 4]) == size


async def test_questions_of_different_clients_follow_one_another_on_a_connection() -> None:
    async with an_endpoint(*[forward_to()] * 9) as (endpoint, select):
        for number, peer in enumerate("ppqpqqppq"):
            body = json.dumps({**CHAT, "x": "y" * number * 40}).encode()
            lines = f"X-Peer: {peer}\r\nX-Connection: {number}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            await select.stream.send_all(f"POST {PATH} HTTP/1.1\r\nHost: s\r\n".encode() + lines + body)
            assert (await select.answer()).headers["x-lease"] == f"r{number}/1"
            assert (endpoint.came()[-1].client, endpoint.handover.table[f"r{number}"].connection) == (peer, b"%d" % number)


async def test_the_largest_body_is_read() -> None:
    async with an_endpoint(forward_to()) as (_, select):
        body = json.dumps({**CHAT, "messages": [{"role": "user", "content": "word " * (BODY_MAX_BYTES // 5 - 40)}]}).encode()
        assert (await select.select(PATH, body)).status == 200


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /api/chat HTTP/1.1\r\nHost: s\r\nContent-Length: %d\r\n\r\n" % (BODY_MAX_BYTES + 1),
        b"x" * (HEAD_MAX_BYTES + 1),
    ],
)
async def test_what_nginx_would_not_send_closes_the_connection(data: bytes) -> None:
    async with an_endpoint() as (endpoint, select):
        try:
            await select.stream.send_all(data)
            assert (await select.answer()).status == 0
        except trio.BrokenResourceError:
            pass
        await wait_until(lambda: endpoint.selection.connections == 0, what="the connection's end")


async def test_a_fault_of_ours_costs_one_connection() -> None:
    async with an_endpoint() as (endpoint, select):

        def break_down() -> Nodes:
            raise RuntimeError("broken")

        endpoint.selection._nodes = break_down
        await select.stream.send_all(b"GET /nodes HTTP/1.1\r\nHost: s\r\n\r\n")
        assert (await select.answer()).status == 0
        assert [str(error) for error in endpoint.failed] == ["broken"]
        endpoint.failed.clear()
        endpoint.router.script.append(forward_to())
        async with selector(endpoint.path) as other:
            assert (await other.select(PATH, CHAT)).status == 200


async def test_others_get_their_turn_under_load() -> None:
    async with an_endpoint(*[forward_to()] * 2000) as (_, select):
        body = json.dumps(CHAT).encode()
        one = f"POST {PATH} HTTP/1.1\r\nHost: s\r\nX-Peer: p\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            for _ in range(100):
                await select.stream.send_all(one * 20)
                data = b""
                while data.count(b"\r\n\r\n") < 20:
                    data += await select.stream.receive_some()
            nursery.cancel_scope.cancel()
        assert turns > 100


async def test_who_asks_again_at_once_does_not_keep_the_others_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "TURN_S", 0.0)
    async with an_endpoint(*[forward_to()] * 1000) as (endpoint, _), AsyncExitStack() as stack:
        asking = [await stack.enter_async_context(selector(endpoint.path)) for _ in range(8)]
        answered = [0] * len(asking)

        async def ask(index: int) -> None:
            while max(answered) < 50:
                assert (await asking[index].select(PATH, CHAT)).status == 200
                answered[index] += 1

        async with trio.open_nursery() as nursery:
            for index in range(len(asking)):
                nursery.start_soon(ask, index)
        assert min(answered) > 25, answered


async def test_endings_are_read_before_who_asks_is_answered() -> None:
    tells, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with tells, told:
        told.setblocking(False)
        async with an_endpoint(tally=told) as (endpoint, _):

            class Gated(list[str]):
                def append(self, peer: str) -> None:
                    super().append(f"{peer} after {len(endpoint.router.settled())} endings")

            endpoint.rules.gated = order = Gated()
            before = Carried(RequestId("before"), route=Route.CHAT, stream=True)
            before.lease_id, before.direct = LeaseId("before/1"), True
            endpoint.handover.add(before)
            body = json.dumps(CHAT).encode()
            asks = f"POST {PATH} HTTP/1.1\r\nHost: s\r\nX-Peer: stranger\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(endpoint.path))
                await wait_until(lambda: endpoint.selection.connections == 2, what="the connection")
                tells.send(b"<190>Jan  1 00:00:00 router: before/1 200 321 0.100 0.200 OK")
                line.send(asks)
                await wait_until(lambda: order, what="the question")
        assert order == ["stranger after 1 endings"]


def test_groups_are_what_both_sides_make_of_an_address() -> None:
    v4, v6 = Upstream(host="10.0.0.5", port=11435, gateway=True), Upstream(host="::1", port=11434)
    assert (group_of(v4), group_of(v6)) == ("n_9e3cfc8b3344", "n_bd305d14f75d")


def test_nodes_that_nginx_may_reach() -> None:
    gateway = Upstream(host="10.0.0.5", port=11435, gateway=True)
    bare, named, tls = Upstream(host="10.0.0.6", port=1), Upstream(host="gpu1", port=1), Upstream(host="10.0.0.7", port=1, tls=True)
    all_of_them = [gateway, gateway, bare, named, tls]
    row = NodeRow(group=group_of(gateway), host="10.0.0.5", port=11435, gateway=True)
    assert reachable(all_of_them, direct=False) == [row]
    assert [found.host for found in reachable(all_of_them, direct=True)] == ["10.0.0.5", "10.0.0.6"]
