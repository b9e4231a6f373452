"""A real nginx in front of a whole fleet: nodes die under load, clients storm off, streams are cut, the coordinator is killed, nginx is
reloaded; and nobody is told a clean end that was none, and nothing stays in the ledger."""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from agent.simulated.server import SimulatedOllama
from tests.edge.nginx_stage import free_port
from tests.fleet.edges import Edge, RunningNginx, behind, start_agent
from tests.fleet.fleet import ROOT, Fleet, ScriptedNode, answer_well, chat, last_line, line, many, open_fleet, serving
from tests.fleet.nginx import selector
from tests.fleet.rawhttp import Answer, Caller, Hangup, Talk, ask, talk, wait_until

pytestmark = pytest.mark.slow
MODEL = "llama3.2:3b"
REQUESTS, AT_ONCE = 150, 16
REALITY_WITHIN_S = 15.0
"""After a restart of the coordinator what it shows as in flight is what is."""


@asynccontextmanager
async def fleet_behind(edge: Edge, nodes: dict[str, int], **settings: str) -> AsyncIterator[Fleet]:
    with behind(edge):
        async with open_fleet(nodes, **settings) as fleet:
            yield fleet


def quick_node(name: str) -> SimulatedOllama:
    knobs: dict[str, Any] = {"slots": 8, "load_s": 0.01, "decode_tokens_s": 500.0, "prefill_tokens_s": 50_000.0, "batch_slope": 0.0}
    return SimulatedOllama(name=name, models=[MODEL], **knobs)


def question(number: int) -> dict[str, Any]:
    return chat(MODEL, stream=number % 3 != 0, content=f"Question {number}", options={"num_predict": 12})


async def latest_record(fleet: Fleet) -> Any:
    """The newest record, once every request is over."""
    await fleet.wait_settled()
    await wait_until(lambda: fleet.coordinator.records.newest, what="a record")
    return fleet.coordinator.records.newest[-1]


async def edge_of(fleet: Fleet, answer: Answer) -> str:
    """Which edge history says that a good answer came through."""
    assert (answer.status, answer.whole) == (200, True)
    await latest_record(fleet)
    path = f"/api/dashboard/request-responses/{answer.headers['x-request-id']}"
    with trio.fail_after(10):
        while (record := await ask(fleet.own_port, "GET", path)).status == 404:  # noqa: ASYNC110  (its writer is a thread)
            await trio.sleep(0.05)
    return str(record.json()["edge"])


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize("number", [0, 1], ids=["whole", "streamed"])
async def test_nginx_moves_the_bytes_and_the_gateway_reports(number: int) -> None:
    node = quick_node("box")
    async with node.serve(), fleet_behind(Edge.GATEWAYS, {"box": node.port}) as fleet:
        answer = await fleet.ask("POST", "/api/chat", question(number))
        assert await edge_of(fleet, answer) == "nginx"
        assert answer.headers["x-ollama-node"] == "box"
        record = await latest_record(fleet)
        assert record.request_id == answer.headers["x-request-id"]
        assert (record.ending.value, record.agent_name) == ("success", "box")
        assert record.usage.output_tokens == answer.lines()[-1]["eval_count"]
        assert fleet.coordinator.nginx.selection.decided == 1
        assert fleet.coordinator.nginx.handover.late == 0


async def test_a_bare_node_is_the_embedded_edges_unless_it_is_wished() -> None:
    node = ScriptedNode(answer_well)
    async with serving(node):
        async with fleet_behind(Edge.HANDED_OVER, {"box": node.port}) as fleet:
            assert await edge_of(fleet, await fleet.chat()) == "embedded"
        async with fleet_behind(Edge.DIRECT, {"box": node.port}) as fleet:
            assert await edge_of(fleet, await fleet.chat()) == "nginx"
            assert fleet.coordinator.nginx.selection.decided == 1


