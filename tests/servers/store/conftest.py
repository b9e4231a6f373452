"""Every test here runs on both databases."""

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine

from tests.servers.store.databases import Databases


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    found = Databases(tmp_path_factory.mktemp("databases"))
    yield found
    found.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def engine(databases: Databases, kind: str) -> Iterator[Engine]:
    """An empty database with our tables."""
    with databases.engine(kind) as found:
        yield found
