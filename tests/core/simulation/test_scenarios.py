"""The named stories: nobody is left unsettled, and what each one shows is bounded. The figures themselves are in docs/simulation.md."""

import pytest

from core.events import Ending
from tests.core.simulation import scenarios
from tests.core.simulation.scenarios import PREDICTED, STEADY, STORIES, Told, came_after, prediction_errors_ms


@pytest.fixture(scope="module")
def told() -> dict[str, Told]:
    return {name: story() for name, story in STORIES.items()}


@pytest.mark.parametrize("name", list(STORIES))
def test_none_is_left_unsettled(name: str, told: dict[str, Told]) -> None:
    assert told[name].verdict.passed, told[name].verdict


@pytest.mark.parametrize("name", ["nothing_wrong", "gray_failure", "storm_of_503", "flapping_node", "partition_of_half_the_fleet"])
def test_while_some_nodes_are_well_every_request_is_served(name: str, told: dict[str, Told]) -> None:
    """All but those whose first byte was out when their node went: nobody can try these elsewhere."""
    failed = [record for record in told[name].records if record.ending is not Ending.SUCCESS]
    assert len(told[name].records) == len(STEADY)
    assert all(record.ttft_ms is not None for record in failed)
    assert len(failed) <= len(STEADY) // 50
    assert told[name].ttft_s(50) < 2 * told["nothing_wrong"].ttft_s(50) + 0.05


def test_a_gray_node_does_not_hold_up_the_others(told: dict[str, Told]) -> None:
    assert told["gray_failure"].ttft_s(95) < told["nothing_wrong"].ttft_s(95) + 1.0


def test_a_storm_of_503_everywhere_delays_and_refuses_nobody(told: dict[str, Told]) -> None:
    story = told["storm_of_503_everywhere"]
    assert story.count(Ending.SUCCESS) == len(STEADY)
    assert story.ttft_s(99) < 10.0 + 8.0  # the storm, and the longest pause of a busy node


def test_after_a_storm_of_cancels_all_is_as_before(told: dict[str, Told]) -> None:
    story = told["storm_of_cancels"]
    assert story.count(Ending.CANCELLED) > 100
    late = came_after(80.0, 10_000)
    assert story.ttft_s(95, of=late) < told["nothing_wrong"].ttft_s(95) + 0.5


def test_a_restart_costs_what_was_under_way_and_what_came_meanwhile(told: dict[str, Told]) -> None:
    story = told["coordinator_restart"]
    assert len(story.records) >= len(STEADY) - 20  # two seconds of arrivals, and those in flight, were never recorded
    assert story.count(Ending.SUCCESS) >= len(story.records) - 2


def test_the_first_few_wait_for_the_warm_node(told: dict[str, Told]) -> None:
    story = told["warm_busy_against_cold_idle"]
    assert story.loads <= 2
    assert story.ttft_s(100) < 8.0


def test_the_third_client_does_not_wait_until_the_traffic_ends(told: dict[str, Told]) -> None:
    """The figure is in the table: alone, an Ollama lets it wait until the traffic ends."""
    assert scenarios.waited_for_the_other_model(told["victim_of_a_cold_load"]) < 30.0


def test_two_context_lengths_on_two_nodes_cost_a_load_each(told: dict[str, Told]) -> None:
    assert told["two_context_lengths"].count(Ending.SUCCESS) == 100
    assert told["two_context_lengths"].loads == 2


def test_leaked_slots_are_healed_and_everybody_who_stays_is_served(told: dict[str, Told]) -> None:
    story = told["leaked_slots"]
    assert story.count(Ending.CANCELLED) > 5
    assert story.count(Ending.SUCCESS) == len(story.records) - story.count(Ending.CANCELLED)
    assert 2 < story.loads < 12, "a leak was found, and the model loaded anew"
    assert story.ttft_s(90) < 5.0


def test_the_start_is_predicted_well_on_equal_nodes() -> None:
    errors = prediction_errors_ms(PREDICTED["eight equal nodes"], steps=20_000)
    assert len(errors) > 500
    assert errors[len(errors) // 2] < 250


def test_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    scenarios.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 4 + len(STORIES) + len(PREDICTED)
    assert any("waited" in line for line in lines)
