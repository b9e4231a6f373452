"""The same requests through the world and through real sockets: the first token comes after the same time."""

import pytest

from tests.prove.two_worlds import requests, steady_seed, table, through_sockets, through_the_world


@pytest.mark.prove
@pytest.mark.parametrize("skip", [0, 1])
async def test_ttft_of_300_requests_agrees_within_10_percent(skip: int) -> None:
    arrivals = requests(300, steady_seed(300, skip=skip))
    world = through_the_world(arrivals)
    sockets = await through_sockets(arrivals)
    shown = table(arrivals, world, sockets)
    print(shown)
    for percent in (50, 95):
        assert world.percentile(percent) == pytest.approx(sockets.percentile(percent), rel=0.10), shown


@pytest.mark.slow
async def test_a_few_requests_go_to_the_same_nodes_and_fare_alike() -> None:
    arrivals = requests(30, steady_seed(30))
    world = through_the_world(arrivals)
    sockets = await through_sockets(arrivals)
    shown = table(arrivals, world, sockets)
    assert sum(one == other for one, other in zip(world.nodes, sockets.nodes, strict=True)) >= 20, shown
    assert world.percentile(50) == pytest.approx(sockets.percentile(50), rel=0.25, abs=0.05), shown
