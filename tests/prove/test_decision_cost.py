"""What a decision costs."""

import pytest

from tests.prove.decision_cost import BARS_US, cost, fleet


def test_the_fleet_is_what_it_says() -> None:
    router = fleet(8)
    assert {len(node.loaded) for node in router.inventories()} == {3}
    assert router.statistics().in_flight == 4


@pytest.mark.prove
@pytest.mark.parametrize("nodes", BARS_US)
def test_a_decision_is_cheap(nodes: int) -> None:
    assert cost(nodes).warm_us <= BARS_US[nodes]
