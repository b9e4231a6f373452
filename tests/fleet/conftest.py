"""What several end-to-end tests start from."""

from collections.abc import AsyncIterator

import pytest
from trio.testing import MockClock

from tests.fleet.clients import Sides, open_sides


@pytest.fixture
def fast_clock() -> MockClock:
    """Time that runs twenty times as fast: a limit of a minute is three seconds. Sockets and programs keep their own pace."""
    return MockClock(rate=20)


@pytest.fixture
async def sides() -> AsyncIterator[Sides]:
    """One node, directly and through the router."""
    async with open_sides() as found:
        yield found
