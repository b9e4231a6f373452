"""A leaked slot, with real sockets: a stream that is closed in mid-answer makes the next request hang, and the router finds out."""

from typing import Any

import pytest
import trio

from agent.simulated.faults import Fault
from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, chat, open_fleet
from tests.fleet.rawhttp import wait_until

MODEL = "llama3.2:3b"
SILENCE_S = 0.5
"""What the router takes for much too long here, in place of half a minute."""


def node_with(name: str) -> SimulatedOllama:
    """One slot, 50 tokens a second."""
    return SimulatedOllama(name=name, models=[MODEL], slots=1, load_s=0.05, decode_tokens_s=50.0, prefill_tokens_s=50_000.0)


def question(**more: Any) -> dict[str, Any]:
    return chat(MODEL, options={"num_predict": 100}, **more)


async def leave_in_mid_answer(fleet: Fleet, node: SimulatedOllama) -> None:
    """A client reads the beginning of an answer and goes; the slot leaks."""
    node.faults.add(Fault(kind="leak", times=1))
    async with fleet.talk("/api/chat", question()) as talk:
        await talk.wait_for(b'"done":false')
    await fleet.wait_settled()


def limits(fleet: Fleet) -> None:
    fleet.coordinator.web.driver.router._leaks.silence_s = SILENCE_S


async def test_a_request_that_hangs_on_a_leaked_slot_is_served_after_an_unload() -> None:
    node = node_with("one")
    async with node.serve(), open_fleet({"one": node.port}) as fleet:
        limits(fleet)
        await leave_in_mid_answer(fleet, node)
        with trio.fail_after(30.0):
            answer = await fleet.ask("POST", "/api/chat", chat(MODEL, options={"num_predict": 3}))
        assert answer.whole
        assert answer.lines()[-1]["done"] is True
        assert sum(change.change.value == "unloaded" for change in node.engine.changes) == 1
        metrics = (await fleet.ask("GET", "/metrics")).body.decode()
        assert 'ollama_router_slot_leaks_total{agent="one"} 1.0' in metrics


async def test_it_is_tried_elsewhere_where_the_model_is_warm_too() -> None:
    nodes = [node_with("one"), node_with("two")]
    async with nodes[0].serve(), nodes[1].serve(), open_fleet({"one": nodes[0].port}) as fleet:
        limits(fleet)
        await leave_in_mid_answer(fleet, nodes[0])
        answers = []

        async def hang() -> None:
            answers.append(await fleet.ask("POST", "/api/chat", chat(MODEL, options={"num_predict": 3})))

        with trio.fail_after(30.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(hang)
                await wait_until(lambda: fleet.statistics().in_flight == 1, what="the request that hangs")
                await fleet.ask("POST", "/api/agents/backends", {"url": f"http://127.0.0.1:{nodes[1].port}", "name": "two"})
        (answer,) = answers
        assert answer.whole
        assert answer.headers["x-ollama-node"] in ("one", "two")


@pytest.mark.parametrize("silent", [{"stream": False}, {"format": "json"}], ids=["not streamed", "a format"])
async def test_who_may_rightly_be_silent_is_left_alone(silent: dict[str, Any]) -> None:
    node = node_with("one")
    async with node.serve(), open_fleet({"one": node.port}) as fleet:
        limits(fleet)
        await leave_in_mid_answer(fleet, node)
        with trio.move_on_after(4 * SILENCE_S):
            await fleet.ask("POST", "/api/chat", question(**silent))
            raise AssertionError("the slot did not leak")
        assert not any(change.change.value == "unloaded" for change in node.engine.changes)
