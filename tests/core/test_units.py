"""Quantities."""

from hypothesis import given
from hypothesis import strategies as st

from core import units


@given(st.floats(min_value=-1e6, max_value=1e6))
def test_micros_are_whole_and_as_near_as_can_be(seconds: float) -> None:
    found = units.micros(seconds)
    assert isinstance(found, int)
    assert abs(found - seconds * units.MICROS_PER_S) <= 0.5


def test_sizes_are_powers_of_two() -> None:
    assert units.GIB == 1024 * units.MIB == 1024**3
