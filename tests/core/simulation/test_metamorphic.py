"""Names and the origin of time change no decision, and known-bad routers for which they do are found out."""

import pytest

from tests.core.simulation.metamorphic import counts_from_the_birth_of_time, prefers_names, renamed_differs, shifted_differs

SEEDS_MAX = 200


@pytest.mark.parametrize("seed", range(20))
def test_all_of_it_later_is_the_same_later(seed: int) -> None:
    assert not shifted_differs(seed, 1500)


@pytest.mark.parametrize("seed", range(20))
def test_other_names_of_agents_change_only_names(seed: int) -> None:
    assert not renamed_differs(seed, 1500)


def test_a_router_that_knows_the_origin_of_time_is_found_out() -> None:
    assert any(shifted_differs(seed, 500, make_router=counts_from_the_birth_of_time) for seed in range(SEEDS_MAX))


def test_a_router_that_prefers_names_is_found_out() -> None:
    assert any(renamed_differs(seed, 500, make_router=prefers_names) for seed in range(SEEDS_MAX))
