"""Shrinking: what comes out fails, is a subsequence, and has nothing in it that is not needed."""

from hypothesis import given
from hypothesis import strategies as st

from core.simulation.shrink import shrink


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.sets(st.integers(0, 9), min_size=1, max_size=3))
def test_only_what_is_needed_is_left(items: list[int], needed: set[int]) -> None:
    items = [*items, *sorted(needed)]

    def fails(candidate: list[int]) -> bool:
        return needed <= set(candidate)

    left = shrink(items, fails)
    assert sorted(left) == sorted(needed)
    remaining = iter(items)
    assert all(any(item == other for other in remaining) for item in left)


def test_what_fails_with_nothing_shrinks_to_nothing() -> None:
    assert shrink([1, 2, 3], lambda _: True) == []


def test_tries_are_limited() -> None:
    tried = []

    def fails(candidate: list[int]) -> bool:
        tried.append(candidate)
        return len(candidate) > 500

    left = shrink(list(range(1000)), fails, tries_max=7)
    assert len(tried) == 7
    assert len(left) > 500


def test_what_cannot_be_shortened_stays() -> None:
    assert shrink([1, 2, 3, 4, 5], lambda candidate: len(candidate) == 5) == [1, 2, 3, 4, 5]
