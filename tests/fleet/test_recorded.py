"""Every recorded request of the inference routes, through the router in front of a node that plays the recorded answers."""

import pytest
import trio

from tests.fleet.edges import Edge
from tests.fleet.fleet import open_fleet, serving
from tests.fleet.rawhttp import RawServer, parse_answer, raw_request
from tests.fleet.recorded import Exchange, Player, difference, load, questions

pytestmark = pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)

QUESTIONS = 953
HIDDEN_FAILURES = 96
"""How many recorded answers Ollama ended as if they were good."""


async def ask_all(port: int, tapes: list[Exchange]) -> list[str]:
    """One line for each recorded request whose answer on `port` is not what it should be."""
    faults = []
    for takes in questions(tapes).values():
        request = takes[0].request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        data = await raw_request(port, request)
        if b"\r\n\r\n" not in data:
            faults.append(f"{takes[0].case}: no answer")
            continue
        got = parse_answer(data, takes[0].method)
        reasons = [difference(take.answer, got) for take in takes]
        if all(reasons):
            faults.append(f"{takes[0].case}: {reasons[0]}")
    return faults


async def test_the_judge_finds_what_ollama_hides(nursery: trio.Nursery) -> None:
    tapes = load()
    assert len(questions(tapes)) == QUESTIONS
    node = RawServer(Player(tapes).handle)
    port = await nursery.start(node.run)
    faults = await ask_all(port, tapes)
    assert len(faults) == HIDDEN_FAILURES, "\n".join(faults)
    nursery.cancel_scope.cancel()


async def test_everything_passes_as_it_was_recorded_and_what_ollama_hid_is_told() -> None:
    tapes = load()
    player = Player(tapes)
    node = RawServer(player.handle)
    async with serving(node), open_fleet({"player;slots=8": node.port}) as fleet:
        faults = await ask_all(fleet.port, tapes)
        await fleet.wait_settled()
    assert faults == []
    assert player.asked >= QUESTIONS - 10, "the router answered for the node"
