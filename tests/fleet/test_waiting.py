"""Waiting for a warm, busy node is weighed against loading the model on an idle one."""

from typing import Any

import trio
from trio.testing import MockClock

from agent.simulated.models import guessed_model
from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, chat, open_fleet
from tests.fleet.rawhttp import Answer, wait_until

MODEL = "llama3.2:3b"
LOAD_S = 5.0
TOKENS = 50
"""At 50 tokens a second: a service time of one second."""


def node(name: str) -> SimulatedOllama:
    return SimulatedOllama(
        name=name,
        models=[guessed_model(MODEL)],
        slots=1,
        load_s=LOAD_S,
        decode_tokens_s=50.0,
        prefill_tokens_s=50_000.0,
        prompt_cache=False,
    )


async def ask(fleet: Fleet, answers: list[Answer]) -> None:
    body: dict[str, Any] = chat(MODEL, stream=True, options={"num_predict": TOKENS})
    answers.append(await fleet.ask("POST", "/api/chat", body, patience_s=300))


async def at_once(fleet: Fleet, count: int) -> None:
    """So many requests at once, all of which must be answered well."""
    answers: list[Answer] = []
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(ask, fleet, answers)
    assert [answer.status for answer in answers] == [200] * count
    assert all(answer.whole and answer.lines()[-1]["done"] for answer in answers)


def served(sim: SimulatedOllama) -> int:
    return sum(entry.route == "/api/chat" and entry.done for entry in sim.log)


async def test_two_wait_for_the_warm_node_and_forty_load_it_elsewhere_once(fast_clock: MockClock) -> None:
    warm, cold = node("warm"), node("cold")
    async with warm.serve(), open_fleet({"warm;slots=1": warm.port}) as fleet, cold.serve():
        await at_once(fleet, 1)  # loads it, and lets the router see what a load and an answer cost
        await at_once(fleet, 1)
        added = await fleet.ask("POST", "/api/agents/backends", {"url": cold.url, "name": "cold", "slots": 1})
        assert added.status in (200, 201, 202), added.body
        await fleet.wait_ready(2, within_s=60)
        await wait_until(lambda: fleet.agent("warm").loaded, within_s=60, what="the router to see what is loaded")

        await at_once(fleet, 2)
        assert cold.loads == []
        assert served(warm) == 4

        await at_once(fleet, 40)
        assert len(cold.loads) == 1
        assert len(warm.loads) == 1
        assert served(cold) >= 5
        assert served(warm) >= 5
        assert served(cold) + served(warm) == 44
        await fleet.wait_settled(within_s=60)
