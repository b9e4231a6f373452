"""What several end-to-end tests start from."""

from collections.abc import AsyncIterator, Iterator

import pytest
from trio.testing import MockClock

from tests.fleet.clients import Sides, open_sides
from tests.fleet.edges import Edge, behind


@pytest.fixture
def fast_clock() -> MockClock:
    """Time that runs twenty times as fast: a limit of a minute is three seconds. Sockets and programs keep their own pace."""
    return MockClock(rate=20)


@pytest.fixture
async def sides() -> AsyncIterator[Sides]:
    """One node, directly and through the router."""
    async with open_sides() as found:
        yield found


def _edges(*proved: Edge) -> list[object]:
    """All of them; those that are named take too long for every run."""
    return [pytest.param(edge, marks=pytest.mark.prove if edge in proved else (), id=edge.value) for edge in Edge]


@pytest.fixture(params=_edges())
def every_edge(request: pytest.FixtureRequest) -> Iterator[Edge]:
    """The test's fleets stand behind each edge in turn."""
    with behind(request.param) as edge:
        yield edge
