"""All of it again behind nginx, by both ways that lead through it: the cases of every client, the call sequences, and the checklist.

A part runs always, all of it in `make prove`. What may differ between the edges is in docs/nginx.md; here nothing does.
"""

from collections.abc import Iterator

import pytest
import trio

from tests.conformance.programs import CLIENTS, Client
from tests.conformance.replays import REPLAYS
from tests.conformance.run import of_checklist, of_client, of_program
from tests.fleet.edges import Edge, behind

ALWAYS = ("vercel_npm", "openai_npm", "anthropic_npm")
"""Clients that are quick to run, one for each protocol."""


@pytest.fixture(
    params=[pytest.param(Edge.GATEWAYS, id="gateways"), pytest.param(Edge.HANDED_OVER, id="handed-over", marks=pytest.mark.prove)],
    autouse=True,
)
def edge(request: pytest.FixtureRequest) -> Iterator[Edge]:
    with behind(request.param) as found:
        yield found


def _param(client: Client) -> object:
    return pytest.param(client, id=client.name, marks=pytest.mark.slow if client.name in ALWAYS else pytest.mark.prove)


@pytest.mark.parametrize("client", [_param(client) for client in CLIENTS])
def test_every_case(client: Client) -> None:
    found = trio.run(of_client, client)
    assert {str(case): outcome.problem for case, outcome in found.items() if outcome.problem} == {}
    assert len(found) == len(client.cases) > 0


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted({replay.program for replay in REPLAYS}))
def test_every_replay(program: str) -> None:
    found = trio.run(of_program, program)
    assert {str(replay): outcome.problem for replay, outcome in found.items() if outcome.problem} == {}
    assert found


@pytest.mark.slow
def test_the_checklist() -> None:
    assert {text: problem for text, problem in trio.run(of_checklist).items() if problem} == {}
