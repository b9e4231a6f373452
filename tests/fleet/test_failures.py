"""Nodes die, refuse and are left under load, and no client that has not heard a word yet is told of it."""

import json
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from agent.simulated.faults import Fault
from agent.simulated.server import SimulatedOllama
from tests.fleet.edges import Edge
from tests.fleet.fleet import AgentProcess, Fleet, chat, many, open_fleet
from tests.fleet.rawhttp import wait_until

pytestmark = pytest.mark.through_nginx(Edge.HANDED_OVER)  # behind nginx with gateways: test_nginx.py

REQUESTS = 500
AT_ONCE = 32
MODEL = "llama3.2:3b"


def quick_node(name: str, **more: Any) -> SimulatedOllama:
    """A node that loads at once and answers a short question within a few tens of milliseconds."""
    knobs: dict[str, Any] = {"slots": 8, "load_s": 0.01, "decode_tokens_s": 500.0, "prefill_tokens_s": 50_000.0, "batch_slope": 0.0}
    return SimulatedOllama(name=name, models=[MODEL], **(knobs | more))


def named(nodes: list[SimulatedOllama], slots: int = 8) -> dict[str, int]:
    """What `open_fleet` takes."""
    return {f"{node.name};slots={slots}": node.port for node in nodes}


def question(number: int, *, stream: bool) -> dict[str, Any]:
    return chat(MODEL, stream=stream, content=f"Question {number}", options={"num_predict": 12})


@dataclass
class Heard:
    """What the clients of a test were told."""

    whole: int = 0
    told_in_band: int = 0
    wrong: list[str] = field(default_factory=list)
    before_first_byte: Counter[int] = field(default_factory=Counter)

    async def ask(self, fleet: Fleet, number: int) -> None:
        """Ask, and judge the answer: whole, or broken off after its first byte with an error in-band and no last chunk."""
        stream = number % 3 != 0
        answer = await fleet.ask("POST", "/api/chat", question(number, stream=stream))
        if answer.status != 200:
            self.before_first_byte[answer.status] += 1
            self.wrong.append(f"{number}: status {answer.status}: {answer.body[:200]!r}")
            return
        last = answer.lines()[-1] if answer.body.strip() else {}
        if answer.whole and last.get("done") is True:
            self.whole += 1
        elif stream and not answer.whole and "error" in last and len(answer.lines()) > 1:
            self.told_in_band += 1
        else:
            self.wrong.append(f"{number}: whole={answer.whole} {answer.body[-200:]!r}")

    @property
    def all(self) -> int:
        return self.whole + self.told_in_band + len(self.wrong)


