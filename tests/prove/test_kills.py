"""The coordinator killed at random moments while requests flow: the database opens, what completed in time is in it, nothing twice."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.programs import small_node
from tests.prove.steady import flow, running
from tests.servers.store.databases import Databases

pytestmark = pytest.mark.prove

KILLS = int(os.environ.get("KILLS", "10"))
RATE = float(os.environ.get("RATE", "2000"))
"""Requests per second that are asked for; what was reached is printed."""
SEED = int(os.environ.get("SEED", "6"))
CONNECTIONS = 32
LOST_S = 0.25
"""What a crash may lose (contract 6)."""


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    found = Databases(tmp_path_factory.mktemp("databases"))
    yield found
    found.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_what_completed_250_ms_before_a_kill_is_there_and_once(kind: str, databases: Databases, tmp_path: Path) -> None:
    dice = random.Random(SEED)
    database = databases.setting(kind)
    kept: set[str] = set()
    oldest_s, rates, count = 0.0, [], 0
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "node").mkdir()
    with small_node(tmp_path / "node") as port:
        for number in range(KILLS):
            with running(tmp_path / "data", database, port) as coordinator:
                began = time.monotonic()
                asking = flow(coordinator, "--ids", "--connections", str(CONNECTIONS), rate=RATE)
                while time.monotonic() < began + 1.0:  # until it has started
                    time.sleep(0.05)
                time.sleep(dice.uniform(0.3, 2.5))
                killed_at = time.monotonic()
                coordinator.end(signal.SIGKILL)
            ended = {name: float(at) for at, name in (line.split() for line in asking.said()[1])}
            found = coordinator.recorded()
            recorded = set(found)
            ages = [round(killed_at - at, 3) for name, at in ended.items() if name not in recorded]
            rates.append(len(ended) / (max(ended.values()) - min(ended.values())))
            print(
                f"{kind}, kill {number + 1}: {len(ended)} answered at {rates[-1]:.0f}/s, {len(ages)} lost, "
                f"the oldest {max(ages, default=0)} s before the kill",
                flush=True,
            )
            assert max(ages, default=0) <= LOST_S
            assert len(recorded) == len(found)
            assert kept <= recorded
            kept, oldest_s, count = recorded, max(oldest_s, *ages, 0.0), count + len(ended)
    print(f"{kind}: {KILLS} kills, {count} answered at {sum(rates) / KILLS:.0f}/s, the oldest that was lost {oldest_s} s before its kill")
