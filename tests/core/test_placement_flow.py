"""The linear program: answers that can be computed by hand, and the properties of every answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.placement_flow import Budget, Flow, best_flow

PLENTY = 10_000

speeds = st.floats(0.05, 20.0, allow_nan=False)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[dict[int, float]], list[float]]:
    models = draw(st.integers(1, 6))
    nodes = draw(st.integers(1, 6))
    work = [{model: draw(speeds) for model in range(models) if draw(st.integers(0, 3))} for _ in range(nodes)]
    return work, [draw(st.floats(0.001, 5.0)) for _ in range(models)]


def solve(work: list[dict[int, float]], mix: list[float], steps: int = PLENTY) -> Flow:
    return best_flow(work, mix, Budget(steps))


def test_one_node_serves_one_model_all_of_its_time() -> None:
    flow = solve([{0: 0.5}], [3.0])
    assert flow.rate == pytest.approx(2.0)
    assert flow.time == [{0: pytest.approx(1.0)}]


def test_two_models_on_one_node_share_its_time_by_their_traffic() -> None:
    assert solve([{0: 1.0, 1: 2.0}], [1.0, 1.0]).rate == pytest.approx(1 / 1.5, rel=1e-6)


def test_each_node_does_what_it_does_best() -> None:
    flow = solve([{0: 1.0, 1: 10.0}, {0: 10.0, 1: 1.0}], [1.0, 1.0])
    assert flow.rate == pytest.approx(2.0)
    assert [sorted(times) for times in flow.time] == [[0], [1]]


def test_the_rate_is_in_requests_whatever_unit_the_mix_has() -> None:
    assert solve([{0: 0.5, 1: 1.0}], [2.0, 6.0]).rate == pytest.approx(solve([{0: 0.5, 1: 1.0}], [0.25, 0.75]).rate, rel=1e-6)


def test_a_model_that_nobody_may_run_leaves_nothing() -> None:
    assert solve([{0: 1.0}], [1.0, 1.0]).rate == 0.0


def test_a_model_that_is_hardly_asked_for_has_its_place_nevertheless() -> None:
    flow = solve([{0: 1.0, 1: 1.0}, {0: 1.0}], [1.0, 1e-9])
    assert 1 in flow.time[0]


def test_an_answer_that_ran_out_of_pivots_says_so() -> None:
    flow = solve([{0: 1.0, 1: 10.0}, {0: 10.0, 1: 1.0}], [1.0, 1.0], steps=2)
    assert not flow.optimal
    assert flow.rate <= 2.0


@given(programs())
def test_no_node_is_given_more_than_its_time_and_each_model_gets_its_part(program: tuple[list[dict[int, float]], list[float]]) -> None:
    work, mix = program
    flow = solve(work, mix)
    assert flow.optimal
    assert flow == solve(work, mix)
    if not all(any(model in of_node for of_node in work) for model in range(len(mix))):
        assert flow.rate == 0.0
        return
    assert all(sum(times.values()) <= 1 + 1e-6 for times in flow.time)
    for model, part in enumerate(mix):
        served = sum(times.get(model, 0.0) / work[node][model] for node, times in enumerate(flow.time) if model in times)
        assert served >= flow.rate * part / sum(mix) * (1 - 1e-3) - 1e-4


@given(programs())
def test_no_answer_is_worse_than_the_simple_ones(program: tuple[list[dict[int, float]], list[float]]) -> None:
    """Each node's time divided by the mix's own work is feasible where every node may run everything."""
    work, mix = program
    everywhere = [of_node for of_node in work if len(of_node) == len(mix)]
    simple = sum(sum(mix) / sum(part * of_node[model] for model, part in enumerate(mix)) for of_node in everywhere)
    assert solve(work, mix).rate >= simple * (1 - 1e-5)
    assert sum(len(times) for times in solve(work, mix).time) <= len(work) + len(mix)


@given(programs())
def test_faster_nodes_and_more_of_them_carry_more(program: tuple[list[dict[int, float]], list[float]]) -> None:
    work, mix = program
    rate = solve(work, mix).rate
    assert solve([{model: seconds / 2 for model, seconds in of_node.items()} for of_node in work], mix).rate == pytest.approx(
        2 * rate, rel=1e-4
    )
    assert solve([*work, work[0]], mix).rate >= rate * (1 - 1e-5)
