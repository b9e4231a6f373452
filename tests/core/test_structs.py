"""What a base was told its heirs inherit: also one that says nothing itself, as in a module that is compiled."""

import gc

import pytest

from core.structs import Entry, Fact, Ordered, mypyc_attr


def test_the_heirs_of_a_fact_are_not_changed_have_a_hash_and_are_not_looked_at_by_the_collector() -> None:
    class Point(Fact):  # type: ignore[misc]  # as mypyc makes it
        x: int
        at: list[int] | None

    point = Point(1, [])
    with pytest.raises(AttributeError, match="immutable"):
        point.x = 2
    assert hash(Point(1, None)) == hash(Point(1, None))
    assert not gc.is_tracked(point)


def test_the_heirs_of_an_entry_are_changed_and_are_not_looked_at_by_the_collector() -> None:
    class Count(Entry):
        of: list[int]

    count = Count([])
    count.of = [1]
    assert count == Count([1])
    assert not gc.is_tracked(count)


def test_the_heirs_of_what_is_ordered_are_compared_by_their_fields_in_their_order() -> None:
    class Rank(Ordered):  # type: ignore[misc]  # as mypyc makes it
        tag: int
        number: int

    ranks = [Rank(2, 1), Rank(1, 2), Rank(1, 1)]
    assert sorted(ranks) == [Rank(1, 1), Rank(1, 2), Rank(2, 1)]
    with pytest.raises(AttributeError, match="immutable"):
        ranks[0].tag = 3


def test_what_is_said_to_the_compiler_changes_nothing_for_the_interpreter() -> None:
    class Plain:
        pass

    assert mypyc_attr(acyclic=True)(Plain) is Plain
