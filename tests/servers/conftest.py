"""What every test of the web app leaves behind is cleared away."""

from collections.abc import Iterator

import pytest

from tests.servers.house import HOUSES


@pytest.fixture(autouse=True)
def close_houses() -> Iterator[None]:
    yield
    while HOUSES:
        HOUSES.pop().close()
