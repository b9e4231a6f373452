"""History on against off: requests per second at full load with nothing dropped, and latency at a steady rate."""

import pytest

from tests.bench.programs import more_files
from tests.prove.history_cost import measure

pytestmark = pytest.mark.prove


def test_history_costs_the_answers_next_to_nothing() -> None:
    more_files()
    found = measure(pairs=3, rounds=5, seconds=2)
    assert found.misses() == []