async def under_load(fleet: Fleet, blow: Callable[[], Awaitable[None] | None], *, after: int = REQUESTS // 3) -> Heard:
    """500 requests, 32 at once; `blow` falls when a third of them are over."""
    heard = Heard()

    async def strike() -> None:
        await wait_until(lambda: heard.all >= after, within_s=60, what="the first third of the requests")
        waiting = blow()
        if waiting is not None:
            await waiting

    async with trio.open_nursery() as nursery:
        nursery.start_soon(strike)
        await many(REQUESTS, AT_ONCE, lambda number: heard.ask(fleet, number))
    return heard


def assert_nobody_was_let_down(heard: Heard) -> None:
    assert heard.wrong == []
    assert heard.all == REQUESTS
    assert heard.told_in_band <= AT_ONCE


# ---------------------------------------------------------------- a node dies


async def test_a_node_dies_under_load() -> None:
    nodes = [quick_node(name) for name in ("a", "b", "c")]
    async with nodes[0].serve(), nodes[1].serve(), nodes[2].serve(), open_fleet(named(nodes)) as fleet:
        heard = await under_load(fleet, nodes[1].kill)
        await fleet.wait_settled()
        await wait_until(lambda: fleet.agent("b").status == "offline", what="the dead node to be offline")
        assert sum(fleet.statistics().in_flight_by_agent.values()) == 0
    assert_nobody_was_let_down(heard)
    assert all(node.log for node in nodes)


async def test_a_node_that_comes_back_is_used_again() -> None:
    nodes = [quick_node(name) for name in ("a", "b")]
    async with nodes[0].serve(), trio.open_nursery() as nursery:
        port = await nursery.start(nodes[1].run)
        settings = {"LOAD_BALANCER_MODE": "round-robin"}
        async with open_fleet(named(nodes), **settings) as fleet:
            await nodes[1].stop()
            assert (await fleet.ask("POST", "/api/chat", question(1, stream=False))).status == 200
            await wait_until(lambda: fleet.agent("b").status == "offline", what="the stopped node to be offline")
            before = len(nodes[1].log)
            await nursery.start(nodes[1].run, "127.0.0.1", port)
            await wait_until(lambda: fleet.agent("b").state == "ready", what="the node to be back")
            for number in range(8):
                assert (await fleet.ask("POST", "/api/chat", question(number, stream=False))).status == 200
            assert any(entry.route == "/api/chat" for entry in list(nodes[1].log)[before:])
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- the same with agents and gateways


@pytest.mark.slow
@pytest.mark.through_nginx  # docs/nginx.md says what differs there; test_nginx.py shows it
@pytest.mark.parametrize("victim", ["ollama", "agent", "both"])
async def test_a_machine_with_an_agent_dies_under_load(victim: str) -> None:
    nodes = [quick_node(name) for name in ("a", "b", "c")]
    async with nodes[0].serve(), nodes[1].serve(), nodes[2].serve(), open_fleet(AGENT_TIMEOUT="5") as fleet:
        agents: list[AgentProcess] = []
        for node in nodes:
            agents.append(await fleet.start_agent(node.port, node.name, OLLAMA_NUM_PARALLEL="8"))
        await fleet.wait_ready(3, within_s=60)
        assert all(agent.upstream.gateway for agent in fleet.agents())

        def blow() -> None:
            if victim in ("ollama", "both"):
                nodes[1].kill()
            if victim in ("agent", "both"):
                agents[1].kill()

        heard = await under_load(fleet, blow)
        await fleet.wait_settled()
        await wait_until(lambda: sum(agent.state == "ready" for agent in fleet.agents()) == 2, within_s=20, what="one agent out")
    assert_nobody_was_let_down(heard)


@pytest.mark.slow
@pytest.mark.through_nginx  # docs/nginx.md says what differs there; test_nginx.py shows it
async def test_an_agent_that_hangs_is_noticed_within_its_timeout() -> None:
    nodes = [quick_node(name) for name in ("a", "b")]
    async with nodes[0].serve(), nodes[1].serve(), open_fleet(AGENT_TIMEOUT="3", LOAD_BALANCER_MODE="round-robin") as fleet:
        agents = [await fleet.start_agent(node.port, node.name, OLLAMA_NUM_PARALLEL="8") for node in nodes]
        await fleet.wait_ready(2, within_s=60)
        agents[0].send(signal.SIGSTOP)
        stopped_at = trio.current_time()
        answers = []
        async with trio.open_nursery() as nursery:

            async def ask(number: int) -> None:
                answers.append(await fleet.ask("POST", "/api/chat", question(number, stream=True)))

            for number in range(8):
                nursery.start_soon(ask, number)
            await wait_until(lambda: sum(agent.state == "ready" for agent in fleet.agents()) == 1, what="the hanging agent to be out")
            assert trio.current_time() - stopped_at < 3 + 1.5
        assert [answer.status for answer in answers] == [200] * 8
        assert all(answer.whole for answer in answers)


# ---------------------------------------------------------------- a node is busy


async def test_a_node_that_says_503_is_passed_over_and_used_again() -> None:
    busy, free = quick_node("busy"), quick_node("free")
    async with busy.serve(), free.serve():
        settings = {"LOAD_BALANCER_MODE": "round-robin"}
        async with open_fleet(named([busy, free]), **settings) as fleet:
            busy.faults.add(Fault(kind="status", status=503))
            statuses: Counter[int] = Counter()

            async def ask(number: int) -> None:
                answer = await fleet.ask("POST", "/api/chat", question(number, stream=number % 2 == 0))
                statuses[answer.status] += 1

            await many(200, 8, ask)
            assert statuses == {200: 200}
            refused = [entry for entry in busy.log if entry.fault]
            assert refused, "the busy node was never asked"
            assert fleet.agent("busy").ejections == []
            assert fleet.agent("busy").state == "ready"
            busy.faults.clear()
            before = len(busy.log)

            async def used_again() -> None:
                while not any(entry.route == "/api/chat" and entry.status == 200 for entry in list(busy.log)[before:]):
                    await ask(0)

            with trio.fail_after(20):
                await used_again()
            await fleet.wait_settled()


# ---------------------------------------------------------------- clients leave


async def test_clients_that_leave_during_prefill_cost_nothing() -> None:
    nodes = [quick_node(name, slots=4, prefill_tokens_s=500.0, prompt_cache=False) for name in ("a", "b")]
    async with nodes[0].serve(), nodes[1].serve(), open_fleet(named(nodes, 4)) as fleet:
        await ask_each_once(fleet)
        long = chat(MODEL, content="word " * 10_000)
        left_at: list[float] = []

        async def leave() -> None:
            async with fleet.talk("/api/chat", long):
                await wait_until(lambda: len(started(nodes)) >= 8, within_s=30, what="the slots to be full")
                await trio.sleep(0.2)
            left_at.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(leave)
        await fleet.wait_settled()
        await wait_until(lambda: all(entry.cancelled_at is not None for entry in started(nodes)), within_s=1, what="the cancels")
        for entry in started(nodes):
            assert entry.cancelled_at is not None
            assert entry.cancelled_at - min(left_at) <= 1
            assert entry.tokens_after_cancel == 0
            assert entry.tokens_generated == 0
        heard = Heard()
        await many(100, 8, lambda number: heard.ask(fleet, number))
        assert (heard.whole, heard.wrong) == (100, [])
        assert [agent.ejections for agent in fleet.agents()] == [[], []]


async def ask_each_once(fleet: Fleet) -> None:
    """Load the model everywhere, so that what follows is prefill and not loading."""
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(Heard().ask, fleet, number)


def started(nodes: list[SimulatedOllama]) -> list[Any]:
    """Requests with a long prompt that reached a node."""
    return [entry for node in nodes for entry in node.log if entry.route == "/api/chat" and long_request(entry)]


def long_request(entry: Any) -> bool:
    lengths = [int(value) for name, value in entry.headers if name.lower() == b"content-length"]
    return bool(lengths) and lengths[0] > 10_000


# ---------------------------------------------------------------- all kinds of failure, one after another

BEFORE_THE_FIRST_BYTE = ["refuse", "close", "reset", "garbage", "empty"]


@pytest.mark.parametrize("kind", BEFORE_THE_FIRST_BYTE)
async def test_what_fails_before_the_first_byte_is_tried_elsewhere(kind: Any) -> None:
    sick, well = quick_node("sick"), quick_node("well")
    async with sick.serve(), well.serve():
        settings = {"LOAD_BALANCER_MODE": "round-robin"}
        async with open_fleet(named([sick, well]), **settings) as fleet:
            sick.faults.add(Fault(kind=kind))
            heard = Heard()
            await many(12, 2, lambda number: heard.ask(fleet, number))
            await fleet.wait_settled()
    assert (heard.whole, heard.wrong) == (12, [])


async def test_a_whole_answer_made_of_nothing_is_tried_elsewhere() -> None:
    sick, well = quick_node("sick"), quick_node("well")
    async with sick.serve(), well.serve(), open_fleet(named([sick, well]), LOAD_BALANCER_MODE="round-robin") as fleet:
        sick.faults.add(Fault(kind="blank"))
        for number in range(8):
            answer = await fleet.ask("POST", "/api/chat", question(number, stream=False))
            assert (answer.status, answer.json()["done"]) == (200, True)
            assert not answer.json()["created_at"].startswith("0001")
    assert any(entry.fault for entry in sick.log)


@pytest.mark.parametrize("kind", ["close", "reset", "cut", "end", "error", "malformed"])
async def test_what_fails_after_the_first_byte_is_told(kind: Any) -> None:
    node = quick_node("only")
    async with node.serve(), open_fleet(named([node])) as fleet:
        node.faults.add(Fault(kind=kind, after_tokens=3))
        answer = await fleet.ask("POST", "/api/chat", question(1, stream=True))
        await fleet.wait_settled()
    assert answer.status == 200
    last = answer.body.splitlines()[-1]
    if kind == "malformed":  # the line is the node's own; the answer goes on to its end
        assert answer.whole
        assert json.loads(last)["done"] is True
    else:
        assert "error" in json.loads(last)
        assert answer.whole is (kind == "error"), "only an error that the node told itself is an end"
