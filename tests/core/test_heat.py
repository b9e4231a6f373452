"""Arrival rates: what they say, and that they fade."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.heat import MODELS_MAX, Heat
from core.units import Instant, ModelKey

M = ModelKey("registry.ollama.ai/library/m:latest")


def test_a_model_that_nobody_asked_for_is_cold() -> None:
    assert Heat().per_s(M, now=Instant(5.0)) == 0.0


def test_one_request_counts_like_one_in_a_minute() -> None:
    heat = Heat()
    heat.came(M, now=Instant(0.0))
    assert heat.per_s(M, now=Instant(1.0)) == pytest.approx(1 / 60)
    assert heat.per_s(M, now=Instant(600.0)) == pytest.approx(1 / 600)


def test_a_steady_stream_has_its_rate() -> None:
    heat = Heat()
    for n in range(100):
        heat.came(M, now=Instant(n * 0.5))
    assert heat.per_s(M, now=Instant(49.5)) == pytest.approx(2.0, rel=0.01)


def test_many_at_one_instant_have_a_finite_rate() -> None:
    heat = Heat()
    for _ in range(5):
        heat.came(M, now=Instant(1.0))
    assert 0 < heat.per_s(M, now=Instant(1.0)) <= 1000.0


@given(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=30), st.floats(0.0, 1000.0), st.floats(0.0, 1000.0))
def test_waiting_never_makes_it_hotter(gaps: list[float], first: float, more: float) -> None:
    heat, clock = Heat(), 0.0
    for gap in gaps:
        heat.came(M, now=Instant(clock))
        clock += gap
    early = heat.per_s(M, now=Instant(clock + first))
    assert heat.per_s(M, now=Instant(clock + first + more)) <= early


def test_the_longest_unasked_is_forgotten_first() -> None:
    heat = Heat()
    keys = [ModelKey(f"m{n}") for n in range(MODELS_MAX + 1)]
    for n, key in enumerate(keys[:MODELS_MAX]):
        heat.came(key, now=Instant(float(n)))
    heat.came(keys[0], now=Instant(9e5))
    heat.came(keys[MODELS_MAX], now=Instant(9e5))
    assert heat.per_s(keys[1], now=Instant(9e5)) == 0.0
    assert heat.per_s(keys[0], now=Instant(9e5)) > 0.0
