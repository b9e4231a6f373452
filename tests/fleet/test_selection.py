"""The nginx edge over real sockets, with nginx's part played by hand: a coordinator, nodes, selection, takeover."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.nginx import Selector, forward, hand_over, selector
from tests.fleet.rawhttp import Caller, wait_until

CHAT = "/api/chat"


class Edge:
    """A fleet, a connection to its selection, and the secret."""

    def __init__(self, fleet: Fleet, select: Selector, told: Any) -> None:
        self.fleet = fleet
        self.select = select
        self.told = told
        self.secret: str = told["secret"]

    async def take_over(self, request_id: str, body: bytes | dict[str, Any], path: str = CHAT, **more: Any) -> Any:
        return await hand_over(self.fleet.port, path, body, f"{self.secret} {request_id}", **more)


@asynccontextmanager
async def an_edge(*nodes: ScriptedNode, slots: int = 4, **settings: str) -> AsyncIterator[Edge]:
    async with serving(*nodes) as ports:
        named = {f"n{number};slots={slots}": port for number, port in enumerate(ports, 1)}
        async with (
            open_fleet(named, **({"ROUTER_NGINX_DIRECT": "true"} | settings)) as fleet,
            selector(fleet.data_dir / "selection.sock") as select,
        ):
            yield Edge(fleet, select, await select.nodes())


async def test_nginx_is_told_what_it_needs() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        (node,) = edge.told["nodes"]
        assert edge.told["coordinator"] == f"127.0.0.1:{edge.fleet.port}"
        assert edge.told["direct"] is True
        assert (node["host"], node["gateway"]) == ("127.0.0.1", False)
        assert re.fullmatch("n_[0-9a-f]{12}", node["group"])
        assert (edge.fleet.data_dir / "selection.sock").stat().st_mode & 0o777 == 0o600


async def test_a_plain_request_is_given_a_node() -> None:
    node = ScriptedNode(answer_well)
    async with an_edge(node) as edge:
        found = await edge.select.select(CHAT, chat())
        assert found.status == 200
        assert found.headers["x-upstream"] == f"127.0.0.1:{node.port}"
        assert found.headers["x-node"] == "n1"
        assert found.headers["x-lease"] == found.headers["x-request-id"] + "/1"
        assert (await forward(found, CHAT, chat())).status == 200
        assert edge.fleet.statistics().in_flight == 1


async def test_an_unknown_model_is_refused_in_ollamas_words() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        body = chat("nobody-has-this")
        found = await edge.select.select(CHAT, body)
        assert found.status == 403
        answer = await edge.take_over(found.headers["x-takeover"], body)
        assert (answer.status, answer.json()) == (404, {"error": "model 'nobody-has-this' not found"})
        assert answer.headers["x-request-id"] == found.headers["x-takeover"]
        embedded = await edge.fleet.ask("POST", CHAT, body)
        assert (embedded.status, embedded.body) == (answer.status, answer.body)


@pytest.mark.parametrize("body", [b'{"model":', b"[]", b'{"model":"m","MODEL":"n","messages":[]}'])
async def test_what_cannot_be_read_plainly_goes_to_the_embedded_edge(body: bytes) -> None:
    async def script(caller: Caller) -> None:
        await caller.answer(b'{"error":"no"}', status=400)

    async with an_edge(ScriptedNode(script)) as edge:
        found = await edge.select.select(CHAT, body)
        assert (found.status, "x-takeover" in found.headers) == (403, False)
        through, embedded = [await hand_over(edge.fleet.port, CHAT, body, edge.secret), await edge.fleet.ask("POST", CHAT, body)]
        assert (through.status, through.body) == (embedded.status, embedded.body)


async def test_without_a_key_the_embedded_edge_says_so() -> None:
    async with an_edge(ScriptedNode(answer_well), ROUTER_REQUIRE_API_KEY="true") as edge:
        found = await edge.select.select(CHAT, chat())
        assert (found.status, "x-takeover" in found.headers) == (403, False)
        assert (await hand_over(edge.fleet.port, CHAT, chat(), edge.secret)).status == 401


async def test_bare_nodes_are_nginxs_only_when_that_is_wished() -> None:
    async with an_edge(ScriptedNode(answer_well), ROUTER_NGINX_DIRECT="false") as edge:
        assert edge.told["nodes"] == []
        found = await edge.select.select(CHAT, chat(stream=False))
        assert found.status == 403
        answer = await edge.take_over(found.headers["x-takeover"], chat(stream=False))
        assert (answer.status, answer.headers["x-ollama-node"]) == (200, "n1")
        await edge.fleet.wait_settled()


async def test_a_node_that_nginx_could_not_reach_is_tried_and_given_up() -> None:
    first, second = ScriptedNode(answer_well), ScriptedNode(answer_well)
    async with an_edge(first, second) as edge:
        found = await edge.select.select(CHAT, chat(stream=False))
        dead, alive = (first, second) if found.headers["x-node"] == "n1" else (second, first)
        dead.die()
        answer = await edge.take_over(found.headers["x-request-id"], chat(stream=False), tried=f"{found.headers['x-lease']} 0")
        assert answer.status == 200
        assert len(alive.seen) == 1
        await edge.fleet.wait_settled()
        assert [attempt.outcome for attempt in edge.fleet.coordinator.records.newest[-1].attempts] == ["refused", "success"]


async def test_what_a_gateway_told_of_a_failure_is_not_asked_again() -> None:
    first, second = ScriptedNode(answer_well), ScriptedNode(answer_well)
    async with an_edge(first, second) as edge:
        found = await edge.select.select(CHAT, chat(stream=False))
        request_id, lease = found.headers["x-request-id"], found.headers["x-lease"]
        answer = await edge.take_over(request_id, chat(stream=False), tried=f"{lease} 502", failure="died")
        assert answer.status == 200
        assert len(first.seen) + len(second.seen) == 1
        assert answer.headers["x-ollama-node"] != found.headers["x-node"]
        await edge.fleet.wait_settled()


async def test_a_nodes_own_answer_is_passed_on_as_nginx_got_it() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        found = await edge.select.select(CHAT, chat())
        said = b'{"error":"invalid think value"}'
        answer = await edge.take_over(found.headers["x-request-id"], chat(), tried=f"{found.headers['x-lease']} 400", answer=said)
        assert (answer.status, answer.body) == (400, said)
        assert answer.headers["x-ollama-node"] == "n1"
        await edge.fleet.wait_settled()


@pytest.mark.parametrize("shown", ["wrong", ""])
async def test_a_wrong_secret_is_nobodys(shown: str) -> None:
    node = ScriptedNode(answer_well)
    async with an_edge(node) as edge:
        found = await edge.select.select(CHAT, chat("nobody-has-this"))
        answer = await hand_over(edge.fleet.port, CHAT, chat(stream=False), f"{shown} {found.headers['x-takeover']}")
        assert answer.status == 200
        assert answer.headers["x-request-id"] != found.headers["x-takeover"]
        assert len(node.seen) == 1


async def test_an_answer_is_held_back_while_the_request_waits() -> None:
    go = trio.Event()

    async def script(caller: Caller) -> None:
        await go.wait()
        await answer_well(caller)

    async with an_edge(ScriptedNode(script), slots=1) as edge, trio.open_nursery() as nursery:
        nursery.start_soon(edge.fleet.chat)
        await wait_until(lambda: edge.fleet.statistics().in_flight == 1, what="the first request on the node")
        await edge.select.send(CHAT, chat())
        await wait_until(lambda: edge.fleet.statistics().waiting == 1, what="the second one in the queue")
        go.set()
        found = await edge.select.answer()
        assert (found.status, found.headers["x-node"]) == (200, "n1")


async def test_a_client_that_leaves_while_it_waits_is_settled() -> None:
    async def script(caller: Caller) -> None:
        await trio.sleep_forever()

    async with an_edge(ScriptedNode(script), slots=1) as edge, trio.open_nursery() as nursery:
        nursery.start_soon(edge.fleet.chat)
        await wait_until(lambda: edge.fleet.statistics().in_flight == 1, what="the first request on the node")
        await edge.select.send(CHAT, chat())
        await wait_until(lambda: edge.fleet.statistics().waiting == 1, what="the second one in the queue")
        await edge.select.stream.aclose()
        await wait_until(lambda: edge.fleet.statistics().waiting == 0, what="the client's leaving to be seen")
        assert edge.fleet.coordinator.records.newest[-1].ending.value == "cancelled"
        nursery.cancel_scope.cancel()


async def test_the_record_says_that_it_came_through_nginx() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        found = await edge.select.select(CHAT, chat("nobody-has-this"))
        await edge.take_over(found.headers["x-takeover"], chat("nobody-has-this"))
        kept = await edge.fleet.ask("GET", "/api/dashboard/request-responses")
        assert kept.status == 200, json.dumps(kept.json())
