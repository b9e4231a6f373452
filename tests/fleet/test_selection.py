"""The nginx edge over real sockets, with nginx's part played by hand: a coordinator, nodes, selection, takeover."""

import json
import re
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from core.messages import EndingReport
from core.units import AgentId
from servers.listen import CannotListen
from servers.nginx_edge import nginx_sockets
from servers.settings import load
from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.nginx import Selector, forward, hand_over, log_line, selector, send_line
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


async def test_a_client_that_leaves_before_nginx_has_read_its_node_is_settled_at_once() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        read = await edge.select.select(CHAT, chat())
        assert read.status == 200
        async with selector(edge.fleet.data_dir / "selection.sock") as other:
            await other.send(CHAT, chat())
            await wait_until(lambda: edge.fleet.statistics().in_flight == 2, what="the decision")
        await wait_until(lambda: edge.fleet.statistics().in_flight == 1, what="the client's leaving to be seen")
        (record,) = edge.fleet.coordinator.records.newest
        assert (record.ending.value, record.status) == ("cancelled", 499)
        await edge.select.stream.aclose()
        log_line(edge.told["tally"], read.headers["x-lease"])
        await edge.fleet.wait_settled()
        assert record_of(edge, read.headers["x-request-id"]).ending.value == "success"


async def test_the_record_says_that_it_came_through_nginx() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        found = await edge.select.select(CHAT, chat("nobody-has-this"))
        await edge.take_over(found.headers["x-takeover"], chat("nobody-has-this"))
        kept = await edge.fleet.ask("GET", "/api/dashboard/request-responses")
        assert kept.status == 200, json.dumps(kept.json())


# ---------------------------------------------------------------- how it ended


def record_of(edge: Edge, request_id: str) -> Any:
    """Its record; None as long as there is none."""
    return next((record for record in edge.fleet.coordinator.records.newest if record.request_id == request_id), None)


async def test_nginxs_line_settles_what_went_to_a_node_without_a_gateway() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        found = await edge.select.select(CHAT, chat())
        await forward(found, CHAT, chat())
        log_line(edge.told["tally"], found.headers["x-lease"])
        await edge.fleet.wait_settled()
        record = record_of(edge, found.headers["x-request-id"])
        assert (record.ending.value, record.status, record.body_bytes, record.ttft_ms) == ("success", 200, 321, pytest.approx(0, abs=200))


async def test_a_client_that_left_in_mid_answer_is_told_from_an_answer() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        for line in ({"status": 499, "completed": ""}, {"completed": ""}):
            found = await edge.select.select(CHAT, chat())
            log_line(edge.told["tally"], found.headers["x-lease"], **line)
            await edge.fleet.wait_settled()
            assert record_of(edge, found.headers["x-request-id"]).ending.value == "cancelled"


async def test_garbage_and_lines_that_come_twice_change_nothing() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        found = await edge.select.select(CHAT, chat())
        other = await edge.select.select(CHAT, chat())
        tally = edge.fleet.coordinator.nginx.tally
        for line in (b"", b"<190>nginx: ", b"\xff\x00", b"<190>nginx: a/1 200 x 0.1 0.1 OK"):
            send_line(edge.told["tally"], line)
        for _ in range(3):
            log_line(edge.told["tally"], found.headers["x-lease"])
        log_line(edge.told["tally"], "nobody/1")
        await wait_until(lambda: (tally.unreadable, tally.unknown) == (4, 3), what="all lines")
        assert edge.fleet.statistics().in_flight == 1
        assert record_of(edge, other.headers["x-request-id"]) is None


async def test_a_lost_line_is_made_up_for_by_the_connections_next_request() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        lost = await edge.select.select(CHAT, chat(), X_Connection="7")
        await edge.select.select(CHAT, chat(), X_Connection="8")
        await edge.select.select(CHAT, chat(), X_Connection="7")
        assert edge.fleet.statistics().in_flight == 2
        assert record_of(edge, lost.headers["x-request-id"]).ending.value == "unknown"


