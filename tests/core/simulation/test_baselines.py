"""Each rule chooses what its description says."""

import pytest

from core.simulation.baselines import (
    SPILL_ABOVE,
    RoundRobin,
    Seen,
    at_random,
    least_outstanding,
    lmetric_like,
    rules,
    two_choices,
    warm_and_spill,
)
from core.simulation.prng import Prng
from core.simulation.workload import Arrival

ASK = Arrival(at_s=0.0, model="m", input_tokens=10, output_tokens=10)


def nodes(*in_flight: int, warm: tuple[int, ...] = ()) -> list[Seen]:
    out = []
    for index, count in enumerate(in_flight):
        node = Seen(index, 1.0)
        node.in_flight = count
        node.loaded = frozenset({"m"} if index in warm else ())
        out.append(node)
    return out


def test_round_robin_takes_turns() -> None:
    rule, fleet = RoundRobin(), nodes(0, 0, 0)
    chosen = [rule(ASK, fleet, Prng(1)).index for _ in range(6)]
    assert sorted(chosen[:3]) == [0, 1, 2]
    assert chosen[:3] == chosen[3:]


def test_random_reaches_every_node() -> None:
    dice, fleet = Prng(1), nodes(0, 9, 9)
    assert {at_random(ASK, fleet, dice).index for _ in range(60)} == {0, 1, 2}


def test_least_outstanding_breaks_ties_at_random() -> None:
    dice, fleet = Prng(1), nodes(2, 1, 1)
    assert {least_outstanding(ASK, fleet, dice).index for _ in range(60)} == {1, 2}


def test_two_choices_never_takes_the_worst_of_two() -> None:
    dice, fleet = Prng(1), nodes(0, 5)
    assert [two_choices(ASK, fleet, dice).index for _ in range(200)].count(1) < 80


def test_warm_nodes_first_until_they_are_full() -> None:
    dice = Prng(1)
    assert warm_and_spill(ASK, nodes(0, SPILL_ABOVE, warm=(1,)), dice).index == 1
    assert warm_and_spill(ASK, nodes(0, SPILL_ABOVE + 1, warm=(1,)), dice).index == 0


def test_a_cold_node_counts_five_times() -> None:
    dice = Prng(1)
    assert lmetric_like(ASK, nodes(0, 3, warm=(1,)), dice).index == 1
    assert lmetric_like(ASK, nodes(0, 5, warm=(1,)), dice).index == 0


@pytest.mark.parametrize("name", list(rules()))
def test_every_rule_chooses_a_candidate(name: str) -> None:
    fleet = nodes(1, 2, 3, warm=(2,))
    assert rules()[name]()(ASK, fleet, Prng(3)) in fleet
