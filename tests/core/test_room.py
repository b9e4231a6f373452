"""What fits, what must go, and what is learned from seeing."""

from hypothesis import given
from hypothesis import strategies as st

from core.room import Room
from core.units import GIB, ModelKey

A, B, C, D = (ModelKey(name) for name in "abcd")


def room(total_gib: float | None = 24.0, gpus: int = 1) -> Room:
    made = Room()
    made.told(total_bytes=None if total_gib is None else int(total_gib * GIB), gpus=gpus)
    return made


def victims(
    made: Room, key: ModelKey, resident: dict[ModelKey, int], size_gib: float, prices: dict[ModelKey, int] | None = None
) -> list[ModelKey]:
    sizes = {other: size * GIB for other, size in resident.items()}
    return list(made.victims(key, sizes, size_bytes=int(size_gib * GIB), price=lambda other: (prices or {}).get(other, 0)))


def test_alone_everything_is_loaded() -> None:
    assert victims(room(4), A, {}, 40) == []
    assert victims(room(4), A, {A: 40}, 40) == []


def test_ollamas_rule_of_80_percent() -> None:
    # 24 GiB, 5 * 1.2 = 6 used, 18 free, 80 % = 14.4: 12 GiB on disk just fit, 12.1 do not.
    assert victims(room(), A, {B: 5}, 12.0) == []
    assert victims(room(), A, {B: 5}, 12.1) == [B]


def test_the_cheapest_goes_and_no_more_than_needed() -> None:
    assert victims(room(), A, {B: 5, C: 5, D: 1}, 10, {B: 9, C: 1, D: 5}) == [C]
    assert victims(room(), A, {B: 5, C: 5}, 15, {B: 1, C: 9}) == [B, C]


def test_three_models_per_gpu() -> None:
    assert victims(room(96), A, {B: 1, C: 1, D: 1}, 1, {C: -1}) == [C]
    assert victims(room(96, gpus=2), A, {B: 1, C: 1, D: 1}, 1) == []


def test_without_knowledge_it_is_believed_to_fit_until_something_went() -> None:
    made = room(None)
    made.saw_rows({B: {"size_vram": 5 * GIB}})
    assert victims(made, A, {B: 5}, 5) == []
    made.saw_eviction(11 * GIB)
    assert victims(made, A, {B: 5}, 5) == [B]
    assert victims(made, A, {B: 5}, 3) == []


def test_what_was_seen_together_fits_whatever_was_thought_before() -> None:
    made = room(None)
    made.saw_eviction(9 * GIB)
    made.saw_rows({B: {"size_vram": 6 * GIB}, C: {"size": 4 * GIB, "size_vram": 0}})
    assert victims(made, C, {B: 5}, 3) == []
    made.saw_eviction(8 * GIB)
    assert victims(made, C, {B: 5}, 3) == []


def test_reported_sizes_beat_the_guess_and_nonsense_is_ignored() -> None:
    made = room()
    made.saw_rows({A: {"size_vram": 20 * GIB}, B: "b", C: {"size": "much"}, D: {"size_vram": -5}})
    assert made.running_bytes(A, GIB) == 20 * GIB
    assert made.running_bytes(B, 10 * GIB) == 12 * GIB


def test_no_gpu_count_means_one() -> None:
    made = Room()
    made.told(total_bytes=0, gpus=0)
    assert (made.total_bytes, made.loaded_max) == (None, 3)


@given(
    st.dictionaries(st.sampled_from([B, C, D]), st.integers(1, 40), max_size=3),
    st.integers(1, 40),
    st.one_of(st.none(), st.integers(1, 200)),
    st.dictionaries(st.sampled_from([B, C, D]), st.integers(0, 100)),
)
def test_victims_are_resident_distinct_and_cheapest_first(
    resident: dict[ModelKey, int], size: int, total: int | None, prices: dict[ModelKey, int]
) -> None:
    found = victims(room(total), A, resident, size, prices)
    assert set(found) <= set(resident)
    assert len(set(found)) == len(found)
    spared = [prices.get(other, 0) for other in resident if other not in found]
    assert all(prices.get(victim, 0) <= price for victim in found for price in spared)
