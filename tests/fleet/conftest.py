"""Clocks for tests that wait for long limits."""

import pytest
from trio.testing import MockClock


@pytest.fixture
def fast_clock() -> MockClock:
    """Time that runs twenty times as fast: a limit of a minute is three seconds. Sockets and programs keep their own pace."""
    return MockClock(rate=20)
