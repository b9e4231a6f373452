"""What a node holds and has in memory: rows of any shape, and which of two sources is believed."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.inventory import REPORT_AGE_S, ROWS_MAX, Inventory, Loading
from core.names import normalise
from core.units import Instant

A, B = normalise("a"), normalise("b")


def row(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "model": name, "size": 1000, "digest": f"digest of {name}", **fields}


def known(*names: str) -> Inventory:
    inventory = Inventory()
    inventory.report_installed([row(name) for name in names])
    return inventory


def at(seconds: float) -> Instant:
    return Instant(seconds)


def test_rows_become_models() -> None:
    inventory = Inventory()
    assert not inventory.known
    assert inventory.report_installed([row("a"), "library/B:latest", {"model": "c", "size": -3, "digest": 7}, row("A", size=5)])
    assert inventory.known
    assert [(model.key, model.size_bytes, model.digest) for model in inventory.installed.values()] == [
        (A, 1000, "digest of a"), (B, 0, ""), (normalise("c"), 0, ""),
    ]  # fmt: skip


def test_an_equal_report_changes_nothing() -> None:
    inventory = known("a")
    assert not inventory.report_installed([row("a")])
    assert inventory.report_installed([])
    assert inventory.installed == {}


NAMES = st.sampled_from(("name", "model", "size", "digest"))
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner)
)


@given(st.lists(JUNK))
def test_any_rows_are_survived(rows: list[Any]) -> None:
    inventory = Inventory()
    inventory.report_installed(rows)
    inventory.report_loaded(rows, asked_at=None, now=at(100))
    assert inventory.resident.keys() <= inventory.installed.keys()


def test_rows_beyond_the_limit_are_not_looked_at() -> None:
    inventory = known(*(f"m{number}" for number in range(ROWS_MAX + 3)))
    assert len(inventory.installed) == ROWS_MAX


def test_what_a_report_names_is_resident_and_what_it_does_not_is_gone() -> None:
    inventory = known("a", "b")
    inventory.report_loaded([row("a"), "unknown"], asked_at=at(1), now=at(2))
    assert list(inventory.resident) == [A]
    inventory.report_loaded([row("b")], asked_at=at(3), now=at(4))
    assert list(inventory.resident) == [B]


def test_two_names_of_one_digest_share_a_runner() -> None:
    inventory = Inventory()
    inventory.report_installed([row("a", digest="same"), row("b", digest="same"), row("c", digest="")])
    inventory.report_loaded([row("a", digest="same"), row("x", digest="")], asked_at=at(1), now=at(1))
    assert list(inventory.resident) == [A, B]


def test_an_answer_that_was_under_way_does_not_undo_what_was_seen() -> None:
    inventory = known("a")
    inventory.saw_loaded(A, "", now=at(10))
    inventory.report_loaded([], asked_at=at(9), now=at(11))
    assert A in inventory.resident
    inventory.report_loaded([], asked_at=at(11), now=at(12))
    assert A not in inventory.resident


def test_a_model_that_was_deleted_in_mid_answer_is_not_in_memory() -> None:
    inventory = known("a", "b")
    inventory.report_installed([row("b")])
    inventory.saw_loaded(A, "", now=at(1))
    assert A not in inventory.resident
    assert set(inventory.resident) <= set(inventory.installed)


def test_an_old_row_does_not_bring_back_what_was_unloaded() -> None:
    inventory = known("a")
    inventory.saw_loaded(A, "", now=at(9))
    inventory.saw_unloaded(A, now=at(10))
    inventory.report_loaded([row("a")], asked_at=at(9.5), now=at(10.5))
    assert A not in inventory.resident
    inventory.report_loaded([row("a")], asked_at=at(11), now=at(11.5))
    assert A in inventory.resident


def test_a_report_that_does_not_say_when_it_was_made_is_taken_to_be_old() -> None:
    inventory = known("a")
    inventory.saw_loaded(A, "", now=at(10))
    inventory.report_loaded([], asked_at=None, now=at(10 + REPORT_AGE_S))
    assert A in inventory.resident
    inventory.report_loaded([], asked_at=None, now=at(10.1 + REPORT_AGE_S))
    assert A not in inventory.resident


def test_options_are_known_from_answers_only_and_gone_with_the_model() -> None:
    inventory = known("a")
    inventory.report_loaded([row("a")], asked_at=at(1), now=at(1))
    assert not inventory.needs_reload(A, "num_ctx=1")
    inventory.saw_loaded(A, "num_ctx=1", now=at(2))
    assert not inventory.needs_reload(A, "num_ctx=1")
    assert inventory.needs_reload(A, "")
    inventory.report_loaded([], asked_at=at(3), now=at(3))
    assert not inventory.needs_reload(A, "")


def test_a_reported_context_tells_which_contexts_fit_what_others_loaded() -> None:
    inventory = known("a")
    inventory.report_loaded([row("a", context_length=4096)], asked_at=at(1), now=at(1))
    assert not inventory.needs_reload(A, "num_ctx=4096")
    assert inventory.needs_reload(A, "num_ctx=2048")
    assert not inventory.needs_reload(A, "")
    assert not inventory.needs_reload(A, "num_gpu=1"), "nothing is known of it"
    assert (inventory.raised(A, "num_ctx=2048"), inventory.raised(B, "num_ctx=2048")) == (None, None)
    inventory.raises = True
    assert not inventory.needs_reload(A, "num_ctx=2048")
    assert inventory.needs_reload(A, "num_ctx=8192")
    assert (inventory.raised(A, "num_ctx=2048"), inventory.raised(A, "num_ctx=4096"), inventory.raised(A, "")) == (4096, None, None)
    assert inventory.raised(B, "num_ctx=2048") is None, "it is not loaded"


def test_a_runner_that_serves_both_keeps_its_own_options() -> None:
    inventory = known("a")
    inventory.saw_loaded(A, "", now=at(1))
    inventory.report_loaded([row("a", context_length=4096)], asked_at=at(2), now=at(2))
    inventory.saw_loaded(A, "num_ctx=4096", now=at(3))
    assert inventory.options == {A: ""}
    assert not inventory.needs_reload(A, "num_ctx=4096")
    assert inventory.loaded_at == {A: 1}
    inventory.saw_loaded(A, "num_ctx=1", now=at(4))
    assert (inventory.options, inventory.contexts, inventory.loaded_at) == ({A: "num_ctx=1"}, {}, {A: 4})


def test_a_context_that_changes_means_that_somebody_else_loaded_it() -> None:
    inventory = known("a")
    inventory.saw_loaded(A, "num_ctx=2048", now=at(1))
    for seconds, context in ((2, 2048), (3, 2048), (4, 8192)):
        assert not inventory.needs_reload(A, "num_ctx=2048")
        inventory.report_loaded([row("a", context_length=context)], asked_at=at(seconds), now=at(seconds))
    assert inventory.needs_reload(A, "num_ctx=2048")
    assert not inventory.needs_reload(A, "num_ctx=8192")


def test_what_a_model_was_trained_with_is_in_its_row() -> None:
    inventory = Inventory()
    inventory.report_installed([row("a", details={"context_length": 4096}), row("b", details=7)])
    assert [model.trained_context for model in inventory.installed.values()] == [4096, 0]


def test_who_asks_for_the_same_options_joins_a_load() -> None:
    inventory = known("a")
    inventory.loading[A] = Loading(at(1), 5.0, "num_ctx=8192")
    assert inventory.joins(A, "num_ctx=8192")
    assert not inventory.joins(A, "num_ctx=2048")
    inventory.raises = True
    assert inventory.joins(A, "num_ctx=2048")
    assert inventory.raised(A, "num_ctx=2048") == 8192


@pytest.mark.parametrize("by", ["answer", "report", "removal"])
def test_a_load_is_over_when_the_model_answers_is_listed_or_is_gone(by: str) -> None:
    inventory = known("a", "b")
    inventory.loading[A] = Loading(at(1), 5.0)
    inventory.loading[B] = Loading(at(1), 5.0)
    inventory.report_loaded([], asked_at=at(2), now=at(2))
    assert A in inventory.loading, "a model that is being loaded is absent from the list"
    if by == "answer":
        inventory.saw_loaded(A, "", now=at(3))
    elif by == "report":
        inventory.report_loaded([row("a")], asked_at=at(3), now=at(3))
    else:
        inventory.report_installed([row("b")])
    assert list(inventory.loading) == [B]


def test_out_of_memory_forgets_everything() -> None:
    inventory = known("a", "b")
    inventory.report_loaded([row("a"), row("b")], asked_at=at(1), now=at(1))
    inventory.loading[B] = Loading(at(1), 5.0)
    inventory.forget_loaded(now=at(2))
    assert (inventory.resident, inventory.loading) == ({}, {})
    inventory.report_loaded([row("a")], asked_at=at(1.5), now=at(2.5))
    assert inventory.resident == {}


def test_a_model_that_is_removed_is_forgotten() -> None:
    inventory = known("a", "b")
    inventory.saw_loaded(A, "x", now=at(1))
    inventory.report_installed([row("b")])
    assert inventory.resident == {}
    inventory.report_installed([row("a"), row("b")])
    assert inventory.resident == {}


def test_news_are_counted_when_something_comes_into_memory_only() -> None:
    inventory = Inventory()
    inventory.report_installed([{"name": "m"}, {"name": "n"}])
    key, other = normalise("m"), normalise("n")
    counts = [inventory.news.count]
    for step in (
        lambda: inventory.begins(key, Loading(Instant(1.0), 5.0)),
        lambda: inventory.saw_loaded(key, "", now=Instant(2.0)),
        lambda: inventory.saw_loaded(key, "", now=Instant(3.0)),
        lambda: inventory.report_loaded([{"name": "m"}], asked_at=Instant(4.0), now=Instant(4.0)),
        lambda: inventory.report_loaded([{"name": "m"}, {"name": "n"}], asked_at=Instant(5.0), now=Instant(5.0)),
        lambda: inventory.saw_unloaded(other, now=Instant(6.0)),
    ):
        step()
        counts.append(inventory.news.count)
    assert [after - before for before, after in pairwise(counts)] == [1, 1, 0, 0, 1, 0]


def test_whatever_changes_in_memory_is_counted_too() -> None:
    inventory = Inventory()
    inventory.report_installed([{"name": "m"}, {"name": "n"}])
    key, other = normalise("m"), normalise("n")

    def report(*rows: dict[str, Any], at: float) -> None:
        inventory.report_loaded(list(rows), asked_at=Instant(at), now=Instant(at))

    for step, changes in (
        (lambda: inventory.begins(key, Loading(Instant(1.0), 5.0)), True),
        (lambda: inventory.breaks_off(key), True),
        (lambda: inventory.begins(key, Loading(Instant(1.0), 5.0)), True),
        (lambda: inventory.saw_loaded(key, "", now=Instant(2.0)), True),
        (lambda: inventory.saw_loaded(key, "", now=Instant(3.0)), False),
        (lambda: report({"name": "m"}, at=4.0), False),
        (lambda: report({"name": "m", "context_length": 1}, at=4.5), False),
        (lambda: report({"name": "m", "context_length": 2}, at=4.6), True),
        (lambda: report({"name": "m"}, {"name": "n"}, at=5.0), True),
        (lambda: inventory.begins(other, Loading(Instant(5.5), 5.0)), True),
        (lambda: report({"name": "m"}, {"name": "n"}, at=5.6), True),
        (lambda: inventory.saw_unloaded(other, now=Instant(6.0)), True),
        (lambda: report(at=7.0), True),
        (lambda: inventory.forget_loaded(now=Instant(8.0)), True),
        (lambda: inventory.report_installed([{"name": "m"}]), True),
    ):
        before = inventory.news.changes
        step()
        assert (inventory.news.changes > before) is changes