class Agent:
    """An agent beside a scripted node that stands for its gateway."""

    def __init__(self, edge: Edge, node: ScriptedNode) -> None:
        self.edge = edge
        self.node = node
        self.id = self.token = ""
        self.sequence = 0

    async def call(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        answer = await self.edge.fleet.ask("POST", path, body, headers=headers)
        assert answer.status < 300, answer.body
        return answer.json() if answer.body else None

    async def register(self) -> None:
        told = await self.call(
            "/api/agents",
            {
                "machine_name": "box", "ip_address": "127.0.0.1", "ollama_version": "0.33.0", "ollama_port": 1,
                "agent_api_port": self.node.port,
                "gpu_available": False, "gpu_devices": [], "slots": 1,
            },
        )  # fmt: skip
        self.id, self.token = told["agent_id"], told["agent_token"]
        await self.beat()

    async def beat(self, *in_flight: str) -> None:
        self.sequence += 1
        row = {"name": "m:latest", "model": "m:latest", "size": 10**9, "digest": "a" * 64}
        beat = {
            "agent_id": self.id, "cpu_usage": 1.0, "memory_usage": 1.0, "sequence": self.sequence, "installed_models": [row],
            "loaded_models": [row], "in_flight": list(in_flight), "ollama_ok": True,
        }  # fmt: skip
        await self.call("/api/health", beat)

    async def report(self, request_id: str, **more: Any) -> None:
        report = {
            "request_id": request_id, "ending": "success", "status": 200, "prompt_tokens": 7, "output_tokens": 9, "total_ns": 10**6,
            "body_bytes": 55, "chunks": 2, "ttft_ms": 0.5, "duration_ms": 1.0, **more,
        }  # fmt: skip
        await self.call(f"/api/agents/{self.id}/endings", {"reports": [report]})


@asynccontextmanager
async def a_gateway() -> AsyncIterator[tuple[Edge, Agent]]:
    node = ScriptedNode(answer_well)
    async with serving(node), open_fleet() as fleet, selector(fleet.data_dir / "selection.sock") as select:
        edge = Edge(fleet, select, await select.nodes())
        agent = Agent(edge, node)
        await agent.register()
        await fleet.wait_ready(1)
        yield edge, agent


async def test_a_gateway_is_forwarded_to_with_its_credential_and_reports_the_end() -> None:
    async with a_gateway() as (edge, agent):
        assert [node["gateway"] for node in (await edge.select.nodes())["nodes"]] == [True]
        found = await edge.select.select(CHAT, chat())
        await forward(found, CHAT, chat())
        assert agent.node.seen[-1].fields["x-ollama-router-credential"] == found.headers["x-credential"]
        request_id = found.headers["x-request-id"]
        log_line(edge.told["tally"], found.headers["x-lease"])
        await wait_until(lambda: edge.fleet.statistics().in_flight == 0, what="the lease to be given back by the line alone")
        assert record_of(edge, request_id) is None
        await agent.report(request_id)
        record = record_of(edge, request_id)
        assert (record.ending.value, record.usage.output_tokens, record.body_bytes, record.chunks) == ("success", 9, 55, 2)
        await agent.report(request_id)  # again, for its confirmation was lost
        assert edge.fleet.coordinator.nginx.tally.unknown == 1


async def test_a_report_that_comes_first_settles_alone() -> None:
    async with a_gateway() as (edge, agent):
        found = await edge.select.select(CHAT, chat())
        await agent.report(found.headers["x-request-id"])
        assert record_of(edge, found.headers["x-request-id"]).usage.prompt_tokens == 7
        log_line(edge.told["tally"], found.headers["x-lease"])
        await wait_until(lambda: edge.fleet.coordinator.nginx.tally.unknown == 1, what="the late line")


async def test_without_a_report_nginxs_line_says_how_it_ended() -> None:
    async with a_gateway() as (edge, _):
        found = await edge.select.select(CHAT, chat())
        log_line(edge.told["tally"], found.headers["x-lease"])
        await wait_until(lambda: record_of(edge, found.headers["x-request-id"]), what="the record, two seconds later")
        assert record_of(edge, found.headers["x-request-id"]).ending.value == "success"


async def test_an_error_answer_is_settled_by_the_edge_that_goes_on_with_it() -> None:
    async with a_gateway() as (edge, agent):
        found = await edge.select.select(CHAT, chat())
        request_id = found.headers["x-request-id"]
        await agent.report(request_id, ending="error", status=400, message="no")
        assert record_of(edge, request_id) is None
        said = b'{"error":"no"}'
        answer = await edge.take_over(request_id, chat(), tried=f"{found.headers['x-lease']} 400", answer=said)
        assert (answer.status, answer.body) == (400, said)
        assert record_of(edge, request_id).status == 400


async def test_an_agent_ends_only_what_is_on_itself() -> None:
    async with a_gateway() as (edge, agent):
        found = await edge.select.select(CHAT, chat())
        tally = edge.fleet.coordinator.nginx.tally
        tally.endings(AgentId("another"), [EndingReport(request_id=found.headers["x-request-id"], ending="success")])
        assert (tally.unknown, edge.fleet.statistics().in_flight) == (1, 1)
        await agent.beat(found.headers["x-request-id"])
        assert edge.fleet.statistics().in_flight == 1


async def test_the_coordinator_comes_back_in_mid_stream() -> None:
    """What it had let nginx forward is nobody's request now, but the node shows it as work."""
    async with a_gateway() as (edge, agent):
        request_id = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
        await agent.beat(request_id)
        assert edge.fleet.agent("box").active_requests == 1
        log_line(edge.told["tally"], f"{request_id}/1")
        await agent.report(request_id)
        answer = await edge.take_over(request_id, chat(stream=False), tried=f"{request_id}/1 0")
        assert (answer.status, edge.fleet.coordinator.nginx.handover.late) == (200, 1)


async def test_a_socket_that_was_left_behind_is_replaced() -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "s"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
        async with open_fleet(ROUTER_SELECTION=str(path)), selector(path) as select:
            assert (await select.nodes())["nodes"] == []
            with pytest.raises(CannotListen, match="another coordinator"), nginx_sockets(load({"ROUTER_SELECTION": str(path)})):
                pass
        assert not path.exists()


def test_the_port_of_the_tally_stays_over_a_restart_and_is_another_when_it_is_taken(tmp_path: Path) -> None:
    def port(name: str, secret: str, beside: bool = False, **settings: str) -> int:
        with nginx_sockets(load({"ROUTER_SELECTION": str(tmp_path / name), **settings}), secret=secret) as sockets:
            assert sockets is not None
            found: int = sockets.tally.getsockname()[1]
            if beside:
                assert port("other", secret) != found
            return found

    usual = port("one", "secret", beside=True)
    assert usual == port("one", "secret")
    assert usual != port("one", "another secret")
    assert port("one", "secret", ROUTER_TALLY=f"127.0.0.1:{usual - 1}") == usual - 1, "who names a port gets that"


async def test_there_need_be_no_selection() -> None:
    async with open_fleet(ROUTER_SELECTION="off") as fleet:
        assert not (fleet.data_dir / "selection.sock").exists()
        assert (await hand_over(fleet.port, CHAT, chat("x"), "secret id")).status == 404


async def test_what_went_through_nginx_is_counted() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        await edge.select.select(CHAT, chat())
        await edge.select.select(CHAT, chat("nobody-has-this"))
        send_line(edge.told["tally"], b"garbage")
        shown = b""
        with trio.fail_after(10):
            while b"ollama_router_nginx_lines_unreadable_total 1" not in shown:
                shown = (await edge.fleet.ask("GET", "/metrics")).body
        assert b"ollama_router_nginx_forwarded_total 1" in shown
        assert b"ollama_router_nginx_handed_over_total 1" in shown


async def test_a_client_that_leaves_before_its_body_is_whole_again_is_settled() -> None:
    async with an_edge(ScriptedNode(answer_well)) as edge:
        found = await edge.select.select(CHAT, chat("nobody-has-this"))
        request_id = found.headers["x-takeover"]
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nX-Ollama-Router-Takeover: {edge.secret} {request_id}\r\nContent-Length: 99\r\n\r\n"
        stream = await trio.open_tcp_stream("127.0.0.1", edge.fleet.port)
        await stream.send_all(head.encode() + b'{"model"')
        await wait_until(lambda: not edge.fleet.coordinator.nginx.handover.table, what="the takeover")
        await stream.aclose()
        await wait_until(lambda: record_of(edge, request_id), what="its record")
        assert record_of(edge, request_id).ending.value == "cancelled"
