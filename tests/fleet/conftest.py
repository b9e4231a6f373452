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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked `through_nginx(edge, ...)` runs with its fleets behind each of these too: in `make prove`, or in every run where the
    mark says `always=True`."""
    mark = metafunc.definition.get_closest_marker("through_nginx")
    if mark is not None:
        marks = () if mark.kwargs.get("always") else (pytest.mark.prove,)
        params = [pytest.param(edge, id=edge.value.replace(" ", "-"), marks=marks) for edge in mark.args]
        metafunc.parametrize("edge_of_fleets", [pytest.param(Edge.EMBEDDED, id="embedded"), *params], indirect=True)


@pytest.fixture(autouse=True)
def edge_of_fleets(request: pytest.FixtureRequest) -> Iterator[Edge]:
    """What the fleets of this test stand behind."""
    with behind(getattr(request, "param", Edge.EMBEDDED)) as edge:
        yield edge