async def test_waiting_requests_wait_in_nginx_and_those_who_leave_lose_their_place() -> None:
    gate = trio.Event()

    async def script(caller: Caller) -> None:
        await gate.wait()
        await answer_well(caller)

    node = ScriptedNode(script)
    async with serving(node), fleet_behind(Edge.GATEWAYS, {"box;slots=1": node.port}) as fleet, trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def one() -> None:
            answers.append(await fleet.chat())

        nursery.start_soon(one)
        await wait_until(lambda: len(node.seen) == 1, what="the first on the node")
        nursery.start_soon(one)
        async with fleet.talk("/api/chat", chat()):
            await wait_until(lambda: fleet.statistics().waiting == 2, what="two in the queue")
        await wait_until(lambda: fleet.statistics().waiting == 1, within_s=2, what="the place of who left to be free")
        gate.set()
        await wait_until(lambda: len(answers) == 2, what="both answers")
        assert all(answer.whole for answer in answers)
        await fleet.wait_settled()


# ---------------------------------------------------------------- nodes fail


class Heard:
    """What the clients were told."""

    def __init__(self) -> None:
        self.whole = self.cut = self.in_band = 0
        self.wrong: list[str] = []

    @property
    def all(self) -> int:
        return self.whole + self.cut + len(self.wrong)

    async def ask(self, fleet: Fleet, number: int) -> None:
        answer = await fleet.ask("POST", "/api/chat", question(number))
        last = answer.body.splitlines()[-1:] or [b""]
        if answer.status == 200 and answer.whole and b'"done":true' in last[0].replace(b" ", b""):
            self.whole += 1
        elif answer.status == 200 and not answer.whole and question(number)["stream"] and answer.body:
            self.cut += 1
            self.in_band += b'"error"' in last[0]
        else:
            self.wrong.append(f"{number}: {answer.status} whole={answer.whole} {answer.body[-200:]!r}")


