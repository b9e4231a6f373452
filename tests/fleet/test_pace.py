"""Time: tokens arrive at the node's pace, silence is no failure, and a node that is gone is noticed."""

import json
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from tests.fleet.edges import Edge
from tests.fleet.fleet import ScriptedNode, answer_well, chat, last_line, line, open_fleet, serving
from tests.fleet.rawhttp import Caller, Talk, talk, wait_until

TOKENS = 200
PACE_S = 0.02
ADDED_GAP_P99_S = 0.005


async def paced(caller: Caller) -> None:
    """200 lines, one every 20 ms, by the clock."""
    await caller.begin_chunks()
    start = trio.current_time()
    for number in range(TOKENS):
        await trio.sleep_until(start + number * PACE_S)
        await caller.chunk(line(str(number)) if number < TOKENS - 1 else last_line())
    await caller.end_chunks()


async def say_nothing(_: Caller) -> None:
    await trio.sleep_forever()


def gap_p99(heard: Talk) -> float:
    """The 99th percentile of the gaps between arrivals of lines. Lines that came together are one arrival."""
    times = [at for at, data in heard.arrivals if b"\n" in data]
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    assert len(gaps) > TOKENS * 0.9, f"only {len(gaps)} gaps: lines were held back"
    return gaps[int(len(gaps) * 0.99)]


@pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)
async def test_tokens_arrive_at_the_nodes_pace() -> None:
    found: dict[str, float] = {}

    async def listen(name: str, port: int) -> None:
        async with talk(port, "POST", "/api/chat", chat()) as heard:
            answer = await heard.rest()
            assert answer.whole
            assert len(answer.lines()) == TOKENS
            found[name] = gap_p99(heard)

    node = ScriptedNode(paced)
    async with serving(node), open_fleet({"node;slots=2": node.port}) as fleet, trio.open_nursery() as nursery:
        nursery.start_soon(listen, "direct", node.port)
        nursery.start_soon(listen, "routed", fleet.port)
    assert found["routed"] <= found["direct"] + ADDED_GAP_P99_S, found


async def test_a_tool_call_that_is_silent_for_90_s_is_not_given_up(fast_clock: MockClock) -> None:
    await silent_for_90_s()


@pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)
@pytest.mark.prove
async def test_a_tool_call_that_is_silent_for_90_real_s_is_not_given_up() -> None:
    await silent_for_90_s()


async def silent_for_90_s() -> None:
    async def script(caller: Caller) -> None:
        await trio.sleep(90)
        await answer_well(caller)

    node = ScriptedNode(script)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    async with serving(node), open_fleet([node.port]) as fleet:
        started = trio.current_time()
        answer = await fleet.ask("POST", "/api/chat", chat(tools=tools), patience_s=300)
        assert trio.current_time() - started >= 90
        assert answer.status == 200
        assert answer.whole
    assert len(node.seen) == 1


async def test_silence_in_mid_stream_is_not_given_up(fast_clock: MockClock) -> None:
    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        await trio.sleep(90)
        await caller.chunk(last_line())
        await caller.end_chunks()

    node = ScriptedNode(script)
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await fleet.ask("POST", "/api/chat", chat(), patience_s=300)
    assert (answer.whole, len(answer.lines())) == (True, 2)


async def test_a_vanished_node_is_noticed_and_its_waiting_requests_move_on(fast_clock: MockClock) -> None:
    """It takes connections and never says a word again: no reset, no refusal."""
    vanishing, staying = ScriptedNode(say_nothing), ScriptedNode(answer_well)
    async with serving(vanishing, staying) as ports:
        settings = {"AGENT_TIMEOUT": "6", "HEALTH_CHECK_INTERVAL": "2", "LOAD_BALANCER_MODE": "round-robin"}
        async with open_fleet({"vanishing;slots=8": ports[0], "staying;slots=8": ports[1]}, **settings) as fleet:
            answers = []

            async def ask() -> None:
                answers.append(await fleet.ask("POST", "/api/chat", chat(), patience_s=120))

            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(ask)
                await wait_until(lambda: len(vanishing.seen) >= 3, within_s=40, what="requests on the node that vanishes")
                vanishing.unplugged = True
                vanished_at = trio.current_time()
                await wait_until(lambda: fleet.agent("vanishing").status == "offline", within_s=60, what="the node to be offline")
                assert trio.current_time() - vanished_at <= 6 + 2 + 5  # its timeout, the check that heard it last, the sweep
            assert [answer.status for answer in answers] == [200] * 8
            assert all(answer.whole for answer in answers)
            await fleet.wait_settled(within_s=60)


async def test_a_stream_whose_node_vanishes_gets_an_error_in_band(fast_clock: MockClock) -> None:
    async def script(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(line("one"))
        node.unplugged = True
        await trio.sleep_forever()

    node = ScriptedNode(script)
    async with serving(node), open_fleet([node.port], AGENT_TIMEOUT="6", HEALTH_CHECK_INTERVAL="2") as fleet:
        answer = await fleet.ask("POST", "/api/chat", chat(), patience_s=120)
        assert not answer.whole
        assert "error" in json.loads(answer.body.splitlines()[-1])
        await fleet.wait_settled(within_s=60)