async def under_load(fleet: Fleet, blow: Any) -> Heard:
    heard = Heard()

    async def strike() -> None:
        await wait_until(lambda: heard.all >= REQUESTS // 3, within_s=60, what="the first third of the requests")
        blow()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(strike)
        await many(REQUESTS, AT_ONCE, lambda number: heard.ask(fleet, number))
    return heard


@pytest.mark.parametrize("victim", ["ollama", "machine"])
async def test_a_node_dies_under_load(victim: str) -> None:
    """Who had no byte yet is answered by another node. While the gateway lives a cut is told in-band; a machine's death is a broken
    transfer, and never a clean end."""
    nodes = [quick_node(name) for name in ("a", "b", "c")]
    async with nodes[0].serve(), nodes[1].serve(), nodes[2].serve():
        ports = {f"{node.name};slots=8": node.port for node in nodes}
        async with fleet_behind(Edge.GATEWAYS, ports, AGENT_TIMEOUT="5") as fleet:

            def blow() -> None:
                if victim == "machine":
                    fleet.local_agents["b"].die()
                nodes[1].kill()

            heard = await under_load(fleet, blow)
            await fleet.wait_settled(within_s=20)
    assert heard.wrong == []
    assert heard.all == REQUESTS
    assert heard.cut <= AT_ONCE
    if victim == "ollama":
        assert heard.in_band == heard.cut


@pytest.mark.parametrize("edge", [Edge.GATEWAYS, Edge.DIRECT])
async def test_who_ended_an_answer_early_is_in_its_record(edge: Edge) -> None:
    """The node, or its gateway's whole machine, without a word; or the client."""
    broken = trio.Event()

    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        await broken.wait()
        raise Hangup

    async with serving(node := ScriptedNode(script)), fleet_behind(edge, {"box;slots=8": node.port}) as fleet:
        async with fleet.talk("/api/chat", chat()) as leaves:
            await leaves.wait_for(b"one")
        async with fleet.talk("/api/chat", chat()) as stays:
            await stays.wait_for(b"one")
            if edge is Edge.GATEWAYS:
                fleet.local_agents["box"].die()
            broken.set()
            assert not (await stays.rest()).whole
        await fleet.wait_settled(within_s=20)
        ids = [heard.received.lower().partition(b"x-request-id: ")[2][:36].decode() for heard in (leaves, stays)]
        await wait_until(lambda: len(fleet.coordinator.records.newest) == 2, what="both records")
        records = {record.request_id: record for record in fleet.coordinator.records.newest}
        left, cut = [records[request_id] for request_id in ids]
    assert left.ending.value == "cancelled"
    assert (cut.ending.value, cut.message.partition(":")[0]) == ("error", "the node broke its answer off")


async def test_a_node_that_answers_503_is_passed_over() -> None:
    async def busy(caller: Caller) -> None:
        await caller.answer(b'{"error":"server busy"}', status=503)

    sick, well = ScriptedNode(busy), ScriptedNode(answer_well)
    async with serving(sick, well):
        nodes = {"sick;slots=8": sick.port, "well;slots=8": well.port}
        async with fleet_behind(Edge.GATEWAYS, nodes, LOAD_BALANCER_MODE="round-robin") as fleet:
            answers: list[Answer] = []

            async def one(number: int) -> None:
                answers.append(await fleet.chat(stream=number % 2 == 0))

            await many(20, 4, one)
            assert {(answer.status, answer.whole, answer.headers["x-ollama-node"]) for answer in answers} == {(200, True, "well")}
            assert sick.seen
            await fleet.wait_settled()


@pytest.mark.parametrize("edge", [Edge.GATEWAYS, Edge.DIRECT])
async def test_a_storm_of_cancels_leaves_nothing_behind(edge: Edge) -> None:
    open_now = 0

    async def script(caller: Caller) -> None:
        nonlocal open_now
        open_now += 1
        try:
            await caller.begin_chunks()
            await caller.chunk(line("one"))
            await caller.wait_for_departure()
            raise Hangup
        finally:
            open_now -= 1

    nodes = [ScriptedNode(script), ScriptedNode(script)]
    async with serving(*nodes), fleet_behind(edge, {f"n{at};slots=64": node.port for at, node in enumerate(nodes)}) as fleet:

        async def leave(number: int) -> None:
            async with fleet.talk("/api/chat", chat()) as heard:
                if number % 2:
                    await heard.wait_for(b"one")

        await many(200, 40, leave)
        await fleet.wait_settled(within_s=10)
        await wait_until(lambda: open_now == 0, what="the nodes to be told")
        assert all(agent.state == "ready" and not agent.ejections for agent in fleet.agents()), "a cancel is nobody's fault"


# ---------------------------------------------------------------- nginx and the coordinator


async def count_lines(heard: Talk, until: int) -> None:
    while heard.received.count(b'"n') < until and await heard.read_some():
        pass


class Counting:
    """A node that says a line every 20 ms until `stop`."""

    def __init__(self) -> None:
        self.stop = trio.Event()

    async def script(self, caller: Caller) -> None:
        await caller.begin_chunks()
        number = 0
        while not self.stop.is_set():
            await caller.chunk(line(f"n{number}"))
            number += 1
            with trio.move_on_after(0.02):
                await self.stop.wait()
        await caller.chunk(last_line())
        await caller.end_chunks()


def assert_nothing_is_missing(answer: Answer) -> None:
    said = [row["message"]["content"] for row in answer.lines()]
    assert answer.whole
    assert said == [*(f"n{number}" for number in range(len(said) - 1)), ""]


async def test_nginx_is_reloaded_in_mid_stream() -> None:
    counting = Counting()
    node = ScriptedNode(counting.script)
    async with serving(node), fleet_behind(Edge.GATEWAYS, {"box;slots=4": node.port}) as fleet:
        assert fleet.nginx is not None
        async with fleet.talk("/api/chat", chat()) as heard:
            await count_lines(heard, 3)
            for _ in range(2):
                await fleet.nginx.runner.reload()
                async with fleet.talk("/api/chat", chat()) as other:
                    await count_lines(other, 1)
            await count_lines(heard, heard.received.count(b'"n') + 5)
            counting.stop.set()
            assert_nothing_is_missing(await heard.rest())
        assert fleet.nginx.runner.reloads == 2
        await fleet.wait_settled(within_s=10)


class Process:
    """A coordinator as a process, that can be killed and started again."""

    def __init__(self, data_dir: Path) -> None:
        self.port = free_port()
        self.data_dir = data_dir
        self._process: trio.Process | None = None

    async def start(self) -> None:
        settings = {
            "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": str(self.port), "ROUTER_DATA_DIR": str(self.data_dir), "OLLAMA_BACKENDS": "",
            "ROUTER_LOG_LEVEL": "info", "ROUTER_STOP_TIMEOUT": "500ms",
        }  # fmt: skip
        command = [sys.executable, "-m", "servers"]
        self._process = await trio.lowlevel.open_process(command, stdin=None, env={**os.environ, **settings}, cwd=ROOT)
        with trio.fail_after(30):
            while not await self._answers():  # noqa: ASYNC110  (another process)
                await trio.sleep(0.05)

    async def _answers(self) -> bool:
        try:
            return (await ask(self.port, "GET", "/readyz")).status < 500
        except (OSError, AssertionError):
            return False

    async def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()

    async def agents(self) -> Any:
        return (await ask(self.port, "GET", "/api/agents")).json()

    async def wait_for(self, what: str, condition: Any, *, within_s: float = 20.0) -> None:
        """Until `condition(agents)` holds."""
        with trio.move_on_after(within_s):
            while not condition(await self.agents()):  # noqa: ASYNC110  (another process)
                await trio.sleep(0.1)
            return
        raise AssertionError(f"not within {within_s} s: {what}: {await self.agents()}")


async def told(coordinator: Process) -> Any:
    """What nginx is told."""
    async with selector(coordinator.data_dir / "selection.sock") as select:
        return await select.nodes()


async def test_the_coordinator_is_killed_and_started_again_in_mid_stream(tmp_path: Path) -> None:
    """Streams go on; what is shown as in flight is what is, soon; new requests are served again, and an end is an end."""
    counting = Counting()
    node = ScriptedNode(counting.script)
    coordinator = Process(tmp_path / "data")
    async with serving(node), trio.open_nursery() as nursery:
        await coordinator.start()
        try:
            start_agent(coordinator.port, tmp_path, nursery, "box", 8, node.port)
            await coordinator.wait_for("the node", lambda agents: [agent["status"] for agent in agents] == ["online"])
            nginx = RunningNginx(coordinator.data_dir / "selection.sock", tmp_path / "nginx")
            await nursery.start(nginx.run)
            await nginx.wait_up()
            body = json.dumps(chat()).encode()
            async with talk(nginx.port, "POST", "/api/chat", body) as one, talk(nginx.port, "POST", "/api/chat", body) as two:
                await count_lines(one, 2)
                await count_lines(two, 2)
                await coordinator.wait_for("both in flight", lambda agents: agents[0]["active_requests"] == 2)
                before = await told(coordinator)
                await coordinator.kill()
                down = await ask(nginx.port, "POST", "/api/chat", body)
                assert (down.status, list(down.json())) == (503, ["error"])
                await count_lines(one, one.received.count(b'"n') + 5)
                await coordinator.start()
                await coordinator.wait_for(
                    "both in flight again",
                    lambda agents: [(agent["status"], agent["active_requests"]) for agent in agents] == [("online", 2)],
                    within_s=REALITY_WITHIN_S,
                )
                assert await told(coordinator) == before, "nginx need not learn anything"
                async with talk(nginx.port, "POST", "/api/chat", body) as three:
                    await count_lines(three, 2)
                    counting.stop.set()
                    answers = [await heard.rest() for heard in (one, two, three)]
            for answer in answers:
                assert_nothing_is_missing(answer)
            await coordinator.wait_for("nothing in flight", lambda agents: agents[0]["active_requests"] == 0, within_s=REALITY_WITHIN_S)
            assert nginx.runner.reloads == 0
            await nginx.stop()
        finally:
            with trio.CancelScope(shield=True):
                await coordinator.kill()
        nursery.cancel_scope.cancel()
